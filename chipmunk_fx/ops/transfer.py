"""Caches on their way between host and device, and whether they hold what can be built on.

A lane is one buffer on the device and one stream: the stream does what happens to the buffer in order, beside the stream that
computes. Streams arrive as numbers (int64 [lanes, 3] on the CPU: id, device index, device type), so that nothing but a graph's
inputs is needed to find them; on a CPU there are none and copies are made at once.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor


def cache_fetch(
    ready: Sequence[Tensor],
    host: Sequence[Tensor],
    stage: Sequence[Tensor],
    lanes: Tensor,
    after: Tensor | None,
    *,
    lane: int,
    coming: int,
) -> None:
    """Wait until the buffers `ready` of `lane` are filled, then begin to copy `host` into `stage`, the buffers of `coming`.

    `stage` may have been used by work that was given to the computing stream before this call, not by later work: what
    reads them last in a graph names its result `after`, or a compiler may set this call before it, on a copy of them.
    """
    if ready and (stream := _stream(lanes, lane, ready[0])) is not None:
        torch.cuda.current_stream(ready[0].device).wait_stream(stream)
    if stage:
        _copy(host, stage, stage[0], lanes, coming)


def cache_store(stage: Sequence[Tensor], host: Sequence[Tensor], lanes: Tensor, *, lane: int) -> None:
    """Begin to copy `stage`, the buffers of `lane`, to `host` once the work given so far is done."""
    _copy(stage, host, stage[0], lanes, lane)


def cache_watch(cache: Tensor, broken: Tensor, *, columns: int) -> None:
    """broken: bool [1], becomes true where the first `columns` values of any row of `cache` hold nan or inf.

    Values that sum up to inf may count.
    """
    broken.logical_or_(cache[..., :columns].sum(dtype=torch.float32).isfinite().logical_not())


def _copy(sources: Sequence[Tensor], targets: Sequence[Tensor], buffer: Tensor, lanes: Tensor, lane: int) -> None:
    stream = _stream(lanes, lane, buffer)
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream(buffer.device))
    with nullcontext() if stream is None else torch.cuda.stream(stream):
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source, non_blocking=True)


def _stream(lanes: Tensor, lane: int, buffer: Tensor) -> Any:
    if buffer.device.type != "cuda":
        return None
    identity, index, kind = lanes[lane].tolist()
    return torch.cuda.Stream(stream_id=identity, device_index=index, device_type=kind)
