"""Numbers in fp8, for backends that multiply them."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from chipmunk_fx.kernels.triton.numeric import cast
from chipmunk_fx.ops.fp8 import LARGEST, scale_for


def store_weight(weight: Tensor, rounded: Tensor, scale: Tensor) -> None:
    """rounded [F, C] in e4m3, contiguous, = weight [F, C] / scale, and scale [] = its largest magnitude over 448, or 1.

    Lines of weight may lie apart.
    """
    least, most = torch.aminmax(weight)
    scale.copy_(scale_for(torch.maximum(-least, most)))
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
