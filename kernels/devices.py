"""What a CUDA device is, asked once: every call of an operator depends on it."""

from functools import cache

import torch


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Its compute capability."""
    return torch.cuda.get_device_capability(device)


@cache
def units(device: torch.device) -> int:
    """Its multiprocessors."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def multiplies_bf16(device: torch.device) -> bool:
    """Whether it has products in bf16."""
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)
