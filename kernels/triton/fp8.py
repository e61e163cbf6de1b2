"""Numbers in fp8, for backends that multiply them."""

import triton
import triton.language as tl
from torch import Tensor

from chipmunk_fx.kernels.triton.numeric import cast
from chipmunk_fx.ops.fp8 import LARGEST


def find_largest(values: Tensor, most: Tensor) -> None:
    """most [], fp32, becomes the largest magnitude of values [N, C], whose lines may lie apart, if it is less."""
    rows, width = values.shape
    grid = (triton.cdiv(width, 256), triton.cdiv(rows, 32))
    _find_largest[grid](values, most, values.stride(0), rows, width, ROWS=32, WIDTHS=256)


@triton.jit
def _find_largest(values, most, pitch, rows, width, ROWS: tl.constexpr, WIDTHS: tl.constexpr):
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    c = tl.program_id(0) * WIDTHS + tl.arange(0, WIDTHS)
    mask = (row < rows)[:, None] & (c < width)[None, :]
    keep_largest(most, tl.load(values + row[:, None] * pitch + c[None, :], mask=mask, other=0.0))


@triton.jit
def keep_largest(most, values):
    """most, a pointer to fp32, is raised to the largest magnitude of a block of values; nan is above all."""
    bits = (values.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF).to(tl.int32)  # which order as magnitudes do
    tl.atomic_max(most.to(tl.pointer_type(tl.int32), bitcast=True), tl.max(tl.max(bits, 1), 0), sem="relaxed")


def store_weight(weight: Tensor, rounded: Tensor, scale: Tensor) -> None:
    """rounded [F, C] in e4m3, contiguous, = weight [F, C] / scale []. Lines of weight may lie apart."""
    neurons, width = weight.shape
    grid = (triton.cdiv(width, 256), triton.cdiv(neurons, 16))
    _store_weight[grid](weight, rounded, scale, weight.stride(0), neurons, width, LARGEST=LARGEST, ROWS=16, WIDTHS=256)


@triton.jit
def _store_weight(
    weight, rounded, scale, pitch, neurons, width, LARGEST: tl.constexpr, ROWS: tl.constexpr, WIDTHS: tl.constexpr
):
    neuron = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    c = tl.program_id(0) * WIDTHS + tl.arange(0, WIDTHS)
    mask = (neuron < neurons)[:, None] & (c < width)[None, :]
    value = tl.load(weight + neuron[:, None] * pitch + c[None, :], mask=mask, other=0.0).to(tl.float32)
    value8 = in_fp8(value, tl.load(scale), rounded.dtype.element_ty, LARGEST)
    tl.store(rounded + neuron[:, None] * width + c[None, :], value8, mask=mask)


@triton.jit
def in_fp8(values, scale, dtype: tl.constexpr, LARGEST: tl.constexpr):
    """values fp32 over `scale`, of a shape that broadcasts to theirs, as chipmunk_fx.ops.fp8.rounded has them; nan stays."""
    values = tl.div_rn(values, scale + tl.zeros_like(values))
    return cast(tl.clamp(values, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL), dtype)
