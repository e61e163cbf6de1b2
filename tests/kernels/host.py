"""CUDA C++ of kernels/hopper on a CPU, compiled by the system's compiler."""

import ctypes
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from chipmunk_fx.kernels import hopper
from chipmunk_fx.kernels.hopper import packing
from chipmunk_fx.kernels.hopper.tuning import PackSettings, SelectSettings

COMPILER = shutil.which("g++")
CLUSTERS = 2  # of a grid: fewer than there are groups, so that one takes several
LAUNCH = """
static const Problem *problem;
static void work_in(Shared &);
static void work() { work_in(*(Shared *)memories[rank_in_cluster()].data()); }
extern "C" void launch(const Problem *p, int blocks) {
    problem = p;
    run_grid(blocks, sizeof(Shared), work);
}
"""
SELECT = "static void work_in(Shared &shared) { select(*problem, shared); }"
PACK = """
static void work_in(Shared &shared) {
    for (int list = blockIdx.x / CLUSTER; list < problem->tiles; list += gridDim.x / CLUSTER) pack_group(*problem, list, shared);
}
// Of bf16 with bits from `first` to before `last` as the largest of a row, and all smaller numbers: quotients that differ.
extern "C" int unequal(u32 first, u32 last) {
    int count = 0;
    for (u32 largest = first; largest < last; largest++) {
        const float product = __uint_as_float(largest << 16) * (1 / 448.0f), divisor = product == 0 ? 1 : product;
        const Scale scale(divisor);
        for (u32 bits = largest - min(largest, 24u << 7); bits <= largest; bits++) {
            const u32 quotient = rounded8(__uint_as_float(bits << 16) / divisor);
            count += (scale.under(make_uint4(bits, 0, 0, 0)).x & 255) != quotient;
        }
    }
    return count;
}
"""


@dataclass(frozen=True)
class HostKernel:
    """In place of `nvrtc.Kernel`."""

    library: ctypes.CDLL
    cluster: int

    def launch(self, tiles: int, problem: ctypes.Structure, device: Any) -> None:
        self.library.launch(ctypes.byref(problem), min(tiles, CLUSTERS) * self.cluster)


def kernel(
    name: str, source: Any, device: Any, settings: PackSettings | SelectSettings, *file: str, cluster: int = 1,
    resident: int = 1,
) -> HostKernel:  # fmt: skip
    """In place of `nvrtc.kernel`, for pack.cu, select.cu and neurons.cu."""
    return HostKernel(library(settings, *file), cluster)


@cache
def library(settings: PackSettings | SelectSettings, *file: str) -> ctypes.CDLL:
    """file: which of those that select; of pack.cu, which is meant without one, it has `unequal`, too."""
    packs = isinstance(settings, PackSettings)
    sizes = packing.constants(settings) if packs else {"threads": settings.threads, "cluster": settings.cluster}
    constants = (f"constexpr int {name.upper()} = {value};" for name, value in sizes.items())
    there = Path(hopper.__file__).parent
    files = [
        Path(__file__).with_name("host.hpp"),
        *(there / name for name in (("lists.cuh", *file) if file else ("pack.cu",))),
    ]
    source = "\n".join([*constants, *(part.read_text() for part in files), LAUNCH, PACK if packs else SELECT])
    with TemporaryDirectory() as folder:
        built = Path(folder) / "kernel.so"
        options = ["-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-w"]
        options += ["-DHALF"] if packs and settings.element == "f16" else []
        subprocess.run([str(COMPILER), *options, "-x", "c++", "-", "-o", built], input=source, text=True, check=True)
        return ctypes.CDLL(str(built))
