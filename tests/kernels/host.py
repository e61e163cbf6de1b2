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
from chipmunk_fx.kernels.hopper.tuning import PackSettings

COMPILER = shutil.which("g++")
CLUSTERS = 2  # of a grid: fewer than there are groups, so that one takes several
LAUNCH = """
static const Problem *problem;
static void work() {
    Shared &shared = *(Shared *)memories[rank_in_cluster()].data();
    for (int list = blockIdx.x / CLUSTER; list < problem->tiles; list += gridDim.x / CLUSTER) pack_group(*problem, list, shared);
}
extern "C" void launch(const Problem *p, int blocks) {
    problem = p;
    run_grid(blocks, sizeof(Shared), work);
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
    name: str, source: Any, device: Any, settings: PackSettings, cluster: int = 1, resident: int = 1
) -> HostKernel:
    """In place of `nvrtc.kernel`, for pack.cu."""
    return HostKernel(library(settings), cluster)


@cache
def library(settings: PackSettings) -> ctypes.CDLL:
    """Also `unequal`."""
    sizes = (f"constexpr int {name.upper()} = {value};" for name, value in packing.constants(settings).items())
    parts = (Path(__file__).with_name("host.hpp"), Path(hopper.__file__).with_name("pack.cu"))
    source = "\n".join([*sizes, *(part.read_text() for part in parts), LAUNCH])
    with TemporaryDirectory() as folder:
        built = Path(folder) / "pack.so"
        options = ["-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-w"]
        options += ["-DHALF"] if settings.element == "f16" else []
        subprocess.run([str(COMPILER), *options, "-x", "c++", "-", "-o", built], input=source, text=True, check=True)
        return ctypes.CDLL(str(built))
