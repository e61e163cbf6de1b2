"""What an MLP keeps of a refresh: means of groups, activations and weights neuron by neuron."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from chipmunk_fx.kernels.triton.activations import activate
from chipmunk_fx.kernels.triton.fp8 import in_fp8, keep_largest
from chipmunk_fx.kernels.triton.numeric import cast, in_order
from chipmunk_fx.ops.fp8 import LARGEST


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
    h: Tensor, up: Tensor | None, hidden: Tensor, order: Tensor | None, *, activation: str, group_rows: int,
    most: Tensor | None = None,
) -> None:  # fmt: skip
    """h = act(h) [* up] in place, and the same group by group and neuron by neuron: hidden [G, F, R], contiguous.

    h, up [N, F], contiguous. order: int32 [N] or None. most: as of `find_largest`, of what h becomes.
    """
    rows, neurons = h.shape
    grid = (triton.cdiv(neurons, 64), triton.cdiv(rows, 64))
    _store_activations[grid](
        h, up, hidden, order, most, rows, neurons, ACTIVATION=activation, GROUP=group_rows, ROWS=64, NEURONS=64
    )


@triton.jit
def _store_activations(
    h, up, hidden, order, most, rows, neurons,
    ACTIVATION: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, NEURONS: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    neuron = tl.program_id(0) * NEURONS + tl.arange(0, NEURONS)
    mask = (place < rows)[:, None] & (neuron < neurons)[None, :]
    row = in_order(order, place, place < rows)
    at = row[:, None] * neurons + neuron[None, :]
    # rounded after each step, as the dense model does
    value = cast(activate(tl.load(h + at, mask=mask, other=0.0).to(tl.float32), ACTIVATION), h.dtype.element_ty)
    if up is not None:
        other = tl.load(up + at, mask=mask, other=0.0).to(tl.float32)
        value = cast(value.to(tl.float32) * other, h.dtype.element_ty)
    if most is not None:
        keep_largest(most, tl.where(mask, value.to(tl.float32), 0.0))
    tl.store(h + at, value, mask=mask)
    cached = hidden + ((place // GROUP).to(tl.int64) * neurons * GROUP + place % GROUP)[None, :]
    tl.store(cached + neuron.to(tl.int64)[:, None] * GROUP, tl.trans(value), mask=tl.trans(mask))


def store_transposed(weight: Tensor, by_neuron: Tensor, scale: Tensor | None = None) -> None:
    """by_neuron [F, C2], contiguous = the transpose of weight [C2, F], whose lines may lie apart; with a scale [], over that, in
    e4m3.

    H200, 3072 by 12288: PyTorch's copy takes 0.26 ms, 0.036 would move the bytes.
    """
    width, neurons = weight.shape
    grid = (triton.cdiv(neurons, 64), triton.cdiv(width, 64))
    _store_transposed[grid](weight, by_neuron, scale, weight.stride(0), width, neurons, LARGEST=LARGEST, SIDE=64)


@triton.jit
def _store_transposed(weight, by_neuron, scale, pitch, width, neurons, LARGEST: tl.constexpr, SIDE: tl.constexpr):
    c = (tl.program_id(1) * SIDE + tl.arange(0, SIDE)).to(tl.int64)
    neuron = (tl.program_id(0) * SIDE + tl.arange(0, SIDE)).to(tl.int64)
    mask = (c < width)[:, None] & (neuron < neurons)[None, :]
    value = tl.load(weight + c[:, None] * pitch + neuron[None, :], mask=mask, other=0.0)
    if scale is not None:
        value = in_fp8(value.to(tl.float32), tl.load(scale), by_neuron.dtype.element_ty, LARGEST)
    tl.store(by_neuron + neuron[:, None] * width + c[None, :], tl.trans(value), mask=tl.trans(mask))
