"""Norm and rotary embedding of queries and keys become one operator, where a GPU would else read them several times over.

Inductor makes of "turn neighbours by a quarter" a choice for every value, with four loads where one would do; and it cannot
join norms of two streams, their concatenation and the rotation. Nothing is left out: results are the model's own, rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from chipmunk_fx.graph.calls import arguments, dtype
from chipmunk_fx.graph.norms import Norm, find_norm
from chipmunk_fx.graph.turns import Turn, find_turn
from chipmunk_fx.graph.walk import VIEWS, mutated_between, rank, shape, storage, written

aten = torch.ops.aten


@dataclass(frozen=True)
class Part:
    """What is joined to others: values by themselves, or those that a norm is of."""

    value: fx.Node
    norm: Norm | None

    @property
    def source(self) -> fx.Node:
        return self.value if self.norm is None else self.norm.source

    @property
    def read(self) -> tuple[fx.Node, ...]:
        """What must be as it was when the model read it."""
        return (self.value,) if self.norm is None else (self.norm.source, self.norm.weight, *self.norm.nodes)


def fuse_rotary(graph: fx.Graph, pays: Callable[[torch.Tensor], bool]) -> int:
    """Put the operator in place of every rotation of normed values that `pays`; returns how many rotations there were."""
    count = 0
    for node in list(graph.nodes):  # what is erased on the way stands before the node
        turn = find_turn(node)
        parts = _parts(turn) if turn is not None and pays(turn.x.meta["val"]) else None
        if turn is not None and parts is not None:
            _replace(graph, turn, parts)
            count += 1
    for node in [n for n in graph.nodes if n.target is aten.cat.default] if count else ():
        _join(graph, node)
    return count


def _parts(turn: Turn) -> list[Part] | None:
    """What is rotated, or joined to be; None where nothing is normed, norms are unlike, or others read or change values."""
    if any(user not in turn.nodes for user in turn.x.users) or not _may_lie_otherwise(turn.results, turn.dim):
        return None
    values: Sequence[Any] = [turn.x]
    inside = {turn.x, *turn.nodes}
    if turn.x.target is aten.cat.default and arguments(turn.x)["dim"] % 4 == turn.dim:
        values = arguments(turn.x)["tensors"]
    joined = _joined(turn)
    parts = [Part(value, find_norm(value, turn.dim, lambda u: u in inside or _is_other(u, joined))) for value in values]
    return parts if _are_alike(parts, turn.x) and not _changed(parts, turn.last) else None


def _joined(turn: Turn) -> fx.Node | None:
    """The concatenation along tokens that alone reads what was rotated."""
    (user, *others) = [user for result in turn.results for user in result.users if user not in turn.nodes] or (None,)
    is_joined = user is not None and not others and user.target is aten.cat.default
    return user if is_joined and arguments(user)["dim"] in (turn.dim, turn.dim - 4) else None


def _is_other(user: fx.Node, joined: fx.Node | None) -> bool:
    """Whether it is the part of a norm that is joined to a rotated one as it is."""
    return user.target is aten.slice.Tensor and joined is not None and set(user.users) == {joined}


def _are_alike(parts: Sequence[Part], whole: fx.Node, eps: Iterable[float] = ()) -> bool:
    """Whether all are heads of one dtype, and their norms, of which there is one at least, have one eps."""
    epsilons = {*eps, *(part.norm.eps for part in parts if part.norm is not None)}
    return len(epsilons) == 1 and all(dtype(p.source) == dtype(whole) and rank(p.value) == 4 for p in parts)


def _changed(parts: Sequence[Part], last: fx.Node) -> bool:
    read = [node for part in parts for node in part.read]
    return bool(parts) and mutated_between(min(part.source for part in parts), last, read) is not None


def _may_lie_otherwise(results: Sequence[fx.Node], dim: int) -> bool:
    """Whether they lie over contiguous [B, N, H, D] anyway, or nobody can tell: by a write to what is a view of them in one
    layout and a copy in another, say."""
    value = results[0].meta["val"]
    if (value if dim == 1 else value.transpose(1, 2)).is_contiguous():
        return True
    queue, memories = list(results), {storage(results[0]), None}  # None: of lists of views
    for node in queue:
        for user in node.users:
            if user.target is aten.as_strided.default or node in written(user):
                return False
            if user not in queue and (user.target in VIEWS or storage(user) in memories):
                memories.add(storage(user))
                queue.append(user)
    return True


def _replace(graph: fx.Graph, turn: Turn, parts: Sequence[Part]) -> None:
    sizes = [shape(part.value)[turn.dim] for part in parts]
    with graph.inserting_before(turn.last):
        angles = [_divided(graph, a, turn.dim - 4, sizes) for a in (turn.cos, turn.sin)]
        new = graph.call_function(
            torch.ops.chipmunk.rotary.default,
            ([_viewed(graph, part) for part in parts], _weights(parts), *angles),
            {"eps": _eps(parts), "dim": turn.dim, "paired": turn.paired},
        )
    new.meta["val"] = turn.results[0].meta["val"]
    for result in turn.results:
        result.replace_all_uses_with(new, lambda user: user not in turn.nodes)
    _erase(graph, [*turn.nodes, turn.x, *(n for part in parts if part.norm for n in part.norm.nodes)])


def _join(graph: fx.Graph, cat: fx.Node) -> bool:
    """One operator for a concatenation of rotated parts, and of norms beside them."""
    values, dim = arguments(cat)["tensors"], arguments(cat)["dim"] % max(rank(cat), 1)
    rotated = [n for n in values if n.target is torch.ops.chipmunk.rotary.default and dtype(n) == dtype(cat)]
    if not rotated or any(
        n.kwargs != rotated[0].kwargs or n.kwargs["dim"] != dim or set(n.users) != {cat} for n in rotated
    ):
        return False
    others = {value: Part(value, find_norm(value, dim, lambda u: u is cat)) for value in values if value not in rotated}
    parts = list(others.values())
    if any(part.norm is None for part in parts) or not _are_alike(parts, cat, [rotated[0].kwargs["eps"]]):
        return False
    if (
        not _may_lie_otherwise([cat], dim)
        or _changed(parts, cat)
        or mutated_between(min(rotated), cat, [n for r in rotated for n in r.all_input_nodes])
    ):
        return False
    with graph.inserting_before(cat):
        given: list[list[Any]] = [[], [], [], []]
        for value in values:
            part = others.get(value)
            own = value.args if part is None else ([_viewed(graph, part)], _weights([part]), [None], [None])
            for all_, some in zip(given, own, strict=True):
                all_ += some
        new = graph.call_function(torch.ops.chipmunk.rotary.default, tuple(given), rotated[0].kwargs)
    new.meta["val"] = cat.meta["val"]
    cat.replace_all_uses_with(new)
    _erase(graph, [cat, *rotated, *(n for part in parts if part.norm for n in part.norm.nodes)])
    return True


def _weights(parts: Sequence[Part]) -> list[fx.Node | None]:
    return [None if part.norm is None else part.norm.weight for part in parts]


def _eps(parts: Sequence[Part]) -> float:
    return next(part.norm.eps for part in parts if part.norm is not None)


def _viewed(graph: fx.Graph, part: Part) -> fx.Node:
    """What the norm is of, seen as what is normed was."""
    node = part.source
    for view in part.norm.views if part.norm is not None else ():
        node = _called(graph, view.target, (node, *view.args[1:]), view.kwargs)
    return node


def _divided(graph: fx.Graph, angles: fx.Node, dim: int, sizes: Sequence[int]) -> list[fx.Node]:
    """The angles of each part along `dim`, counted from the last."""
    if len(sizes) == 1 or rank(angles) < -dim or shape(angles)[dim] == 1:
        return [angles] * len(sizes)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    spans = [(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    return [_called(graph, aten.slice.Tensor, (angles, dim, *span), {}) for span in spans]


def _called(graph: fx.Graph, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
    """A view, with its value, which tells its memory."""
    node = graph.call_function(target, args, kwargs)
    node.meta["val"] = target(*fx.map_arg(args, lambda n: n.meta["val"]), **kwargs)
    return node


def _erase(graph: fx.Graph, nodes: Iterable[fx.Node]) -> None:
    for node in sorted(set(nodes), reverse=True):
        if not node.users:
            graph.erase_node(node)
