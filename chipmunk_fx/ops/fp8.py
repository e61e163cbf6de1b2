"""Products in fp8: numbers of three bits after the point (float8_e4m3fn), one scale for a weight, one for each row of x and one
for what hidden values change by.

Whatever is not finite stays visible: inf makes its scale inf, so that all that comes of its row (its weight) is nan.
"""

import torch
from torch import Tensor

DTYPE = torch.float8_e4m3fn
LARGEST = torch.finfo(DTYPE).max  # 448


def scale_for(largest: Tensor) -> Tensor:
    """The fp32 scale under which numbers up to `largest` in size fill the range; 1 where that would be 0."""
    scale = largest.float() * (1 / LARGEST)
    return scale.masked_fill(scale == 0, 1.0)


def rounded(values: Tensor, scale: Tensor) -> Tensor:
    """values / scale in e4m3, the nearest there is, ties to even."""
    return (values.float() / scale).clamp_(-LARGEST, LARGEST).to(DTYPE)


def store_weights(w1: Tensor, wu: Tensor | None, w2: Tensor, w1_fp8: Tensor, by_neuron: Tensor, scales: Tensor) -> None:
    """Round the weights w1, wu [F, C] and w2 [C2, F] into w1_fp8 [P, F, C] and by_neuron [F, C2]; scales [P + 1] of each."""
    parts = (w1,) if wu is None else (w1, wu)
    for weight, kept, scale in zip((*parts, w2.mT), (*w1_fp8, by_neuron), scales, strict=True):
        scale.copy_(scale_for(weight.abs().amax()))
        kept.copy_(rounded(weight, scale))


def scale_of_changes(largest: Tensor) -> Tensor:
    """Of what hidden values, up to `largest` in size at a refresh, change by: room for twice as much."""
    return scale_for(2 * largest)


def added(change: Tensor, by_neuron: Tensor, scale: Tensor, change_scale: Tensor, chosen: Tensor) -> Tensor:
    """What the changes [g, K, R] of the neurons chosen [g, K] add to the result, in their dtype: [g, R, C2].

    by_neuron [F, C2] in e4m3 with its scale; change_scale [1]: of changes.
    """
    change = change + (change - change)  # inf, which rounding would take for the largest number, is nan
    values = torch.bmm(rounded(change, change_scale).float().mT, _gathered(by_neuron, chosen))
    return values.mul_(scale * change_scale).to(change.dtype)


def product(weight: Tensor, scale: Tensor, bias: Tensor | None, rows: Tensor, chosen: Tensor) -> Tensor:
    """The neurons chosen [g, K] of rows [g, R, C] in rows' dtype, neuron by neuron: [g, K, R].

    weight [F, C] in e4m3 with its scale; bias [F]. What hardware sums up in fp32 is emulated by a product in fp32.
    """
    row_scale = scale_for(rows.abs().amax(-1, keepdim=True))
    values = torch.bmm(_gathered(weight, chosen), rounded(rows, row_scale).float().mT).mul_(row_scale.mT * scale)
    if bias is not None:
        values += bias.index_select(0, chosen.reshape(-1)).view(*chosen.shape, 1)
    return values.to(rows.dtype)


def _gathered(weight: Tensor, chosen: Tensor) -> Tensor:
    """Rows of weight [F, C] in e4m3 as fp32 [*chosen, C]."""
    bits = weight.view(torch.uint8).index_select(0, chosen.reshape(-1))  # not every device gathers e4m3
    return bits.view(DTYPE).float().view(*chosen.shape, -1)
