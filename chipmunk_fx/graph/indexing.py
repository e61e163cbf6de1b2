"""Reads and writes of rows at places that an index or a mask tells."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from chipmunk_fx.graph.axes import NONE, Axis, Dim, Map, flat, inverse, joined, keys, marked, moved, order, size_of
from chipmunk_fx.graph.calls import arguments
from chipmunk_fx.graph.orders import Orders, choice, is_mask, is_whole, name, sizes
from chipmunk_fx.graph.walk import rank, strip

PICKS = ("gather", "take_along_dim", "index", "index_select", "take", "masked_select", "embedding")
SENDS = (
    *("scatter", "scatter_add", "scatter_reduce", "index_put", "index_add", "index_copy", "index_fill"),
    *("index_reduce", "masked_scatter"),
)

Spot = tuple[fx.Node, range]
"""An index or a mask, and the dimensions that it reads or writes."""


def picked(node: fx.Node, orders: Orders) -> list[Dim]:
    """Rows that are read."""
    given, shape, told = arguments(node), sizes(node), _told_by(node)
    source = given.get("self", given.get("weight"))
    dims, along = orders.dims(source), given.get("dim")
    if name(node) in ("gather", "take_along_dim") and along is not None:
        at, laid = along % len(shape), [marked(dim) for dim in orders.dims(told[0])]
        found = [joined(pair, size) for *pair, size in zip(dims, laid, shape, strict=True)]
        found[at] = _read(dims[at], orders.map(told[0]), laid[at], shape[at], source in orders.content)
    else:
        if name(node) in ("take", "take_along_dim", "masked_select"):
            dims = [flat(dims)]
        found = _indexed(source, dims, [*[None] * ((along or 0) % len(dims)), *told], shape, orders)
    if not is_whole(node):
        return found
    maps = orders.map(source, *(index for index in told if index is not None)) or choice(node)
    return [marked(dim, maps) for dim in found]


def _indexed(source: fx.Node, dims: list[Dim], told: list[Any], shape: tuple[int, ...], orders: Orders) -> list[Dim]:
    """source[told], where None leaves a dimension as it is."""
    spots, content = _spots(told), source in orders.content
    apart = spots[-1][1].start - spots[0][1].start >= len(spots)
    first, wide = 0 if apart else spots[0][1].start, max(1 if is_mask(n) else rank(n) for n, _ in spots)
    lead: list[Dim] = []
    alone = True
    for back, size in enumerate(shape[first : first + wide], -wide):
        reads: dict[bool, list[Dim]] = {True: [], False: []}
        for index, spot in spots:
            if (laid := _laid(index, back, size, orders)) is not None:
                by, rows = orders.map(index), flat(dims[spot.start : spot.stop])
                reads[bool(by)].append(_read(rows, by, laid, size, content))
        # where another index counts (the samples, say), a choice of content is one for each
        lead.append(joined(reads[False] or reads[True], size))
        alone &= not reads[True] or bool(reads[False])
    by = orders.map(*(index for index, _ in spots))
    kept = [dim for at, dim in enumerate(dims) if not any(at in spot for _, spot in spots)]
    if not content:  # a table, of one-hot rows it may be
        lead, kept = [marked(dim, by) for dim in lead], [marked(dim, places=by) for dim in kept]
    elif by and alone:
        lead.append([Axis(1, (by,))])
    return [*kept[:first], *lead, *kept[first:]]


def _laid(index: fx.Node, back: int, size: int, orders: Orders) -> Dim | None:
    """A dimension of an index, counted from the last; None where it does not vary, or another is that of the choice."""
    if is_mask(index):
        return [Axis(size)]
    dims = orders.dims(index)
    if back < -len(dims) or sizes(index)[back] != size:
        return None
    return dims[back] if order(dims[back]) or not any(map(order, dims)) else None


def _read(rows: Dim, by: Map, laid: Dim, size: int, content: bool) -> Dim:
    """Of content the rows that are chosen; what is read of a table is laid out as the index is."""
    if not content:
        return marked(laid)
    return moved(rows, by, size) if by else joined([rows], size)


def sent(node: fx.Node, orders: Orders) -> list[Dim]:
    """Rows that others are written to; those that the same map picked are where they were again."""
    given, shape, told = arguments(node), sizes(node), _told_by(node)
    target: Any = node.args[0]
    source = next((given[key] for key in ("src", "source", "values") if key in given), None)
    dims, along = orders.dims(target), given.get("dim")
    spots = [(told[0], range(along % len(shape), along % len(shape) + 1))] if along is not None else _spots(told)
    by, tokens = orders.map(*(index for index, _ in spots)), target in orders.content
    inside = [at for index, spot in spots for at in spot if index in orders.content or not by]
    if isinstance(source, fx.Node) and source in orders.content:
        rows = orders.dims(source)
        came = rows[inside[0]] if along is not None else flat(rows)
        # sorted values, of which no index tells where they were, are put among tokens by any
        back = by and tokens and order(came)
        steps = () if back else order(moved(came, inverse(by), shape[inside[0]]) if by else came)
        dims = _written(dims, rows, [Axis(shape[at], steps) if at in inside else None for at in range(len(shape))])
    if tokens or not by:
        return dims
    if isinstance(source, fx.Node) and name(strip(source)) == "arange":
        return [marked(dim, inverse(by) if is_permutation(told[-1]) else choice(node)) for dim in dims]
    laid = orders.dims(told[0]) if along is not None else []
    beside = {at + len(shape) - len(laid) for at, dim in enumerate(laid) if keys(dim)}
    beside |= {at for index, spot in spots for at in spot if index not in orders.content}
    return [marked(dim, by if k in beside else NONE, by if k in inside else NONE) for k, dim in enumerate(dims)]


def _written(dims: list[Dim], rows: list[Dim], inside: list[Axis | None]) -> list[Dim]:
    """Dimensions that rows were written to, along some of them as an index says, along the others as they are."""
    beside: list[Dim] = [*([] for _ in dims), *rows][-len(dims) :]
    pairs = zip(dims, beside, inside, strict=True)
    return [joined([dim, [axis] if axis else marked(other)], size_of(dim)) for dim, other, axis in pairs]


def is_permutation(index: fx.Node) -> bool:
    """Whether an index is all of what a sort yields."""
    index = strip(index)
    of_two = index.target is operator.getitem and index.args[1] == 1
    return name(index.all_input_nodes[0] if of_two else index) == ("sort" if of_two else "argsort")


def _told_by(node: fx.Node) -> list[Any]:
    given = arguments(node)
    told = next(given[key] for key in ("indices", "index", "mask") if key in given)
    return list(told) if isinstance(told, (list, tuple)) else [told]


def _spots(told: list[Any]) -> list[Spot]:
    spots, at = [], 0
    for index in told:
        wide = rank(index) if index is not None and is_mask(index) else 1
        spots += [] if index is None else [(index, range(at, at + wide))]
        at += wide
    return spots
