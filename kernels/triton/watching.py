"""Whether a cache holds what can be built on: the operator cache_watch in one kernel."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from chipmunk_fx.kernels.triton.launching import on_device_of

VALUES = 8192  # of a program


def watch(cache: Tensor, broken: Tensor, columns: int) -> None:
    """As `chipmunk_fx.ops.transfer.cache_watch`, for a contiguous cache."""
    width = cache.shape[-1]
    columns = min(columns, width)
    total = cache.numel() // width * columns
    with on_device_of(cache):
        grid = (triton.cdiv(total, VALUES),)
        _watch[grid](cache, broken.view(torch.uint8), total, width, COLUMNS=columns, VALUES=VALUES, num_warps=8)


@triton.jit
def _watch(cache, broken, total, width, COLUMNS: tl.constexpr, VALUES: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * VALUES + tl.arange(0, VALUES)
    place = index // COLUMNS * width + index % COLUMNS
    value = tl.load(cache + place, mask=index < total, other=0.0).to(tl.float32)
    finite = tl.abs(value) < float("inf")  # false for nan
    if tl.min(finite.to(tl.int32), 0) == 0:
        tl.store(broken, 1)
