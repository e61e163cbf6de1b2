"""What is known of the nodes of a graph: which hold content, how it has ordered their rows, which maps their values tell."""

from __future__ import annotations

import operator
from collections.abc import Container, Iterable
from typing import Any

import torch
from torch import fx

from chipmunk_fx.graph.axes import NONE, Dim, Map, flat, folded, joined, keys, places
from chipmunk_fx.graph.calls import dtype
from chipmunk_fx.graph.sizes import hints
from chipmunk_fx.graph.walk import storage, written


class Content(Container[fx.Node]):
    """Nodes that hold content, and all whose memory one has been written to in place so far."""

    def __init__(self, nodes: Iterable[fx.Node]) -> None:
        self._nodes, self._memories = set(nodes), set[int]()

    def add(self, node: fx.Node) -> None:
        self._nodes.add(node)
        self._memories.update(memory for target in written(node) if (memory := storage(target)) is not None)

    def __contains__(self, node: object) -> bool:
        return node in self._nodes or (
            bool(self._memories) and isinstance(node, fx.Node) and storage(node) in self._memories
        )


class Orders:
    """How content orders the rows of nodes, dimension by dimension, as far as they have been added in the graph's order.

    timed: those whose rows the time orders, and all that is made of them.
    """

    def __init__(self, content: Iterable[fx.Node]) -> None:
        self.content = Content(content)
        self.timed: frozenset[fx.Node] = frozenset()
        self._axes: dict[fx.Node, Dim] = {}
        self._seen: dict[fx.Node, int] = {}
        self._writers: dict[int | None, list[fx.Node]] = {}

    def add(self, node: fx.Node, dims: list[Dim]) -> None:
        """A node that depends on content."""
        self.content.add(node)
        self._seen[node] = len(self._seen)
        if not all(axis.is_plain for axis in flat(dims)):
            self._axes[node] = flat(dims)
            for memory in {storage(target) for target in written(node)}:
                self._writers.setdefault(memory, []).append(node)

    def knows(self, node: fx.Node) -> bool:
        """Whether anything is to be told of a node but its sizes."""
        return node in self._axes or (bool(self._writers) and storage(node) in self._writers)

    def is_moved(self, node: fx.Node, channels: int | None = None) -> bool:
        """Whether content orders a dimension other than that of the channels, or chose a single row, or the time did."""
        if node in self.timed:
            return True
        dims = self.dims(node) if self.knows(node) else []
        apart = None if channels is None else channels % max(len(dims), 1)
        return any(axis.order and (axis.size == 1 or at != apart) for at, dim in enumerate(dims) for axis in dim)

    def dims(self, node: fx.Node) -> list[Dim]:
        """The dimensions of a node, or of the first of several results."""
        shape = sizes(node)
        dims = folded(self._axes.get(node, []), shape)
        for writer in self._writers.get(storage(node), []) if self._writers else []:
            if self._seen[writer] <= self._seen.get(node, -1):
                continue
            wrote = folded(self._axes[writer], sizes(writer))
            if len(wrote) != len(shape):  # to a part, and which is not looked at
                wrote = [flat(wrote)] * len(shape)
            dims = [joined(pair, size) for *pair, size in zip(dims, wrote, shape, strict=True)]
        return dims

    def maps(self, *nodes: fx.Node) -> Map:
        """The maps that values tell."""
        known = [axes for node in nodes if self.knows(node) for axes in (self._axes.get(node, []), *self.dims(node))]
        return NONE.union(*(keys(axes) | places(axes) for axes in known))

    def map(self, *indices: fx.Node) -> Map:
        """The map by which indices or masks move rows; none where they are no content."""
        return NONE.union(*(self.maps(n) or choice(n) for n in indices if n in self.content))


def choice(node: fx.Node) -> Map:
    """The map that an op chooses."""
    return frozenset({(node.args[0] if node.target is operator.getitem else node, 1)})  # pyright: ignore[reportReturnType]


def name(node: fx.Node) -> str:
    """`index_put` of aten.index_put_.default."""
    schema = getattr(node.target, "_schema", None)
    return schema.name.split("::")[-1].rstrip("_") if schema is not None else ""


def sizes(node: fx.Node) -> tuple[int, ...]:
    """Of the node's value, or of the first of several; none where it is a number."""
    value = node.meta.get("val")
    value = value[0] if isinstance(value, (tuple, list)) and value else value
    return hints(value.shape) if isinstance(value, torch.Tensor) else ()


def is_whole(node: fx.Node) -> bool:
    """Whether values are whole numbers or conditions."""
    value: Any = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return not (value.is_floating_point() or value.is_complex())
    return isinstance(value, (int, torch.SymInt, torch.SymBool))


def is_mask(index: fx.Node) -> bool:
    return dtype(index) is torch.bool
