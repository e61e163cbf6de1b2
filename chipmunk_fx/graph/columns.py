"""Contiguous parts of a tensor's last dimension, in every spelling: chunk, split, slice, narrow, unflatten and unbind."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from chipmunk_fx.graph.calls import arguments
from chipmunk_fx.graph.walk import shape

aten = torch.ops.aten

_LISTS = (
    *(aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.unsafe_split.Tensor),
    *(aten.unsafe_chunk.default, aten.unsafe_split_with_sizes.default, aten.tensor_split.sections, aten.unbind.int),
)
_SLICES = (aten.slice.Tensor, aten.narrow.default, aten.select.int)
_FOLDS = (aten.unflatten.int, aten.reshape.default, aten.view.default)


@dataclass(frozen=True)
class Columns:
    """`node` is [start, stop) of the last dimension of `source`, by way of the nodes in `through` (nearest first)."""

    node: fx.Node
    source: fx.Node
    start: int
    stop: int
    through: tuple[fx.Node, ...]

    def within(self, whole: Columns) -> Columns:
        """The same columns as a part of what their source is a part of."""
        start = self.start + whole.start
        return Columns(self.node, whole.source, start, start + self.width, (*self.through, *whole.through))

    @property
    def width(self) -> int:
        return self.stop - self.start


def columns(node: Any) -> Columns | None:
    """One step back from a part to what it is a part of; None where `node` is no contiguous part of a last dimension."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node) and node.args[0].target in _LISTS:
        parent, index = node.args
        found = _unbound(node, parent, index, (node, parent)) if parent.target is aten.unbind.int else None
        return found or _listed(node, parent, index)
    if node.target is aten.select.int:
        return _unbound(node, node, node.args[2], (node,))
    return _sliced(node) if node.target in _SLICES else None


def parts(source: fx.Node) -> list[Columns] | None:
    """All that is read of `source`, which may be nothing but parts of its last dimension; None where more is read."""
    found = []
    for user in source.users:
        if user.target in _FOLDS:
            leaves = [u for v in user.users for u in (v.users if v.target is aten.unbind.int else [v])]
        else:
            leaves = list(user.users) if user.target in _LISTS else [user]
        for leaf in leaves:
            part = columns(leaf)
            if part is None or part.source is not source:
                return None
            found.append(part)
    return found


def _listed(node: fx.Node, parent: Any, index: Any) -> Columns | None:
    """Sizes of the parts are read off their values: the spelling of the division does not matter."""
    given = arguments(parent)
    source = given["self"]
    if parent.target is aten.unbind.int or not _is_last(source, given["dim"]):
        return None
    sizes = [part.shape[-1] for part in parent.meta["val"]]
    if not all(isinstance(size, int) for size in sizes):
        return None
    start = sum(sizes[:index])
    return Columns(node, source, start, start + sizes[index], (node, parent))


def _sliced(node: fx.Node) -> Columns | None:
    given = arguments(node)
    source, start = given["self"], given["start"]
    width = shape(source)[-1]
    stop = given["end"] if "end" in given else start + given["length"]
    if given.get("step", 1) != 1 or not _is_last(source, given["dim"]) or not isinstance(width, int):
        return None
    start, stop, _ = slice(start, stop).indices(width)
    return Columns(node, source, start, stop, (node,))


def _unbound(node: fx.Node, parent: Any, index: Any, through: tuple[fx.Node, ...]) -> Columns | None:
    """One of the parts that unflatten(-1, (n, width)) made, chosen along the dimension of n."""
    given = arguments(parent)
    folded = given["self"]
    if folded.target not in _FOLDS:
        return None
    source, sizes = folded.args[0], shape(folded)
    if len(sizes) != len(shape(source)) + 1 or given["dim"] % len(sizes) != len(sizes) - 2:
        return None
    if tuple(sizes[:-2]) != tuple(shape(source)[:-1]) or not isinstance(sizes[-1], int):
        return None
    start = index % sizes[-2] * sizes[-1]
    return Columns(node, source, start, start + sizes[-1], (*through, folded))


def _is_last(source: fx.Node, dim: int) -> bool:
    return dim in (-1, len(shape(source)) - 1)
