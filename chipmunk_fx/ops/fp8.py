"""Products in fp8: numbers of three bits after the point (float8_e4m3fn), one scale for a weight and one for each row of x.

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


def store_weights(w1: Tensor, wu: Tensor | None, w1_fp8: Tensor, scales: Tensor) -> None:
    """Round the weights [F, C] of the first product, one scale each, into w1_fp8 [P, F, C] and scales [P]."""
    for part, weight in enumerate((w1,) if wu is None else (w1, wu)):
        scales[part] = scale_for(weight.abs().amax())
        w1_fp8[part] = rounded(weight, scales[part])


def product(weight: Tensor, scale: Tensor, bias: Tensor | None, rows: Tensor, chosen: Tensor) -> Tensor:
    """The neurons chosen [g, K] of rows [g, R, C] in rows' dtype, neuron by neuron: [g, K, R].

    weight [F, C] in e4m3 with its scale; bias [F]. What hardware sums up in fp32 is emulated by a product in fp32.
    """
    flat = chosen.reshape(-1)
    bits = weight.view(torch.uint8).index_select(0, flat)  # not every device gathers e4m3
    gathered = bits.view(DTYPE).float().view(*chosen.shape, -1)
    row_scale = scale_for(rows.abs().amax(-1, keepdim=True))
    values = torch.bmm(gathered, rounded(rows, row_scale).float().mT).mul_(row_scale.mT * scale)
    if bias is not None:
        values += bias.index_select(0, flat).view(*chosen.shape, 1)
    return values.to(rows.dtype)
