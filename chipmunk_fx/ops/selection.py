"""Which columns a group computes: always-on ones, the largest scores, and a few drawn at random.

The random ones are stratified: the columns that were not picked, in order, are cut into as many runs of equal length
as there are draws, and each run gives one. So no column comes twice, every column has the same chance (up to the
rounding of a run's length), and a draw costs one hash of a counter instead of one for every column. The counter is
(seed, site, step, row of the score matrix, draw); no generator is read or advanced.
"""

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9


def random_count(total: int, random_density: float, columns: int) -> int:
    """How many of a list's `columns` out of `total` are drawn at random: ceil(random_density * total) at most."""
    return 0 if columns >= total else min(math.ceil(random_density * total - 1e-9), columns)


def select(
    scores: Tensor,
    columns: int,
    drawn: int,
    key: Tensor,
    always: Tensor | None = None,
    valid: Tensor | None = None,
    spare: Tensor | None = None,
) -> Tensor:
    """int32 [G, columns]: the columns of each row of `scores` to compute, ascending, none twice.

    scores  [G, M] floating point; larger is more wanted
    drawn   how many of `columns` are random, see `random_count`
    key     0-d int64 from `stream`, unlike for every call of a step
    always  bool [1 or G, M]: columns taken first; `columns - drawn` must not be less than their number
    valid   bool [M]: columns that may be taken; where they are fewer than `columns`, M fills the places left
    spare   int64 [1 or G] from `spare_places`: as many of the places by score hold M, in the last places
    """
    groups, total = scores.shape
    if columns >= total:
        every = torch.arange(total, dtype=torch.int32, device=scores.device)
        every = every if valid is None else every.masked_fill(~valid, total).sort().values
        return every.expand(groups, total)
    if always is not None:
        scores = scores.masked_fill(always, math.inf)
    if valid is not None:
        scores = scores.masked_fill(~valid, -math.inf)
    best = scores.topk(columns - drawn, dim=-1, sorted=spare is not None).indices
    if spare is not None:
        places = torch.arange(columns - drawn, 0, -1, device=scores.device)
        best = best.masked_fill(places <= spare.unsqueeze(1), total)
    if drawn:
        wide = torch.zeros(groups, total + 1, dtype=torch.bool, device=scores.device)
        taken = wide.scatter_(1, best, True)[:, :total]
        free: int | Tensor = total - columns + drawn + (0 if spare is None else spare.unsqueeze(1))
        if valid is not None:
            taken |= ~valid
            free = (free - total + valid.sum()).clamp(min=0)
        best = torch.cat([best, draw(taken, free, drawn, key)], dim=-1)
    if valid is not None:  # of too few valid columns, topk takes others too
        best = best.masked_fill(~torch.cat([valid, valid.new_ones(1)])[best], total)
    return best.int().sort(dim=-1).values


def spare_places(always: Tensor, valid: Tensor | None, columns: int) -> Tensor:
    """int64 [1 or B, 1 or G]: by how many always-on columns a group has fewer than the group of most.

    Its list of `columns` has as many places less, so that all groups take equally many by score; none where it holds all
    there are. always: bool [1 or G, M]; valid: bool [B, M].
    """
    fixed = always.sum(1).unsqueeze(0) if valid is None else (always.unsqueeze(0) & valid.unsqueeze(1)).sum(-1)
    spare = fixed.max() - fixed
    return spare if valid is None else spare.masked_fill(valid.sum(1).max() <= columns, 0)


def draw(taken: Tensor, free: int | Tensor, drawn: int, key: Tensor) -> Tensor:
    """int64 [G, drawn]: columns drawn from those not `taken` (bool [G, M], `free` False in each row), ascending.

    Where `free` is less than `drawn`, M stands in the places left.
    """
    (groups, total), device = taken.shape, taken.device
    edges = torch.arange(drawn + 1, device=device) * free // drawn
    low, width = edges[..., :-1], edges.diff()
    counter = torch.arange(groups * drawn, device=device).view(groups, drawn)
    rank = low + _mix(key ^ _mix(counter + _GOLDEN)) % width.clamp(min=1)
    # the r-th free column (from 0) is the first with r + 1 free ones up to and including itself
    found = torch.searchsorted((~taken).cumsum(-1, dtype=torch.int32), (rank + 1).int())
    return found.masked_fill(width == 0, total)


def stream(seed: int, site: int, step: Tensor) -> Tensor:
    """0-d int64 key of one site on one step (`step`: 0-d int64 on the device of the call)."""
    fixed = _mix((seed & _MASK) ^ _mix((site + _GOLDEN) & _MASK))
    return _mix(_mix((step + fixed) & _MASK) ^ fixed)


def substream(key: Tensor, index: int) -> Tensor:
    """0-d int64 key of one head or batch entry under the key of its site."""
    return _mix((key + _GOLDEN * (index + 1)) & _MASK)


def _mix(x):
    """The 32-bit finaliser of MurmurHash3 (A. Appleby, public domain), of an int or an int64 tensor in 32-bit range."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK
    return x ^ (x >> 16)
