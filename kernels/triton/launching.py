"""What every operator does before its kernels."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def on_device_of(x: Tensor) -> AbstractContextManager:
    """Kernels go to the current device: make it that of x."""
    there = not x.is_cuda or x.device.index == torch.cuda.current_device()
    return nullcontext() if there else torch.cuda.device(x.device)


def inner_contiguous(x: Tensor) -> Tensor:
    """x, copied where its last dimension is strided."""
    return x if x.stride(-1) == 1 else x.contiguous()


def copyable(x: Tensor) -> Tensor:
    """x, copied where its lines cannot be read 16 bytes at a time, or lie further apart than 32 bits tell."""
    strides = [stride * x.element_size() for stride in x.stride()[:-1]]
    aligned = x.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in strides)
    fits = aligned and strides[-1] < 1 << 32 and x.stride(-1) == 1
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def seeds(seed: int, site: int) -> tuple[int, int]:
    """Of random draws, as 31 bits each."""
    return (seed ^ 0x5BD1E995) & 0x7FFFFFFF, site & 0x7FFFFFFF
