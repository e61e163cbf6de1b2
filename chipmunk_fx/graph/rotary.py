"""Norm and rotary embedding of queries and keys become one operator, where a GPU would else read them several times over.

Inductor makes of "turn neighbours by a quarter" a choice for every value, with four loads where one would do; and it cannot
join norms of two streams, their concatenation and the rotation. Nothing is left out: results are the model's own, rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from chipmunk_fx.graph.calls import CASTS, arguments, dtype
from chipmunk_fx.graph.language import Call, Each, Expression, Found, Literal, OneOf, Range, Var, Where, match
from chipmunk_fx.graph.walk import mutated_between, rank, shape

aten = torch.ops.aten

_ANY = Literal(lambda _: True, "anything")
_LAST = Literal(lambda dim: dim in (-1, 3), "the last dimension of heads")
_WITHIN = Literal(lambda dim: dim in (-1, 4), "the last dimension of pairs")
_FOLDS = (aten.reshape.default, aten.unflatten.int, aten.flatten.using_ints)
_SIZES = {name: _ANY for name in ("shape", "dim", "sizes", "start_dim", "end_dim")}
_TO = {name: _ANY for name in ("dtype", "layout", "device", "pin_memory", "non_blocking", "copy", "memory_format")}


def _wide(inner: Expression) -> OneOf:
    """`inner`, or its cast to fp32."""
    cast = Where(lambda node: dtype(node) == torch.float32, "fp32", Call(CASTS, {"self": inner, **_TO}))
    return OneOf("cast", {"none": inner, "wide": cast})


def _turned_neighbours() -> Expression:
    pairs = Where(lambda n: rank(n) == 5 and shape(n)[-1] == 2, "pairs", Call(_FOLDS, {"self": Var("x"), **_SIZES}))
    one, other = (Call((aten.unbind.int,), {"self": pairs, "dim": _WITHIN}, output=i) for i in range(2))
    turned = Call((aten.stack.default,), {"tensors": Each((_minus(other), one)), "dim": _WITHIN})
    return Where(lambda n: rank(n) == 4, "heads", Call(_FOLDS, {"self": turned, **_SIZES}))


def _turned_halves() -> Expression:
    other, one = Range("other", Var("x")), Range("one", Var("x"))
    return Call((aten.cat.default,), {"tensors": Each((_minus(other), one)), "dim": _LAST})


def _minus(inner: Expression) -> Call:
    return Call((aten.neg.default,), {"self": inner})


def _rotation() -> Expression:
    """x cos + turned(x) sin."""
    turned = OneOf("turned", {"neighbours": _turned_neighbours(), "halves": _turned_halves()})
    cosine, sine = (
        Call((aten.mul.Tensor,), {"self": _wide(x), "other": Var(by)}, commutes=("self", "other"))
        for x, by in ((Var("x"), "cos"), (turned, "sin"))
    )
    return Call((aten.add.Tensor,), {"self": cosine, "other": sine}, commutes=("self", "other"))


_ROTATION = _rotation()


@dataclass(frozen=True)
class Rotation:
    """The operator's operands, the node whose value it makes, and all `nodes` that it replaces.

    parts [B, N, H, D], or with `dim` 2 [B, H, N, D].
    """

    result: fx.Node
    parts: tuple[fx.Node, ...]
    weights: tuple[fx.Node | None, ...]
    cos: fx.Node
    sin: fx.Node
    eps: float
    dim: int
    paired: bool
    nodes: tuple[fx.Node, ...]


def fuse_rotary(graph: fx.Graph, pays: Callable[[torch.Tensor], bool]) -> int:
    """Put the operator in place of every rotation of normed values that `pays`; returns how many."""
    found = []
    for node in [n for n in graph.nodes if n.target is aten.add.Tensor]:
        if rotation := find(node, pays):
            _replace(graph, rotation)  # at once: the next may be of its result
            found.append(rotation)
    for node in sorted({n for rotation in found for n in rotation.nodes}, reverse=True):
        if not node.users:
            graph.erase_node(node)
    return len(found)


def find(node: fx.Node, pays: Callable[[torch.Tensor], bool]) -> Rotation | None:
    """The rotation that ends in this addition, or in the cast behind it."""
    if rank(node) != 4 or not all(isinstance(size, int) for size in shape(node)):
        return None
    found = match(_ROTATION, node)
    if not isinstance(found, Found):
        return None
    x, cos, sin = (found.bound[name] for name in ("x", "cos", "sin"))
    if rank(x) != 4 or shape(x) != shape(node) or not _whole_halves(found):
        return None
    result = _as_wide_as(x, node)
    dim = _token_dim(x, cos, sin)
    if result is None or dim is None or not pays(x.meta["val"]):
        return None
    read = [x, cos, sin, *found.nodes]  # what is made on the way, too: a part of it may be set to 0
    if any(user not in found.nodes for user in x.users) or mutated_between(min(found.nodes), result, read):
        return None
    parts = _normed(x, dim, {*found.nodes, x})
    if parts is None:
        return None
    sources, weights, eps = parts
    if mutated_between(min(sources), result, [n for n in (*sources, *weights) if n is not None]):
        return None
    nodes = tuple({*found.nodes, *_between(x, sources), result})
    return Rotation(result, sources, weights, cos, sin, eps, dim, found.bound["turned"] == "neighbours", nodes)


def _whole_halves(found: Found) -> bool:
    """Whether what is turned are pairs within a head, or one half of the last dimension and the other."""
    width = shape(found.bound["x"])[-1]
    if width % 2 or found.bound["turned"] == "neighbours":
        return width % 2 == 0
    spans = [None if part is None else (part.start, part.stop) for part in (found.bound[n] for n in ("one", "other"))]
    return spans == [(0, width // 2), (width // 2, width)]


def _as_wide_as(x: fx.Node, node: fx.Node) -> fx.Node | None:
    """The node that has x's dtype again: the sum, or the one cast of it."""
    if dtype(node) == dtype(x):
        return node
    (user, *others) = node.users or (None,)
    if others or user is None or user.target not in CASTS or dtype(user) != dtype(x):
        return None
    return user if user.meta["val"].device == x.meta["val"].device else None


def _token_dim(x: fx.Node, cos: Any, sin: Any) -> int | None:
    """1 or 2, along which the angles differ; None where they are not x's tokens'."""
    sizes = shape(x)
    if not x.meta["val"].is_floating_point():
        return None
    for angles in (cos, sin):
        if not isinstance(angles, fx.Node) or rank(angles) != 4 or not angles.meta["val"].is_floating_point():
            return None
        given = shape(angles)
        if given[3] != sizes[3] or any(a not in (1, size) for a, size in zip(given, sizes, strict=True)):
            return None
    varying = {dim for angles in (cos, sin) for dim in (1, 2) if shape(angles)[dim] != 1}
    return varying.pop() if len(varying) == 1 else None


def _normed(
    x: fx.Node, dim: int, inside: Collection[fx.Node]
) -> tuple[tuple[fx.Node, ...], tuple[fx.Node | None, ...], float] | None:
    """What x is the norm of, or the joined norms of, with their weights; None where nothing is normed, or unlike."""
    values: Sequence[Any] = [x]
    if x.target is aten.cat.default:
        given = arguments(x)
        values = given["tensors"] if given["dim"] % 4 == dim else [x]
    norms = [_norm(value, inside) for value in values]
    epsilons = {norm[2] for norm in norms if norm is not None}
    if len(epsilons) != 1:
        return None
    sources = tuple(value if norm is None else norm[0] for value, norm in zip(values, norms, strict=True))
    alike = all(dtype(source) == dtype(x) and rank(source) == 4 for source in sources)
    return (sources, tuple(None if n is None else n[1] for n in norms), epsilons.pop()) if alike else None


def _norm(node: fx.Node, inside: Collection[fx.Node]) -> tuple[fx.Node, fx.Node, float] | None:
    """x, weight [D] and eps of an RMS norm over heads that nobody else reads."""
    if node.target is not aten.rms_norm.default or any(user not in inside for user in node.users):
        return None
    given = arguments(node)
    weight, eps = given["weight"], given["eps"]
    plain = isinstance(weight, fx.Node) and isinstance(eps, float) and len(given["normalized_shape"]) == 1
    return (given["input"], weight, eps) if plain else None


def _between(x: fx.Node, sources: Collection[fx.Node]) -> list[fx.Node]:
    """x, and of joined norms these."""
    return [x, *(n for n in x.all_input_nodes if n not in sources and n.target is aten.rms_norm.default)]


def _replace(graph: fx.Graph, rotation: Rotation) -> None:
    with graph.inserting_before(rotation.result):
        sizes = [shape(part)[rotation.dim] for part in rotation.parts]
        angles = [_divided(graph, a, rotation.dim, sizes) for a in (rotation.cos, rotation.sin)]
        new = graph.call_function(
            torch.ops.chipmunk.rotary.default,
            (list(rotation.parts), list(rotation.weights), *angles),
            {"eps": rotation.eps, "dim": rotation.dim, "paired": rotation.paired},
        )
    new.meta["val"] = rotation.result.meta["val"]
    rotation.result.replace_all_uses_with(new)


def _divided(graph: fx.Graph, angles: fx.Node, dim: int, sizes: Sequence[int]) -> list[fx.Node]:
    """The angles of each part."""
    if len(sizes) == 1 or shape(angles)[dim] == 1:
        return [angles] * len(sizes)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [
        graph.call_function(aten.slice.Tensor, (angles, dim, start, start + size))
        for start, size in zip(starts, sizes, strict=True)
    ]
