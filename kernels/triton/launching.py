"""What every operator does before its kernels."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def on_device_of(x: Tensor) -> AbstractContextManager:
    """Kernels go to the current device: make it that of x."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def inner_contiguous(x: Tensor) -> Tensor:
    """x, copied where its last dimension is strided."""
    return x if x.stride(-1) == 1 else x.contiguous()
