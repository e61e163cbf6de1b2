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
# and selection that grow with rows times keys.
CUDA_ATTENTION_HOPPER = (Cost(4352, 1.50, 0.37), Cost(75600, 1.02, 0.18), Cost(119056, 0.98, 0.18))


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


@dataclass(frozen=True)
class MlpCost:
    """As shares of a dense MLP: a refresh, and a sparse step, which takes `fixed` + `slowness` x density."""

    refresh: float
    fixed: float
    slowness: float

    def steps(self, density: float, refresh_every: int) -> float:
        """Mean cost of a step over that of a dense one."""
        return (self.refresh + (refresh_every - 1) * (self.fixed + self.slowness * density)) / refresh_every


# H200, bf16, groups of 192 rows, 4352 rows, 3072 to 12288 to 3072, ms: dense 1.02, refresh 1.30; sparse 0.52 at density 0.30,
# 0.35 at 0.17; inside FLUX 0.57 at 0.35.
CUDA_MLP_HOPPER = MlpCost(refresh=1.3, fixed=0.15, slowness=1.25)
