"""Whether a cache holds what can be built on: the operator cache_watch in one kernel."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from chipmunk_fx.kernels.triton.launching import on_device_of

VALUES = 8192  # of a program


def watch(cache: Tensor, broken: Tensor) -> None:
    """As `chipmunk_fx.ops.transfer.cache_watch`, for a contiguous cache."""
    with on_device_of(cache):
        grid = (triton.cdiv(cache.numel(), VALUES),)
        _watch[grid](cache, broken.view(torch.uint8), cache.numel(), VALUES=VALUES, num_warps=8)


@triton.jit
def _watch(cache, broken, total, VALUES: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * VALUES + tl.arange(0, VALUES)
    value = tl.load(cache + index, mask=index < total, other=0.0).to(tl.float32)
    finite = tl.abs(value) < float("inf")  # false for nan
    if tl.min(finite.to(tl.int32), 0) == 0:
        tl.store(broken, 1)
