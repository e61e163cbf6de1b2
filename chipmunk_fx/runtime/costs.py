"""What a sparse step and a refresh cost as a share of a dense one, between sizes and densities that were measured."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import log


@dataclass(frozen=True)
class Cost:
    """At so many rows: a sparse step takes `slowness` x density of a dense one, a refresh 1 + `extra` and a sparse step."""

    rows: int
    slowness: float
    extra: float

    def steps(self, density: float, refresh_every: int) -> float:
        """Mean cost of a step over that of a dense one."""
        return self.slowness * density + (1 + self.extra) / refresh_every


# H200, Triton 3.6, bf16, heads of 128, mass_stride 4, beside cuDNN. Kernel times in ms for dense, sparse, masses, selection:
# 24 heads of 4352 rows, density 0.29, inside FLUX: 0.39, 0.345, 0.089, 0.103; 40 heads of 75600 rows, density 0.07: 206, 21.5,
# 32.5, 17.1; 24 heads of 119056 rows, density 0.07: 311, 29.9, 50.2, 28.
CUDA_ATTENTION = (Cost(4352, 3.05, 0.49), Cost(75600, 1.47, 0.24), Cost(119056, 1.42, 0.25))

# The same with groups of 192 rows and the kernel of kernels/hopper, lists unpacked at each step. Inside FLUX, density 0.28: 0.37,
# 0.155, 0.104, 0.032; 40 heads of 75600 rows, density 0.07: 203, 14.5, 30.8, 5.5; 24 heads of 119056 rows: 308, 20.5, and masses
# and selection that grow with rows times keys. Slowness of the two long ones: at density 0.5, H100, 8 heads of 65536 and 131072
# rows, dense and sparse 28.0 and 14.9, 112 and 62.
CUDA_ATTENTION_HOPPER = (Cost(4352, 1.50, 0.37), Cost(75600, 1.07, 0.18), Cost(119056, 1.10, 0.20))

# Without what launching costs: H100, 24 heads of 2048 rows, replayed: dense 0.087, refresh 0.16; sparse 0.033, 0.045 and 0.065 at
# densities 0.125, 0.25 and 0.5.
CUDA_ATTENTION_RECORDED = (Cost(2048, 2.1, 0.6), *CUDA_ATTENTION_HOPPER)


def at(rows: int, measured: tuple[Cost, ...] = CUDA_ATTENTION) -> Cost:
    """Between neighbours on a logarithmic scale of rows; beyond the ends, the end."""
    if rows <= measured[0].rows:
        return measured[0]
    for low, high in pairwise(measured):
        if rows <= high.rows:
            part = log(rows / low.rows) / log(high.rows / low.rows)
            return Cost(
                rows, low.slowness + part * (high.slowness - low.slowness), low.extra + part * (high.extra - low.extra)
            )
    return measured[-1]


# How much faster Hopper makes both products in fp8. H100, 4352 rows, 3712 of 12288 neurons, us: 178 and 182 in bf16, 116 and 134
# in fp8, and 11 to round x.
FP8_GAIN = 1.38


@dataclass(frozen=True)
class MlpCost:
    """As shares of a dense MLP: a refresh, and a sparse step, which takes `fixed` + `slowness` x density, in fp8 less."""

    refresh: float
    fixed: float
    slowness: float

    def steps(self, density: float, refresh_every: int, in_fp8: bool = False) -> float:
        """Mean cost of a step over that of a dense one."""
        sparse = self.fixed + self.slowness * density / (FP8_GAIN if in_fp8 else 1)
        return (self.refresh + (refresh_every - 1) * sparse) / refresh_every


# H200, bf16, groups of 192 rows, 4352 rows, 3072 to 12288 to 3072, ms: dense 1.02, refresh 1.30; sparse 0.52 at density 0.30,
# 0.35 at 0.17; inside FLUX 0.57 at 0.35. Slowness as with 65536 rows, where it is highest: H100, dense 14.5, sparse 2.3 at 0.03,
# 12.2 at 0.5.
CUDA_MLP_HOPPER = MlpCost(refresh=1.3, fixed=0.15, slowness=1.45)

# Without what launching costs: H100, 2048 rows, replayed: dense 0.44, refresh 0.59; sparse 0.15, 0.27 and 0.38 at densities 0.03,
# 0.25 and 0.5.
CUDA_MLP_RECORDED = MlpCost(refresh=1.34, fixed=0.28, slowness=1.45)
