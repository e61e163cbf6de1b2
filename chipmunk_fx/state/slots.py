"""What one site keeps between steps: the tensors the ops read and write, by name, shape and size."""

import math
from dataclasses import dataclass

import torch

from chipmunk_fx.ops.fp8 import DTYPE as FP8
from chipmunk_fx.ops.packing import smallest

SMALL = 8  # lists that take up to this part of the rest are kept as they are


@dataclass(frozen=True)
class Slot:
    """One cached tensor. Contiguous, uninitialised until a refresh has written it. `shared`: the same for all branches."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    shared: bool = False

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def columns(total: int, density: float, random_density: float = 0.0, always: int = 0, tile: int = 1) -> int:
    """How many of `total` columns (keys, neurons) one group computes on a sparse step.

    The share `density` by mass, the share `random_density` at random and `always` fixed ones, each rounded up and
    together up to a multiple of `tile`; at most all of them.
    """
    count = _share(total, density) + _share(total, random_density) + always
    return min(math.ceil(count / tile) * tile, total)


def attention_slots(
    batch: int,
    heads: int,
    rows: int,
    keys: int,
    width: int,
    dtype: torch.dtype,
    *,
    grouped_rows: int | None = None,
    group_rows: int,
    columns: int,
    device: str = "cpu",
    keeps_lse: bool = False,
) -> tuple[Slot, ...]:
    """rest, share and lists of an attention site, and lse where it `keeps_lse`. `grouped_rows`: those that the order names, all
    by default.

    device: the type of that which computes. Lists are packed there, but not on a GPU where they are small beside the rest: to
    unpack them takes a tenth of a short sparse step. Those of an MLP, one for all heads, are always small.
    """
    grouped = rows if grouped_rows is None else grouped_rows
    lists = batch, heads, math.ceil(grouped / group_rows), min(columns, keys)
    rest = Slot("rest", (batch, heads, rows, width), dtype)
    kept = Slot("lists", lists, torch.int32)
    if device != "cuda" or kept.bytes > rest.bytes // SMALL:
        kept = Slot("lists", *smallest(lists, keys, device))
    share, lse = (Slot(name, (batch, heads, rows), torch.float32) for name in ("share", "lse"))
    return (rest, share, kept, lse) if keeps_lse else (rest, share, kept)


def mlp_slots(
    batch: int,
    rows: int,
    neurons: int,
    width: int,
    dtype: torch.dtype,
    *,
    group_rows: int,
    columns: int,
    fp8: tuple[int, int] | None = None,
) -> tuple[Slot, ...]:
    """hidden, out, mean, lists and by_neuron of an MLP site; `width` is that of its result.

    fp8: number and width of the first product's weights that are kept in it, w1_fp8, with w2 and all scales; None: none are.
    """
    groups = math.ceil(rows / group_rows)
    slots = (
        Slot("hidden", (batch, groups, neurons, group_rows), dtype),
        Slot("out", (batch, rows, width), torch.float32),
        Slot("mean", (batch, groups, neurons), torch.float32),
        Slot("lists", (batch, groups, min(columns, neurons)), torch.int32),
        Slot("by_neuron", (neurons, width), dtype if fp8 is None else FP8, shared=True),
    )
    if fp8 is None:
        return slots
    weights, inner = fp8
    return (
        *slots,
        Slot("w1_fp8", (weights, neurons, inner), FP8, shared=True),
        Slot("scales", (weights + 1,), torch.float32, shared=True),
        Slot("change_scale", (1,), torch.float32),
    )


def _share(total: int, density: float) -> int:
    # 0.1 * 30 is a hair above 3 in binary
    return math.ceil(density * total - 1e-9)
