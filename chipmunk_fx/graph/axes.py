"""Axes of a tensor, and the maps of positions that brought its rows to where they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod

from torch import fx

Map = frozenset[tuple[fx.Node, int]]
"""Where positions go: the ops that chose it, each with 1, or -1 for the inverse."""

NOWHERE: Map = frozenset()


@dataclass(frozen=True)
class Axis:
    """A run of positions: a dimension, or a factor of one; of size 1 that of a single row, of which no dimension is left.

    `order`: the maps that brought rows to where they are, one after the other; none where they are in their own places.
    Where the values are maps themselves (indices, one-hot rows): `keys` has one for every position, `places` is pointed to.
    """

    size: int
    order: tuple[Map, ...] = ()
    keys: Map = NOWHERE
    places: Map = NOWHERE

    @property
    def is_plain(self) -> bool:
        return not (self.order or self.keys or self.places)


Part = list[Axis]
"""The axes that one dimension is made of, the slowest first."""


def inverse(given: Map) -> Map:
    return frozenset((node, -sign) for node, sign in given)


def moved(part: Part, by: Map, size: int) -> Part:
    """Rows taken to where a map says; one that follows its inverse takes them back."""
    return [
        Axis(axis.size, axis.order[:-1] if axis.order[-1:] == (inverse(by),) else (*axis.order, by))
        for axis in _fitted(part, size)
    ]


def order(part: Part) -> tuple[Map, ...]:
    return next((axis.order for axis in part if axis.order), ())


def keyed(axis: Axis, by: Map) -> Axis:
    """Indices along an axis."""
    return Axis(axis.size, axis.order, by)


def bare(part: Part) -> Part:
    """Values that are no map."""
    return [Axis(axis.size, axis.order) for axis in part]


def folded(axes: Sequence[Axis], sizes: Sequence[int]) -> list[Part]:
    """The axes of each dimension of a tensor, whatever it was reshaped from."""
    left = [axis for axis in axes if axis.size != 1 or not axis.is_plain]
    parts: list[Part] = []
    for size in sizes:
        while parts and size != 1 and left and left[0].size == 1:
            parts[-1].append(left.pop(0))
        part: Part = []
        while left and (_size(part) < size or (size == 1 and left[0].size == 1)):
            part.append(left.pop(0))
        if (more := _size(part)) > size and part[-1].size % (inner := max(more // max(size, 1), 1)) == 0:
            left.insert(0, replace(part[-1], size=inner))
            part[-1] = replace(part[-1], size=part[-1].size // inner)
        parts.append(_fitted(part, size))
    if left and parts:
        parts[-1] += left
    return parts


def joined(parts: Iterable[Part], size: int) -> Part:
    """One dimension of what is made of several."""
    result: Part = [Axis(size)]
    for part in (_fitted(part, size) for part in parts if not all(axis.is_plain for axis in part)):
        plain = all(axis.is_plain for axis in result)
        result = part if plain else _merged(result, part, size)
    return result


def _merged(one: Part, other: Part, size: int) -> Part:
    if [axis.size for axis in one] == [axis.size for axis in other]:
        return [_both(*pair, pair[0].size) for pair in zip(one, other, strict=True)]
    return [_both(_fitted(one, size, True)[0], _fitted(other, size, True)[0], size)]


def _both(one: Axis, other: Axis, size: int) -> Axis:
    rows = (*one.order, *(step for step in other.order if step not in one.order))
    return Axis(size, rows, one.keys | other.keys, one.places | other.places)


def _fitted(part: Part, size: int, whole: bool = False) -> Part:
    """The same where a dimension is cut or grows; its factors are not told apart then, nor where it is to be `whole`."""
    if part and _size(part) == size and not whole:
        return part
    keys, places = (NOWHERE.union(*maps) for maps in ([a.keys for a in part], [a.places for a in part]))
    return [Axis(size, order(part), keys, places)]


def _size(part: Part) -> int:
    return prod(axis.size for axis in part)
