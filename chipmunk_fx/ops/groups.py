"""Cutting rows into groups and groups into spans small enough for the cache."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

GROUP_ROWS = 128  # rows that share a list where neither the user nor a kernel has a wish
# bytes gathered at once: on a CPU they stay in the second-level caches, on a GPU this only bounds memory
_GATHER_BYTES = {"cpu": 5 << 19}
_GATHER_BYTES_ELSEWHERE = 1 << 28


@dataclass(frozen=True)
class Span:
    """Neighbouring groups of equal height: groups first..first+count-1, rows (in group order) `rows`."""

    first: int
    count: int
    height: int
    rows: slice

    @property
    def groups(self) -> slice:
        return slice(self.first, self.first + self.count)


def spans(rows: int, group_rows: int, at_once: int) -> Iterator[Span]:
    """All groups of `rows` rows, at most `at_once` groups a span; a ragged last group is a span by itself."""
    full = rows // group_rows
    for first in range(0, full, at_once):
        count = min(at_once, full - first)
        yield Span(first, count, group_rows, slice(first * group_rows, (first + count) * group_rows))
    if rows % group_rows:
        yield Span(full, 1, rows % group_rows, slice(full * group_rows, rows))


def group_count(rows: int, group_rows: int) -> int:
    return math.ceil(rows / group_rows)


def sampled_rows(group_rows: int, stride: int, height: int, device: torch.device) -> Tensor:
    """int64 [ceil(height / stride) or one less]: one row of each `stride`, not the same one, so that samples of a patch or a
    voxel do not all lie in one of its columns: row 3 i mod stride of the i-th, and no further than the last. Of a group that is
    but `height` rows high, those that it has, counted without a host synchronisation."""
    last = math.ceil(height / stride) - 1
    missing = height < group_rows and last * stride + 3 * last % stride >= height
    sample = torch.arange(last + 1 - missing, device=device)
    return (sample * stride + 3 * sample % stride).clamp_(max=group_rows - 1)


def groups_at_once(device: torch.device, bytes_a_group: int) -> int:
    return max(1, _GATHER_BYTES.get(device.type, _GATHER_BYTES_ELSEWHERE) // max(1, bytes_a_group))


def take(x: Tensor, order: Tensor | None, span: Span) -> Tensor:
    """The rows of x [N, ...] that a span covers, as [count, height, ...]; a view when there is no order."""
    rows = x[span.rows] if order is None else x.index_select(0, order[span.rows])
    return rows.unflatten(0, (span.count, span.height))


def put(x: Tensor, order: Tensor | None, span: Span, rows: Tensor) -> None:
    """Write rows [count, height, ...] back to where `take` read them (order int64)."""
    rows = rows.flatten(0, 1)
    if order is None:
        x[span.rows].copy_(rows)
    else:
        x.index_copy_(0, order[span.rows], rows.to(x.dtype))


def left_out(order: Tensor, rows: int) -> Tensor:
    """int64 [rows - P]: the rows that order [P] does not name, ascending, found without a host synchronisation."""
    absent = torch.ones(rows, dtype=torch.uint8, device=order.device).index_fill_(0, order.long(), 0)
    return absent.argsort(descending=True, stable=True)[: rows - order.shape[0]]
