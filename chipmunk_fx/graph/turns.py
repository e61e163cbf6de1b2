"""Rotary embeddings in the spellings of models: what they rotate by which angles, and what of the graph says so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from chipmunk_fx.graph.calls import CASTS, arguments, dtype
from chipmunk_fx.graph.language import Call, Each, Expression, Found, Literal, OneOf, Range, Var, Where, match
from chipmunk_fx.graph.norms import is_static, is_within
from chipmunk_fx.graph.spellings import ANYTHING, maybe_cast, maybe_wide
from chipmunk_fx.graph.walk import mutated_between, rank, shape, storage

aten = torch.ops.aten

_LAST = Literal(lambda dim: dim in (-1, 3), "the last dimension of heads")
_WITHIN = Literal(lambda dim: dim in (-1, 4), "the last dimension of pairs")
_FOLDS = (aten.reshape.default, aten.unflatten.int, aten.flatten.using_ints)
_SIZES = {name: ANYTHING for name in ("shape", "dim", "sizes", "start_dim", "end_dim")}
_BY_COLUMNS = (aten.slice.Tensor, aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor)
_TWO = Literal(lambda step: step == 2, "2")


def _pairs() -> Expression:
    return Where(lambda n: rank(n) == 5 and shape(n)[-1] == 2, "pairs", Call(_FOLDS, {"self": Var("x"), **_SIZES}))


def _unbound(index: int) -> Call:
    return Call((aten.unbind.int,), {"self": _pairs(), "dim": _WITHIN}, output=index)


def _stacked(parts: tuple[Expression, Expression]) -> Expression:
    """Heads of such pairs."""
    both = Call((aten.stack.default,), {"tensors": Each(parts), "dim": _WITHIN})
    return Where(lambda n: rank(n) == 4, "heads", Call(_FOLDS, {"self": both, **_SIZES}))


def _turned_halves() -> Expression:
    other, one = Range("other", Var("x")), Range("one", Var("x"))
    return Call((aten.cat.default,), {"tensors": Each((_minus(other), one)), "dim": _LAST})


def _minus(inner: Expression) -> Call:
    return Call((aten.neg.default,), {"self": inner})


def _times(x: Expression, angles: str) -> Call:
    return Call((aten.mul.Tensor,), {"self": maybe_wide(x), "other": Var(angles)}, commutes=("self", "other"))


def _sum() -> Expression:
    """x cos + turned(x) sin."""
    neighbours = _stacked((_minus(_unbound(1)), _unbound(0)))
    turned = OneOf("turned", {"neighbours": neighbours, "halves": _turned_halves()})
    given = {"self": _times(Var("x"), "cos"), "other": _times(turned, "sin")}
    return Call((aten.add.Tensor,), given, commutes=("self", "other"))


def _every_second(start: int) -> Expression:
    """Of the columns of x."""
    begin = Literal(lambda at: (at or 0) == start, str(start))
    given = {"self": Var("x"), "dim": _LAST, "start": begin, "end": ANYTHING, "step": _TWO}
    return OneOf("taken", {"unbound": _unbound(start), "sliced": Call((aten.slice.Tensor,), given)})


def _rotated_columns() -> tuple[Expression, Expression]:
    """Of a and b, the even columns of x and the odd ones: a cos - b sin and a sin + b cos."""
    a, b = _every_second(0), _every_second(1)
    even = Call((aten.sub.Tensor,), {"self": _times(a, "cos"), "other": _times(b, "sin")})
    sine = {"self": _times(a, "sin"), "other": _times(b, "cos")}
    return maybe_cast(even), maybe_cast(Call((aten.add.Tensor,), sine, commutes=("self", "other")))


_SUM, _EVEN_ODD = _sum(), _rotated_columns()
_STACKED = _stacked(_EVEN_ODD)


@dataclass(frozen=True)
class Turn:
    """A rotation of x [B, N, H, D], or with `dim` 2 [B, H, N, D].

    results: nodes with its value, made by `last` and what stands before it; nodes: all that need not be computed any more.
    """

    x: fx.Node
    cos: fx.Node
    sin: fx.Node
    dim: int
    paired: bool
    results: tuple[fx.Node, ...]
    last: fx.Node
    nodes: tuple[fx.Node, ...]


def find_turn(node: fx.Node) -> Turn | None:
    """The rotation that ends in this op, or in the cast behind it."""
    if node.target is aten.copy_.default:
        return _written(node)
    if rank(node) != 4 or not is_static(node) or not (node.target is aten.add.Tensor or node.target in _FOLDS):
        return None
    found = match(_SUM if node.target is aten.add.Tensor else _STACKED, node)
    if not isinstance(found, Found):
        return None
    x = found.bound["x"]
    result = _as_wide_as(x, node) if is_static(x) and shape(x) == shape(node) else None
    return None if result is None else _turn(found, found.nodes, (result,), result)


def _written(last: fx.Node) -> Turn | None:
    """Both halves of the columns of an empty tensor, which nobody reads or writes before `last`, the second copy."""
    (half, _), buffer = last.args[:2], None
    if isinstance(half, fx.Node) and half.target is aten.slice.Tensor:
        buffer = half.args[0]
    if not isinstance(buffer, fx.Node) or buffer.target is not aten.empty_like.default or not is_static(buffer):
        return None
    writes = [_write(user) for user in buffer.users if user < last]
    values = dict(write for write in writes if write is not None)
    if len(writes) != 2 or values.keys() != {0, 1} or max(values.values()) is not last:
        return None
    found = match(_EVEN_ODD[0], values[0].args[1])
    found = match(_EVEN_ODD[1], values[1].args[1], found) if isinstance(found, Found) else found
    if not isinstance(found, Found):
        return None
    x = found.bound["x"]
    if not is_static(x) or rank(x) != 4 or shape(x) != shape(buffer) or dtype(x) != dtype(buffer):
        return None
    again = [user for user in buffer.users if user.target is aten.type_as.default and user.args == (buffer, x)]
    written = (buffer, *(copy.args[0] for copy in values.values()), *values.values())
    return _turn(found, (*found.nodes, *written), (buffer, *again), last)  # pyright: ignore[reportArgumentType]


def _write(half: fx.Node) -> tuple[int, fx.Node] | None:
    """(first column, copy) of a slice of every second column to which one copy writes, and which nothing else reads."""
    (copy, *others) = half.users or (None,)
    if half.target is not aten.slice.Tensor or copy is None or others or copy.target is not aten.copy_.default:
        return None
    given = arguments(half)
    every_second = given["step"] == 2 and is_static(half) and rank(half) == 4 and given["dim"] in (-1, 3)
    plain = copy.args[0] is half and len(copy.args) == 2 and not copy.kwargs and not copy.users
    if not plain or not every_second or 2 * shape(half)[-1] != shape(given["self"])[-1]:
        return None
    return given["start"] or 0, copy


def _turn(found: Found, nodes: Sequence[fx.Node], results: tuple[fx.Node, ...], last: fx.Node) -> Turn | None:
    """What was found, where it is a rotation of whole heads by angles of their tokens that nothing changes on the way."""
    x, cos, sin = (found.bound[name] for name in ("x", "cos", "sin"))
    by_columns = "turned" not in found.bound
    made = [results[0], *found.nodes]
    narrow = dtype(x) in (torch.bfloat16, torch.float16)
    if not (narrow if by_columns else x.meta["val"].is_floating_point()):  # in fp32 nothing is rounded on the way
        return None
    if not all(is_within(n, x) for n in made) or not _whole(found, by_columns) or _is_seen(results, found.nodes):
        return None
    dim = _token_dim(x, (cos, sin), shape(x)[3] // 2 if by_columns else shape(x)[3])
    # what is made on the way, too: a part of it may be set to 0
    if dim is None or mutated_between(min(found.nodes), last, [x, cos, sin, *found.nodes]):
        return None
    return Turn(x, cos, sin, dim, found.bound.get("turned") != "halves", results, last, (*nodes, *results))


def _is_seen(results: Sequence[fx.Node], nodes: Sequence[fx.Node]) -> bool:
    """Whether others than these read memory of the results by another name, such as what was stacked."""
    aliases = [n for n in nodes if n not in results and storage(n) == storage(results[0])]
    return any(user not in nodes and user not in results for n in aliases for user in n.users)


def _whole(found: Found, by_columns: bool) -> bool:
    """Whether what is turned are pairs within a head, or one half of the last dimension and the other."""
    *sizes, width = shape(found.bound["x"])
    if width % 2:
        return False
    if by_columns:
        return all(shape(n) == (*sizes, width // 2) for n in found.nodes if n.target in _BY_COLUMNS)
    if found.bound["turned"] == "neighbours":
        return True
    spans = [None if part is None else (part.start, part.stop) for part in (found.bound[n] for n in ("one", "other"))]
    return spans == [(0, width // 2), (width // 2, width)]


def _as_wide_as(x: fx.Node, node: fx.Node) -> fx.Node | None:
    """The node that has x's dtype again: the sum, or the one cast of it."""
    if dtype(node) == dtype(x):
        return node
    (user, *others) = node.users or (None,)
    return None if others or user is None or user.target not in CASTS or dtype(user) != dtype(x) else user


def _token_dim(x: fx.Node, angles: Sequence[Any], columns: int) -> int | None:
    """1 or 2, along which the angles differ, or of both the outer one; None where they are not x's tokens'."""
    sizes, varying = (*shape(x)[:3], columns), set()
    for given in angles:
        if not isinstance(given, fx.Node) or not is_static(given) or rank(given) not in (1, 2, 3, 4):
            return None
        have = (*[1] * (4 - rank(given)), *shape(given))
        fits = have[3] == columns and all(a in (1, size) for a, size in zip(have, sizes, strict=True))
        if not fits or not given.meta["val"].is_floating_point():
            return None
        varying |= {dim for dim in (1, 2) if have[dim] != 1}
    if len(varying) == 2:
        strides = x.meta["val"].stride()
        return 1 if strides[1] >= strides[2] else 2
    return varying.pop() if varying else None
