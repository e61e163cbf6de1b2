"""Numbers in fp8, for backends that multiply them."""

import triton
import triton.language as tl
from torch import Tensor

from chipmunk_fx.kernels.triton.numeric import cast
from chipmunk_fx.ops.fp8 import LARGEST

TURNS = 4  # blocks of a weight that a program goes through: fewer programs begin only to find nothing to do


def find_largest(values: Tensor, most: Tensor, stale: Tensor | None = None) -> None:
    """most [], fp32, becomes the largest magnitude of values [N, C], whose lines may lie apart, if it is less.

    stale: int32 [1], nothing is done where it is 0.
    """
    rows, width = values.shape
    grid = (triton.cdiv(width, 256), triton.cdiv(rows, 32 * TURNS))
    _find_largest[grid](values, most, stale, values.stride(0), rows, width, ROWS=32, WIDTHS=256, TURNS=TURNS)


@triton.jit
def _find_largest(
    values, most, stale, pitch, rows, width, ROWS: tl.constexpr, WIDTHS: tl.constexpr, TURNS: tl.constexpr
):
    if idle(stale):
        return
    c = tl.program_id(0) * WIDTHS + tl.arange(0, WIDTHS)
    largest = 0
    for turn in range(TURNS):
        row = ((tl.program_id(1) * TURNS + turn) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row < rows)[:, None] & (c < width)[None, :]
        some = tl.load(values + row[:, None] * pitch + c[None, :], mask=mask, other=0.0)
        largest = tl.maximum(largest, tl.max(tl.max(magnitude(some), 1), 0))
    raise_to(most, largest)


@triton.jit
def idle(stale):
    """Whether weights need not be looked at: stale, int32 [1] or None, is 0."""
    return False if stale is None else tl.load(stale) == 0


@triton.jit
def magnitude(values):
    """int32 which order as magnitudes do: their bits in fp32; nan is above all."""
    return (values.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def raise_to(most, largest):
    """most, a pointer to fp32, is raised to what has this `magnitude`."""
    tl.atomic_max(most.to(tl.pointer_type(tl.int32), bitcast=True), largest, sem="relaxed")


def store_scales(most: Tensor, scales: Tensor, stale: Tensor | None = None, room: int = 1) -> None:
    """scales, fp32 [n] = those under which `room` times most [n] fills the range, as `chipmunk_fx.ops.fp8.scale_for`.

    stale: as of `find_largest`.
    """
    count = len(scales)
    _store_scales[(1,)](
        most, scales, stale, count, ROOM=room, LARGEST=LARGEST, COUNT=triton.next_power_of_2(count), num_warps=1
    )


@triton.jit
def _store_scales(most, scales, stale, count, ROOM: tl.constexpr, LARGEST: tl.constexpr, COUNT: tl.constexpr):
    if idle(stale):
        return
    part = tl.arange(0, COUNT)
    scale = ROOM * tl.load(most + part, mask=part < count) * (1 / LARGEST)
    tl.store(scales + part, tl.where(scale == 0, 1.0, scale), mask=part < count)


def store_weight(weight: Tensor, rounded: Tensor, scale: Tensor, stale: Tensor | None = None) -> None:
    """rounded [F, C] in e4m3, contiguous, = weight [F, C] / scale []. Lines of weight may lie apart.

    stale: as of `find_largest`.
    """
    neurons, width = weight.shape
    grid = (triton.cdiv(width, 256), triton.cdiv(neurons, 16 * TURNS))
    _store_weight[grid](
        weight, rounded, scale, stale, weight.stride(0), neurons, width,
        LARGEST=LARGEST, ROWS=16, WIDTHS=256, TURNS=TURNS,
    )  # fmt: skip


@triton.jit
def _store_weight(
    weight, rounded, scale, stale, pitch, neurons, width,
    LARGEST: tl.constexpr, ROWS: tl.constexpr, WIDTHS: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    if idle(stale):
        return
    over = tl.load(scale)
    c = tl.program_id(0) * WIDTHS + tl.arange(0, WIDTHS)
    for turn in range(TURNS):
        neuron = ((tl.program_id(1) * TURNS + turn) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        mask = (neuron < neurons)[:, None] & (c < width)[None, :]
        value = tl.load(weight + neuron[:, None] * pitch + c[None, :], mask=mask, other=0.0).to(tl.float32)
        value8 = in_fp8(value, over, rounded.dtype.element_ty, LARGEST)
        tl.store(rounded + neuron[:, None] * width + c[None, :], value8, mask=mask)


@triton.jit
def in_fp8(values, scale, dtype: tl.constexpr, LARGEST: tl.constexpr):
    """values fp32 over `scale`, of a shape that broadcasts to theirs, as chipmunk_fx.ops.fp8.rounded has them; nan stays."""
    values = tl.div_rn(values, scale + tl.zeros_like(values))
    return cast(tl.clamp(values, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL), dtype)
