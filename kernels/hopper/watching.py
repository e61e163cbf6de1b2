"""The watch over what a sparse MLP step adds to, at every step: a kernel that costs the host less to launch than Triton's."""

import ctypes
from ctypes import c_int, c_longlong, c_void_p
from pathlib import Path

from torch import Tensor

from chipmunk_fx.kernels.hopper import nvrtc
from chipmunk_fx.kernels.hopper.tuning import WatchSettings
from chipmunk_fx.kernels.triton.launching import on_device_of

SETTINGS = WatchSettings()
PIECE = 4  # values that a thread reads at once


class Problem(ctypes.Structure):
    """The kernel's parameter; watch.cu says what its fields mean."""

    _fields_ = [
        ("cache", c_void_p),
        ("broken", c_void_p),
        ("pieces", c_longlong),
        ("columns", c_int),
        ("width", c_int),
    ]


def watch(cache: Tensor, broken: Tensor, columns: int) -> None:
    """As `chipmunk_fx.ops.transfer.cache_watch`, for what `suits`."""
    width = cache.shape[-1]
    columns = min(columns, width)
    pieces = cache.numel() // width * columns // PIECE
    problem = Problem(cache.data_ptr(), broken.data_ptr(), pieces, columns // PIECE, width // PIECE)
    with on_device_of(cache):
        kernel = nvrtc.kernel("watch", source, cache.device.index, SETTINGS, resident=SETTINGS.blocks)
        kernel.launch(-(-pieces // SETTINGS.threads), problem, cache.device)


def suits(cache: Tensor, columns: int) -> bool:
    """Whether rows begin where a thread can read, and what is watched of them ends so."""
    width = cache.shape[-1]
    return width % PIECE == 0 and min(columns, width) % PIECE == 0 and cache.data_ptr() % 16 == 0


def source(settings: WatchSettings) -> str:
    """The whole of the CUDA C++."""
    return f"constexpr int THREADS = {settings.threads};\n" + (Path(__file__).parent / "watch.cu").read_text()
