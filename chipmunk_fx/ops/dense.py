"""Softmax attention over all given keys, with the logarithm of each row's denominator.

The fused kernels of PyTorch compute that logarithm anyway; the public scaled_dot_product_attention only hides it.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.backends.cuda import (
    SDPAParams,
    can_use_cudnn_attention,
    can_use_efficient_attention,
    can_use_flash_attention,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

from chipmunk_fx.ops import flash4

_SCORE_BYTES = 1 << 28  # of fp32 scores held at once where no fused kernel takes the call
_EFFICIENT_ROWS = 32  # the memory-efficient kernel pads its log denominators to this many rows
_EFFICIENT_COLUMNS = 16  # and wants lines of an additive mask to begin at multiples of so many values

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], tuple[Tensor, Tensor]]


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, valid: Tensor | None = None, sdpa: str = ""
) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v as [B, H, N, D] in q's dtype, and its log denominators as fp32 [B, H, N].

    q [B, H, N, D], k and v [B, Hk, M, D] with H a multiple of Hk, any strides. valid: bool [B, M], keys to attend to.
    sdpa: "" or names of `torch.nn.attention.SDPBackend` joined by commas, of which one is to be used. The result may have
    any strides, and is never an alias. Where an entry has no valid key, its rows are 0 and their denominators' logarithms
    -inf.
    """
    if not k.shape[2]:
        return torch.zeros_like(q), q.new_full(q.shape[:-1], -torch.inf, dtype=torch.float32)
    q, k, v = (_inner_contiguous(x) for x in (q, k, v))
    with _only(sdpa):
        if flash4.takes(q, k, valid):
            return flash4.attend(q, k, v, scale)
        chosen = _kernel(q, k, v, valid)
    if chosen is not rows_at_a_time:
        k, v = (ungrouped(x, q.shape[1]) for x in (k, v))
    out, lse = chosen(q, k, v, valid, scale)
    if valid is None:
        return out, lse
    empty = ~valid.any(-1).view(-1, 1, 1)
    return out.masked_fill(empty.unsqueeze(-1), 0), lse.masked_fill(empty, -torch.inf)


def left_open(sdpa: str) -> bool:
    """Whether the user, by `sdpa` or all round, leaves open which of PyTorch's kernels for Hopper is used."""
    with _only(sdpa):
        return torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.cudnn_sdp_enabled()


def ungrouped(x: Tensor, heads: int) -> Tensor:
    """[B, Hk, M, D] as [B, H, M, D]: every key head repeated for the query heads that read it."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _inner_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _only(sdpa: str) -> AbstractContextManager:
    return sdpa_kernel([getattr(SDPBackend, name) for name in sdpa.split(",")]) if sdpa else nullcontext()


def _kernel(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Attend:
    """The best of PyTorch's kernels that take this call, within what torch.nn.attention.sdpa_kernel allows."""
    if q.device.type == "cpu":
        return cpu
    if q.device.type != "cuda":
        return rows_at_a_time
    k, v = (x[:, :1].expand(-1, q.shape[1], -1, -1) for x in (k, v))  # heads are repeated before the call
    params = SDPAParams(q, k, v, None, 0.0, False, False)
    whole_lines = q.shape[-1] % 8 == 0  # the operators below do not pad the head width, the public function does
    # cuDNN leads from Hopper on; before, its graphs cost more than they save
    hopper = torch.cuda.get_device_capability(q.device)[0] >= 9
    if valid is None and whole_lines and hopper and can_use_cudnn_attention(params):
        return cudnn
    if valid is None and whole_lines and can_use_flash_attention(params):
        return flash
    if whole_lines and can_use_efficient_attention(params):
        return efficient
    return rows_at_a_time


def cpu(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    mask = None if valid is None else _additive(valid, q)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask, scale=scale)


def flash(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    assert valid is None
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[:2]
    return out, lse


def cudnn(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    assert valid is None
    out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, scale=scale)[:2]
    return out, lse.reshape(q.shape[:-1])


def efficient(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    mask = None if valid is None else _additive(valid, q)
    out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, mask, True, scale=scale)[:2]
    assert 0 <= lse.shape[-1] - q.shape[-2] < _EFFICIENT_ROWS
    return out, lse[..., : q.shape[-2]]


def rows_at_a_time(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """The formula in plain operators, so many rows at a time that the scores stay within a fixed size."""
    batch, heads, rows, _ = q.shape
    k, v = (ungrouped(x, heads) for x in (k, v))
    out, lse = torch.empty_like(q), q.new_empty(batch, heads, rows, dtype=torch.float32)
    step = max(1, _SCORE_BYTES // (4 * batch * heads * k.shape[2]))
    for first in range(0, rows, step):
        part = slice(first, first + step)
        scores = (q[:, :, part] @ k.mT).float().mul_(scale)
        if valid is not None:
            scores.masked_fill_(~valid[:, None, None], -torch.inf)
        lse[:, :, part] = scores.logsumexp(-1)
        out[:, :, part] = scores.softmax(-1).to(v.dtype) @ v
    return out, lse


def _additive(valid: Tensor, q: Tensor) -> Tensor:
    """0 for valid keys and -inf for others, [B, H, N, M] in q's dtype, one line of memory a batch entry."""
    batch, keys = valid.shape
    lines = q.new_zeros(batch, -(-keys // _EFFICIENT_COLUMNS) * _EFFICIENT_COLUMNS)[:, :keys]
    lines.masked_fill_(~valid, -torch.inf)
    return lines[:, None, None].expand(*q.shape[:-1], keys)
