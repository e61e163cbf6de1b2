"""The first product of the mean rows of groups: what tells how far neurons have moved since they were computed."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from chipmunk_fx.kernels.triton import tuning
from chipmunk_fx.kernels.triton.activations import activate
from chipmunk_fx.kernels.triton.first import linear
from chipmunk_fx.kernels.triton.launching import inner_contiguous
from chipmunk_fx.ops.activations import activation as activation_named

MOST = 64  # mean rows that one tile holds; the vendor's library multiplies more


def first_product(
    means: Tensor, w1: Tensor, b1: Tensor | None, wu: Tensor | None, bu: Tensor | None, activation: str,
    kept: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """fp32 [B, G, F] of means [B, G, C]: w1 means + b1, or through the activation times the up branch. Up to MOST rows nothing is
    rounded to their dtype.

    kept: clock and mean fp32 [B, G, F]; the result is that mean where clock[1] is 0, and the kernel reads no weight.
    """
    batch, groups, width = means.shape
    if means.dtype == torch.float32 or batch * groups > MOST:
        pooled = F.linear(means, w1, b1)
        pooled = pooled if wu is None else activation_named(activation)(pooled) * F.linear(means, wu, bu)
        return pooled.float() if kept is None else torch.where(kept[0][1] != 0, pooled.float(), kept[1])
    w1, wu = inner_contiguous(w1), None if wu is None else inner_contiguous(wu)
    b1, bu = (None if b is None else inner_contiguous(b) for b in (b1, bu))
    out = torch.empty(batch, groups, w1.shape[0], dtype=torch.float32, device=means.device)
    rows = tuning.padded(batch * groups)
    tile = tuning.means_tile(rows, means.element_size(), tuning.device_of(means))
    _first_product[(triton.cdiv(w1.shape[0], tile.columns),)](
        means, w1, b1, wu, bu, *(kept or (None, None)), out, w1.stride(0), 0 if wu is None else wu.stride(0),
        batch * groups, width, w1.shape[0], ACTIVATION=activation, ROWS=rows, NEURONS=tile.columns, DEPTH=tile.depth,
        EVEN=width % tile.depth == 0, **tile.launch,
    )  # fmt: skip
    return out


@triton.jit
def _first_product(
    means, w1, b1, wu, bu, clock, mean, out, w1_f, wu_f, rows, width, neurons,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, NEURONS: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """NEURONS neurons of all rows."""
    number = tl.program_id(0) * NEURONS + tl.arange(0, NEURONS)
    row = tl.arange(0, ROWS)
    mask = (number < neurons)[:, None] & (row < rows)[None, :]
    place = row[None, :] * neurons + number[:, None]
    if clock is not None:
        keeps = tl.load(clock + 1) == 0
        if keeps:
            tl.store(out + place, tl.load(mean + place, mask=mask), mask=mask)
            return
    neuron = tl.where(number < neurons, number, 0).to(tl.int64)
    c = tl.arange(0, DEPTH)
    lines = means + tl.where(row < rows, row, 0)[:, None] * width + c[None, :]
    value = linear(lines, w1, b1, w1_f, neuron, c, width, ROWS, NEURONS, DEPTH, EVEN)
    if wu is not None:
        value = activate(value, ACTIVATION) * linear(lines, wu, bu, wu_f, neuron, c, width, ROWS, NEURONS, DEPTH, EVEN)
    tl.store(out + place, value, mask=mask)
