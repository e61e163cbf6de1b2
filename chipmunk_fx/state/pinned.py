"""Page-locked host memory of the size that is asked for.

PyTorch's allocator of it rounds up to a power of two: the caches of a HunyuanVideo, 55 GB, take 83.
"""

import math
import mmap
import weakref
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

_KINDS = ("MAP_PRIVATE", "MAP_ANONYMOUS")  # not on Windows


def pinned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that `device` copies to and from beside other work. Freed with the tensor, once copies under way are done."""
    count = math.prod(shape)
    if count and all(hasattr(mmap, kind) for kind in _KINDS):
        memory = _pages(count * dtype.itemsize)
        view = memoryview(memory)
        flat = torch.frombuffer(view, dtype=dtype, count=count)
        if _register(flat.data_ptr(), view, memory, device):
            return flat.view(shape)
    return torch.zeros(shape, dtype=dtype, device="cpu", pin_memory=True)


def _pages(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)  # faster to lock
    return memory


def _register(pointer: int, view: memoryview, memory: mmap.mmap, device: torch.device) -> bool:
    """Lock the pages for the driver until `view` of them goes, and then unmap them; false where it refuses."""
    driver: Any = torch.cuda.cudart()
    if int(driver.cudaHostRegister(pointer, len(memory), 0)) != 0:
        with suppress(RuntimeError):  # what was refused is CUDA's last error until the next launch has raised it
            torch.zeros(1, device=device)
        return False
    weakref.finalize(view, _release, driver, pointer, memory, device).atexit = False
    return True


def _release(driver: Any, pointer: int, memory: mmap.mmap, device: torch.device) -> None:
    """`memory` is held until here: pages are unmapped after they are unlocked."""
    torch.cuda.synchronize(device)
    driver.cudaHostUnregister(pointer)
