"""What a pattern is, and what a match yields: operands that a rewrite can use without looking at the graph again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from chipmunk_fx.graph.columns import Columns
from chipmunk_fx.graph.language import Expression, Found, heads
from chipmunk_fx.graph.walk import is_used, mutated_between, shape


@dataclass(frozen=True)
class Part:
    """`node` narrowed to [start, stop) of dimension `dim`; the whole node where `dim` is None."""

    node: fx.Node
    dim: int | None = None
    start: int = 0
    stop: int = 0


@dataclass(frozen=True)
class Laid:
    """`node` with its dimensions permuted by `dims` (as torch.permute); as it is where `dims` is None.

    None among `dims` makes a dimension of size 1.
    """

    node: fx.Node
    dims: tuple[int | None, ...] | None = None

    @property
    def shape(self) -> tuple:
        sizes = shape(self.node)
        return sizes if self.dims is None else tuple(1 if d is None else sizes[d] for d in self.dims)


@dataclass(frozen=True)
class AttentionOperands:
    """softmax(scale * q k^T) v with q [B,H,N,D], k and v [B,Hk,M,D]; `out` permutes [B,H,N,D] to what the anchor yields,
    and may leave a dimension of size 1 away.

    `mask`: key padding, [B or 1, 1, 1, M] or expanded from it, boolean or added to the scores; `hides`: a boolean one tells
    which keys are left out, not which are attended to. `rows`: a boolean one [B or 1, H or 1, N, 1], or expanded from it, of
    the rows that attend at all; the others are 0. `sdpa`: the user's choice of
    attention kernels (torch.nn.attention.SDPBackend names joined by commas), "" where there is none. `cast`: the dtype that
    q, k and v are cast to, None where they stay as they are.
    """

    q: Laid
    k: Laid
    v: Laid
    scale: float
    out: tuple[int, ...] | None = None
    mask: fx.Node | None = None
    hides: bool = False
    rows: fx.Node | None = None
    sdpa: str = ""
    cast: torch.dtype | None = None


@dataclass(frozen=True)
class Beside:
    """The rest of a fused projection: linear(cat(parts), weight, bias) is added to the MLP's own product."""

    parts: tuple[fx.Node, ...]
    weight: Part
    bias: fx.Node | None


@dataclass(frozen=True)
class Kept:
    """What else the first linear yields: `pieces` of its result, all within the columns that `weight` and `bias` make.

    Those columns begin at `start` of the result and are `width` wide.
    """

    linear: fx.Node
    weight: Part
    bias: Part | None
    pieces: tuple[Columns, ...]
    start: int
    width: int


@dataclass(frozen=True)
class MlpOperands:
    """act(x w1^T + b1) [* (x wu^T + bu)] w2^T + b2, with w1, wu [F,C] and w2 [C2,F].

    `channels_first`: of x [B,C,...] and the result, by weights [F,C,1,...].
    """

    x: fx.Node
    w1: Part
    b1: Part | None
    wu: Part | None
    bu: Part | None
    w2: Part
    b2: fx.Node | None
    activation: str
    beside: Beside | None = None
    kept: Kept | None = None
    channels_first: bool = False


@dataclass(frozen=True)
class Accepted:
    """`dense`: why the site, though understood, cannot be computed sparsely."""

    form: str
    operands: AttentionOperands | MlpOperands
    dense: str | None = None


@dataclass(frozen=True)
class Refused:
    form: str
    reason: str


@dataclass(frozen=True)
class Example:
    """A module with inputs in which the pattern occurs once; a near miss also says why it must be refused."""

    name: str
    make: Callable[[], tuple[nn.Module, tuple[Any, ...]]]
    reason: str | None = None


@dataclass(frozen=True)
class Pattern:
    """One algebraic idea. `judge` turns bindings into operands or refuses with the reason and the value seen.

    `begins` is the number of ops that must match before a failed attempt is worth reporting as a near miss.
    """

    name: str
    kind: str
    expression: Expression
    judge: Callable[[Found], Accepted | Refused]
    examples: Callable[[], Sequence[Example]]
    near_misses: Callable[[], Sequence[Example]]
    begins: int = 2

    @property
    def anchors(self) -> tuple[Any, ...]:
        return heads(self.expression)


def open_end(found: Found, beside: Collection[fx.Node] = ()) -> str | None:
    """Reason to refuse a match that would have to keep, or reorder past a write, what it replaces.

    `beside`: users outside the pattern that the rewrite provides for.
    """
    anchor, inside = found.nodes[0], {*found.nodes, *beside}
    for node in found.nodes[1:]:
        if stray := next((user for user in node.users if user not in inside and is_used(user)), None):
            return f"{node} is also used by {stray} outside the pattern"
    outer = [n for node in found.nodes for n in node.all_input_nodes if n not in inside]
    first = min(found.nodes)
    if writer := mutated_between(first, anchor, outer):
        return f"{writer} writes in place to an operand between {first} and {anchor}"
    return None
