"""Softmax attention over all given keys, with the logarithm of each row's denominator.

The fused kernels of PyTorch compute that logarithm anyway; the public scaled_dot_product_attention only hides it.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.backends.cuda import (
    SDPAParams,
    can_use_cudnn_attention,
    can_use_efficient_attention,
    can_use_flash_attention,
)

_SCORE_BYTES = 1 << 28  # of fp32 scores held at once where no fused kernel takes the call
_EFFICIENT_ROWS = 32  # the memory-efficient kernel pads its log denominators to this many rows

Attend = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v as [B, H, N, D] in q's dtype, and its log denominators as fp32 [B, H, N].

    q [B, H, N, D], k and v [B, H, M, D], any strides. The result may have any strides, and is never an alias.
    """
    q, k, v = (_inner_contiguous(x) for x in (q, k, v))
    return _kernel(q, k, v)(q, k, v, scale)


def _inner_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _kernel(q: Tensor, k: Tensor, v: Tensor) -> Attend:
    """The best of the kernels that take this call, within what torch.nn.attention.sdpa_kernel allows."""
    if q.device.type == "cpu":
        return cpu
    if q.device.type != "cuda":
        return rows_at_a_time
    params = SDPAParams(q, k, v, None, 0.0, False, False)
    whole_lines = q.shape[-1] % 8 == 0  # the operators below do not pad the head width, the public function does
    # cuDNN leads from Hopper on; before, its graphs cost more than they save
    if whole_lines and torch.cuda.get_device_capability(q.device)[0] >= 9 and can_use_cudnn_attention(params):
        return cudnn
    if whole_lines and can_use_flash_attention(params):
        return flash
    if whole_lines and can_use_efficient_attention(params):
        return efficient
    return rows_at_a_time


def cpu(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)


def flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[:2]
    return out, lse


def cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, scale=scale)[:2]
    return out, lse.reshape(q.shape[:-1])


def efficient(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, scale=scale)[:2]
    assert 0 <= lse.shape[-1] - q.shape[-2] < _EFFICIENT_ROWS
    return out, lse[..., : q.shape[-2]]


def rows_at_a_time(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The formula in plain operators, so many rows at a time that the scores stay within a fixed size."""
    batch, heads, rows, _ = q.shape
    out, lse = torch.empty_like(q), q.new_empty(batch, heads, rows, dtype=torch.float32)
    step = max(1, _SCORE_BYTES // (4 * batch * heads * k.shape[2]))
    for first in range(0, rows, step):
        part = slice(first, first + step)
        scores = (q[:, :, part] @ k.mT).float().mul_(scale)
        lse[:, :, part] = scores.logsumexp(-1)
        out[:, :, part] = scores.softmax(-1).to(v.dtype) @ v
    return out, lse
