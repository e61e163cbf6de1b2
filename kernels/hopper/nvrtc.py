"""CUDA C++ compiled at run time: NVRTC and the driver through ctypes, as torch brings them. Nothing loads on import."""

import ctypes
from collections.abc import Callable
from ctypes import byref, c_char_p, c_int, c_size_t, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from chipmunk_fx.kernels import devices
from chipmunk_fx.kernels.hopper.tuning import Block, PackSettings, SelectSettings, WatchSettings
from chipmunk_fx.log import logger

ARCHITECTURE = "sm_90a"
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


class CudaError(RuntimeError):
    """NVRTC or the driver refused."""


@cache
def library() -> ctypes.CDLL | None:
    """NVRTC of the CUDA version that torch was built for, of any where that is none; None where it is not there."""
    major = (torch.version.cuda or "*").split(".")[0]
    packages = Path(torch.__file__).parent.parent
    for path in [*sorted(packages.glob(f"nvidia/*/lib/libnvrtc.so.{major}")), Path(f"libnvrtc.so.{major}")]:
        try:
            for builtins in path.parent.glob("libnvrtc-builtins.so.*"):  # NVRTC looks for it by name alone
                ctypes.CDLL(str(builtins))
            return ctypes.CDLL(str(path))
        except OSError:
            continue
    return None


def compiled(source: str, architecture: str) -> bytes:
    """The machine code (cubin) of `source` for `architecture`, such as "sm_90a"; the compiler's remarks are logged."""
    nvrtc = library()
    if nvrtc is None:
        raise CudaError("libnvrtc was not found; it comes with torch as nvidia-cuda-nvrtc")
    program = c_void_p()
    check(nvrtc.nvrtcCreateProgram(byref(program), source.encode(), b"chipmunk.cu", 0, None, None), "creating")
    try:
        target = f"--gpu-architecture={architecture}".encode()
        options = (c_char_p * 3)(target, b"--std=c++17", b"--ptxas-options=--verbose")
        failed = nvrtc.nvrtcCompileProgram(program, len(options), options)
        remarks = _text(nvrtc, program)
        if failed:
            raise CudaError(f"NVRTC does not compile for {architecture}:\n{remarks}")
        logger().debug("NVRTC, %s: %s", architecture, remarks)
        size = c_size_t()
        check(nvrtc.nvrtcGetCUBINSize(program, byref(size)), "reading")
        code = ctypes.create_string_buffer(size.value)
        check(nvrtc.nvrtcGetCUBIN(program, code), "reading")
        return code.raw
    finally:
        nvrtc.nvrtcDestroyProgram(byref(program))


def _text(nvrtc: ctypes.CDLL, program: c_void_p) -> str:
    size = c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    return log.value.decode()


@dataclass(frozen=True)
class Kernel:
    """A loaded function; `module` keeps its code on the device of the context that was current when it was loaded.

    threads, shared (bytes): of a block; cluster: blocks that work on a tile, as the function says itself; resident: clusters
    that share a multiprocessor.
    """

    module: c_void_p
    function: c_void_p
    threads: int
    shared: int
    cluster: int
    resident: int

    def launch(self, tiles: int, problem: ctypes.Structure, device: torch.device) -> None:
        """Runs a cluster for each of `tiles`, at most those that are resident, on the current stream; `problem` by value."""
        blocks = min(tiles, devices.units(device) // self.cluster * self.resident) * self.cluster
        stream = torch._C._cuda_getCurrentRawStream(device.index)  # what Inductor asks: no object is made of it
        pointers = (c_void_p * 1)(ctypes.addressof(problem))
        done = driver().cuLaunchKernel(
            self.function, blocks, 1, 1, self.threads, 1, 1, self.shared, c_void_p(stream), pointers, None
        )
        check(done, "launching")


@cache
def driver() -> ctypes.CDLL:
    """The CUDA driver."""
    return ctypes.CDLL("libcuda.so.1")


def load(code: bytes, name: str, threads: int, shared: int, cluster: int = 1, resident: int = 1) -> Kernel:
    """Function `name` of `code` on the current device. The rest: as of `Kernel`."""
    module, function = c_void_p(), c_void_p()
    check(driver().cuModuleLoadData(byref(module), code), "loading")
    check(driver().cuModuleGetFunction(byref(function), module, name.encode()), f"finding {name}")
    check(
        driver().cuFuncSetAttribute(function, c_int(_MAX_DYNAMIC_SHARED), c_int(shared)), f"{shared} bytes for {name}"
    )
    return Kernel(module, function, threads, shared, cluster, resident)


@cache
def kernel(
    name: str, source: Callable[..., str], device: int, settings: Block | SelectSettings | WatchSettings | PackSettings,
    *more: str, cluster: int = 1, resident: int = 1,
) -> Kernel:  # fmt: skip
    """Function `name` of source(settings, *more): compiled once a process, loaded once a device. The rest: as of `Kernel`."""
    return load(_code(source, settings, *more), name, settings.threads, settings.shared, cluster, resident)


@cache
def _code(source: Callable[..., str], *of: Any) -> bytes:
    return compiled(source(*of), ARCHITECTURE)


def check(result: int, doing: str) -> None:
    """Raises CudaError unless the result of NVRTC or the driver is 0."""
    if result:
        raise CudaError(f"CUDA error {result} while {doing}")
