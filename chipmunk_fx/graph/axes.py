"""Axes of a tensor, and the maps of positions that brought its rows to where they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod

from torch import fx

Map = frozenset[tuple[fx.Node, int]]
"""A map of positions by the ops that chose it, each with 1, or -1 where it is the inverse."""

NONE: Map = frozenset()


@dataclass(frozen=True)
class Axis:
    """A run of positions: a dimension, or a factor of one; of size 1 what is left where one row was chosen.

    `order`: the maps that brought rows to where they are, one after the other; none where they are in their own places.
    Where values are a map themselves (indices, one-hot rows): `keys` has a value for each position, `places` is pointed to.
    """

    size: int
    order: tuple[Map, ...] = ()
    keys: Map = NONE
    places: Map = NONE

    @property
    def is_plain(self) -> bool:
        return not (self.order or self.keys or self.places)


Dim = list[Axis]
"""The axes that one dimension is made of, the slowest first."""


def inverse(given: Map) -> Map:
    return frozenset((node, -sign) for node, sign in given)


def moved(dim: Dim, by: Map, size: int) -> Dim:
    """Rows that a map takes elsewhere, or back if its inverse was what moved them last."""
    return [
        Axis(axis.size, axis.order[:-1] if axis.order[-1:] == (inverse(by),) else (*axis.order, by))
        for axis in _fitted(dim, size)
    ]


def order(dim: Dim) -> tuple[Map, ...]:
    return next((axis.order for axis in dim if axis.order), ())


def keys(dim: Dim) -> Map:
    return NONE.union(*(axis.keys for axis in dim))


def places(dim: Dim) -> Map:
    return NONE.union(*(axis.places for axis in dim))


def marked(dim: Dim, keys: Map = NONE, places: Map = NONE) -> Dim:
    """Rows in the same order, with values that tell these maps."""
    return [Axis(axis.size, axis.order, keys, places) for axis in dim]


def unordered(dim: Dim) -> Dim:
    return [replace(axis, order=()) for axis in dim]


def flat(dims: Iterable[Dim]) -> Dim:
    return [axis for dim in dims for axis in dim]


def folded(axes: Sequence[Axis], sizes: Sequence[int]) -> list[Dim]:
    """The axes of each dimension of a tensor, whatever it was reshaped from."""
    left = [axis for axis in axes if axis.size != 1 or not axis.is_plain]
    dims: list[Dim] = []
    for size in sizes:
        while dims and size != 1 and left and left[0].size == 1:
            dims[-1].append(left.pop(0))
        dim: Dim = []
        while left and (size_of(dim) < size or (size == 1 and left[0].size == 1)):
            dim.append(left.pop(0))
        inner = size_of(dim) // max(size, 1)
        if inner > 1 and dim[-1].size % inner == 0:
            left.insert(0, replace(dim[-1], size=inner))
            dim[-1] = replace(dim[-1], size=dim[-1].size // inner)
        dims.append(_fitted(dim, size))
    if left and dims:
        dims[-1] += left
    return dims


def joined(dims: Iterable[Dim], size: int) -> Dim:
    """One dimension of what is made of several tensors."""
    result: Dim = []
    for dim in (_fitted(dim, size) for dim in dims if not all(axis.is_plain for axis in dim)):
        if result and [axis.size for axis in result] != [axis.size for axis in dim]:
            result, dim = _fitted(result, size, whole=True), _fitted(dim, size, whole=True)
        result = [_both(*pair) for pair in zip(result, dim, strict=True)] if result else dim
    return result or [Axis(size)]


def _both(one: Axis, other: Axis) -> Axis:
    steps = (*one.order, *(step for step in other.order if step not in one.order))
    return Axis(one.size, steps, one.keys | other.keys, one.places | other.places)


def _fitted(dim: Dim, size: int, whole: bool = False) -> Dim:
    """A dimension that was cut or grew, whose factors are lost, as they are where it is taken as a `whole`."""
    if dim and size_of(dim) == size and not whole:
        return dim
    return [Axis(size, order(dim), keys(dim), places(dim))]


def size_of(dim: Dim) -> int:
    return prod(axis.size for axis in dim)
