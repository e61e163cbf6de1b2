"""Norm and rotary position embedding of queries or keys in plain PyTorch: the meaning of the operator, and what a CPU runs.

RMSNorm: arXiv 1910.07467, equation 4. Rotary position embedding: arXiv 2104.09864, equation 34.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def rotary(
    parts: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    cos: Sequence[Tensor | None],
    sin: Sequence[Tensor | None],
    *,
    eps: float,
    dim: int,
    paired: bool,
) -> Tensor:
    """The parts joined along `dim`, 1 or 2, each normed where it has a weight, then rotated where it has cos and sin.

    normed = x / sqrt(mean(x^2) + eps) weight, over each head, or over all heads of a token where weight has a value for
    each of their columns; rotated = x cos + turned(x) sin, where turned(x) has -b, a in place of a, b: neighbours 2i, 2i + 1
    where `paired`, else i and i + D/2.

    parts [B, N, H, D] (dim 1) or [B, H, N, D] (dim 2); weights [D] or [H D]; cos, sin broadcast to their part, or both have
    D/2 columns, one for each a and b. Computed in fp32 at least. Returns the parts' dtype over contiguous [B, N, H, D].
    """
    done = [_part(*each, eps, dim, paired) for each in zip(parts, weights, cos, sin, strict=True)]
    out = empty(parts, dim)
    torch.cat(done, dim, out=out)
    return out


def empty(parts: Sequence[Tensor], dim: int) -> Tensor:
    """For the result."""
    sizes = list(parts[0].shape)
    sizes[dim] = sum(part.shape[dim] for part in parts)
    if dim == 1:
        return parts[0].new_empty(sizes)
    batch, heads, rows, width = sizes
    return parts[0].new_empty(batch, rows, heads, width).transpose(1, 2)


def over_heads(x: Tensor, weight: Tensor) -> bool:
    """Whether the mean is over all heads of a token."""
    return len(weight) != x.shape[-1]


def _part(
    x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float, dim: int, paired: bool
) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if weight is not None:
        wide = _normed(wide, weight, eps, dim)
    if cos is not None and sin is not None:
        wide = wide * _each(cos, x, paired) + _turned(wide, paired) * _each(sin, x, paired)
    return wide.to(x.dtype)


def _normed(x: Tensor, weight: Tensor, eps: float, dim: int) -> Tensor:
    if not over_heads(x, weight):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
    each = weight.unflatten(0, (-1, x.shape[-1]))
    return x * torch.rsqrt(x.square().mean((3 - dim, -1), keepdim=True) + eps) * (each if dim == 1 else each[:, None])


def _each(angles: Tensor, x: Tensor, paired: bool) -> Tensor:
    """The angles of all columns."""
    if 2 * angles.shape[-1] != x.shape[-1]:
        return angles
    return angles.repeat_interleave(2, -1) if paired else torch.cat((angles, angles), -1)


def _turned(x: Tensor, paired: bool) -> Tensor:
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1) if paired else x.unflatten(-1, (2, -1)).unbind(-2)
    return torch.stack((-b, a), -1).flatten(-2) if paired else torch.cat((-b, a), -1)
