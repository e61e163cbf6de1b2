"""Weights of an MLP as its sparse steps read them, w2 neuron by neuron, kept until they change.

Weights hardly ever change within a generation: samples of them are compared with what is kept, and tell whether all are stored
again. That is decided on the device.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from chipmunk_fx.kernels.triton.fp8 import TURNS, find_largest, idle, in_fp8, store_scales, store_weight
from chipmunk_fx.kernels.triton.launching import inner_contiguous
from chipmunk_fx.ops.fp8 import LARGEST

NEURONS, COLUMNS = 64, 16  # of a block of samples: lines of 128 bytes of w2, of 32 of by_neuron, where values have two


def store_weights(
    w1: Tensor, wu: Tensor | None, w2: Tensor, w1_fp8: Tensor | None, by_neuron: Tensor, scales: Tensor | None,
    most: Tensor | None, clock: Tensor,
) -> None:  # fmt: skip
    """by_neuron = w2^T; where w1_fp8 and scales are given all in fp8. Nothing where clock[1] is 0 and weights are as kept.

    most: zeros like scales.
    """
    w2 = inner_contiguous(w2)
    stale = torch.zeros(1, dtype=torch.int32, device=w2.device)
    if w1_fp8 is None or scales is None or most is None:
        find_changes(w2.mT, by_neuron, None, clock, stale)
        return store_transposed(w2, by_neuron, None, stale)
    first = [inner_contiguous(weight) for weight in (w1, wu) if weight is not None]
    for weight, kept, scale in zip((*first, w2.mT), (*w1_fp8, by_neuron), scales, strict=True):
        find_changes(weight, kept, scale, clock, stale)
    for weight, largest in zip((*first, w2), most, strict=True):
        find_largest(weight, largest, stale)
    store_scales(most, scales, stale)
    for weight, kept, scale in zip(first, w1_fp8, scales, strict=False):
        store_weight(weight, kept, scale, stale)
    store_transposed(w2, by_neuron, scales[-1], stale)


def find_changes(weight: Tensor, kept: Tensor, scale: Tensor | None, clock: Tensor, stale: Tensor) -> None:
    """stale, int32 [1], becomes 1 where clock[1] is not 0, or a sample of weight [F, C] is not as in kept [F, C], contiguous.

    Blocks of 64 neurons and 16 columns lie along diagonals: of each neuron 32 values are met or more, of each column some 128.
    scale []: of kept in e4m3.
    """
    neurons, width = weight.shape
    blocks, lines = triton.cdiv(neurons, NEURONS), triton.cdiv(width, COLUMNS)
    grid = (blocks, max(2, triton.cdiv(2 * lines, blocks)))
    _find_changes[grid](
        weight, kept, scale, clock, stale, *weight.stride(), neurons, width,
        LARGEST=LARGEST, NEURONS=NEURONS, COLUMNS=COLUMNS,
    )  # fmt: skip


@triton.jit
def _find_changes(
    weight, kept, scale, clock, stale, weight_f, weight_c, neurons, width,
    LARGEST: tl.constexpr, NEURONS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    if tl.load(clock + 1) != 0:
        tl.store(stale, 1)
        return
    block, diagonal = tl.program_id(0), tl.program_id(1)
    lines = tl.cdiv(width, COLUMNS)
    # diagonals are no further apart than there are blocks, so that none of the columns lies between
    line = (block + diagonal * tl.cdiv(lines, tl.num_programs(1))) % lines
    neuron = (block * NEURONS + tl.arange(0, NEURONS)).to(tl.int64)[:, None]
    c = (line * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)[None, :]
    mask = (neuron < neurons) & (c < width)
    value = tl.load(weight + neuron * weight_f + c * weight_c, mask=mask, other=0.0)
    before = tl.load(kept + neuron * width + c, mask=mask)
    if scale is None:
        differs = _bits(value) != _bits(before)
    else:
        over = tl.load(scale) + tl.zeros([NEURONS, COLUMNS], tl.float32)
        differs = _bits(in_fp8(value.to(tl.float32), over, kept.dtype.element_ty, LARGEST)) != _bits(before)
        differs = differs | (over - over != 0)  # nan or inf, under which all weights look alike
    if tl.max(tl.max((mask & differs).to(tl.int32), 1), 0) != 0:
        tl.store(stale, 1)


@triton.jit
def _bits(x):
    """As integers: nan is like itself, and like no number."""
    return x.to(tl.core.get_int_dtype(x.dtype.primitive_bitwidth, True), bitcast=True)


def store_transposed(
    weight: Tensor, by_neuron: Tensor, scale: Tensor | None = None, stale: Tensor | None = None
) -> None:
    """by_neuron [F, C2], contiguous = the transpose of weight [C2, F], whose lines may lie apart; with a scale [], over that, in
    e4m3. stale: as of `find_largest`.

    H200, 3072 by 12288: PyTorch's copy takes 0.26 ms, 0.036 would move the bytes.
    """
    width, neurons = weight.shape
    grid = (triton.cdiv(neurons, 64), triton.cdiv(width, 64 * TURNS))
    _store_transposed[grid](
        weight, by_neuron, scale, stale, weight.stride(0), width, neurons, LARGEST=LARGEST, SIDE=64, TURNS=TURNS
    )


@triton.jit
def _store_transposed(
    weight, by_neuron, scale, stale, pitch, width, neurons,
    LARGEST: tl.constexpr, SIDE: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    if idle(stale):
        return
    neuron = (tl.program_id(0) * SIDE + tl.arange(0, SIDE)).to(tl.int64)
    for turn in range(TURNS):
        c = ((tl.program_id(1) * TURNS + turn) * SIDE + tl.arange(0, SIDE)).to(tl.int64)
        mask = (c < width)[:, None] & (neuron < neurons)[None, :]
        value = tl.load(weight + c[:, None] * pitch + neuron[None, :], mask=mask, other=0.0)
        if scale is not None:
            value = in_fp8(value.to(tl.float32), tl.load(scale), by_neuron.dtype.element_ty, LARGEST)
        tl.store(by_neuron + neuron[:, None] * width + c[None, :], tl.trans(value), mask=tl.trans(mask))
