"""What an MLP keeps of rows: means of groups, and at a refresh their activations neuron by neuron."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from chipmunk_fx.kernels.triton.activations import activate
from chipmunk_fx.kernels.triton.fp8 import magnitude, raise_to
from chipmunk_fx.kernels.triton.numeric import cast, in_order


def group_means(x: Tensor, order: Tensor | None, group_rows: int) -> Tensor:
    """[B, G, C] in x's dtype: the mean row of each group of x [B, N, C], summed in fp32. order: int32 [N] or None."""
    batch, rows, width = x.shape
    groups = triton.cdiv(rows, group_rows)
    means = torch.empty(batch, groups, width, dtype=x.dtype, device=x.device)
    _group_means[(triton.cdiv(width, 128), groups, batch)](
        x, order, means, *x.stride()[:2], rows, width, groups, GROUP=group_rows, WIDTHS=128, ROWS=16
    )
    return means


@triton.jit
def _group_means(
    x, order, means, x_b, x_n, rows, width, groups, GROUP: tl.constexpr, WIDTHS: tl.constexpr, ROWS: tl.constexpr
):
    group = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    c = tl.program_id(0) * WIDTHS + tl.arange(0, WIDTHS)
    height = tl.minimum(GROUP, rows - group * GROUP)
    sums = tl.zeros([ROWS, WIDTHS], tl.float32)
    for first in range(0, height, ROWS):
        place = first + tl.arange(0, ROWS)
        live = place < height
        row = in_order(order, group * GROUP + place, live)
        pointer = x + b * x_b + row[:, None] * x_n + c[None, :]
        sums += tl.load(pointer, mask=live[:, None] & (c < width)[None, :], other=0.0).to(tl.float32)
    mean = tl.sum(sums, 0) / height
    tl.store(means + (b * groups + group) * width + c, cast(mean, means.dtype.element_ty), mask=c < width)


def store_activations(
    h: Tensor, up: Tensor | None, hidden: Tensor, mean: Tensor, lists: Tensor, order: Tensor | None, *, activation: str,
    group_rows: int, most: Tensor | None = None,
) -> None:  # fmt: skip
    """h = act(h) [* up] in place, and what a refresh keeps of it, group by group and neuron by neuron, contiguous.

    hidden [G, F, R] = what h becomes; mean fp32 [G, F] = the mean of h over a group's rows, with `up` act of that times the mean
    of up; lists int32 [G, K] = 0, 1, .., K - 1. h, up [N, F], contiguous. order: int32 [N] or
    None. most: as of `find_largest`, of what h becomes.
    """
    rows, neurons = h.shape
    grid = (triton.cdiv(neurons, 64), triton.cdiv(rows, group_rows))
    _store_activations[grid](
        h, up, hidden, mean, lists, order, most, rows, neurons, lists.shape[-1],
        ACTIVATION=activation, GROUP=group_rows, ROWS=math.gcd(group_rows, 32), NEURONS=64, STAGES=3,
    )  # fmt: skip


@triton.jit
def _store_activations(
    h, up, hidden, mean, lists, order, most, rows, neurons, columns,
    ACTIVATION: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, NEURONS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """NEURONS neurons of a group, ROWS rows at a time."""
    group = tl.program_id(1)
    neuron = tl.program_id(0) * NEURONS + tl.arange(0, NEURONS)
    kept = group.to(tl.int64) * neurons + neuron
    height = tl.minimum(GROUP, rows - group * GROUP)
    sums = tl.zeros([16, NEURONS], tl.float32)
    up_sums = sums
    largest = tl.zeros([16, NEURONS], tl.int32)
    for first in tl.range(0, height, ROWS, num_stages=STAGES):
        place = first + tl.arange(0, ROWS)
        live = place < height
        mask = live[:, None] & (neuron < neurons)[None, :]
        at = in_order(order, group * GROUP + place, live)[:, None] * neurons + neuron[None, :]
        value = tl.load(h + at, mask=mask, other=0.0).to(tl.float32)
        sums += tl.sum(_in_sixteens(value), 0)
        other = None if up is None else tl.load(up + at, mask=mask, other=0.0).to(tl.float32)
        if up is not None:
            up_sums += tl.sum(_in_sixteens(other), 0)
        value = _hidden(value, other, h.dtype.element_ty, ACTIVATION)
        if most is not None:
            size = magnitude(tl.where(mask, value.to(tl.float32), 0.0))
            largest = tl.maximum(largest, tl.max(_in_sixteens(size), 0))
        tl.store(h + at, value, mask=mask)
        tl.store(hidden + kept[:, None] * GROUP + place[None, :], tl.trans(value), mask=tl.trans(mask))
    if most is not None:
        raise_to(most, tl.max(tl.max(largest, 1), 0))
    pooled = tl.sum(sums, 0) / height
    if up is not None:
        pooled = activate(pooled, ACTIVATION) * (tl.sum(up_sums, 0) / height)
    tl.store(mean + kept, pooled, mask=neuron < neurons)
    tl.store(lists + group.to(tl.int64) * columns + neuron, neuron, mask=neuron < columns)


@triton.jit
def _hidden(h, up, dtype: tl.constexpr, ACTIVATION: tl.constexpr):
    """act(h) [* up] of fp32, rounded after each step, as the dense model does."""
    value = cast(activate(h, ACTIVATION), dtype)
    if up is not None:
        value = cast(value.to(tl.float32) * up, dtype)
    return value


@triton.jit
def _in_sixteens(x):
    """[n / 16, 16, m] of x [n, m]: a thread has all values along the first dimension, which is cheap to reduce."""
    return tl.reshape(x, [x.shape[0] // 16, 16, x.shape[1]])
