"""What ops do to the order of rows, and which maps of positions their results tell.

Whole numbers and conditions that are made of content are maps: indices, masks, one-hot rows. A gather (or a product with
one-hot rows) moves rows by a map, a scatter (or a product with the transpose) by its inverse.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from chipmunk_fx.graph import axes
from chipmunk_fx.graph.axes import NONE, Axis, Dim, Map, flat, folded, keys, marked, moved, order, places
from chipmunk_fx.graph.calls import arguments
from chipmunk_fx.graph.indexing import PICKS, SENDS, is_permutation, picked, sent
from chipmunk_fx.graph.orders import Orders, choice, is_mask, is_whole, name, sizes
from chipmunk_fx.graph.walk import NORMS, PROJECTIONS, VIEWS, is_pointwise, rank

_RESHAPES = ("view", "reshape", "_unsafe_view", "view_as", "unflatten", "flatten", "ravel", "unsqueeze", "squeeze")
_PERMUTES = ("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "mT", "numpy_T")
_COPIES = ("expand", "expand_as", "repeat", "copy")  # one row may become many
_SORTS = ("sort", "topk", "msort", "argsort")
_PRODUCTS = ("matmul", "mm", "bmm", "einsum", "linear")
_GROUPED = ("_grouped_mm", "_scaled_grouped_mm")  # their offsets tell weights, not rows
# They mark any number of rows, and each stays where it is.
_INEQUALITIES = ("gt", "ge", "lt", "le", "greater", "greater_equal", "less", "less_equal")
_BLURS = ("softmax", "_softmax", "log_softmax", "scaled_dot_product_attention")  # no row of theirs is one-hot
_SIZES = (  # of all that a tensor says, they read these alone
    *("sym_size", "sym_numel", "sym_stride", "new_zeros", "new_ones", "new_full", "new_empty"),
    *("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like"),
)

Name = str | int
"""A dimension in an einsum: a letter, or one of `...` counted from the last."""


def follow(node: fx.Node, orders: Orders) -> None:
    """Adds a node to `orders`, if it depends on content."""
    sources = [source for source in node.all_input_nodes if source in orders.content]
    if name(node) in _SIZES or not sources:
        return
    told = any(orders.knows(source) or is_whole(source) for source in sources)
    concerned = node.op == "call_function" and (told or is_whole(node) or name(node) in _SORTS)
    orders.add(node, _moved(node, orders) if concerned else [])


def _moved(node: fx.Node, orders: Orders) -> list[Dim]:
    for names, rule in ((PICKS, picked), (SENDS, sent), (_SORTS, _sorted)):
        if name(node) in names:
            return rule(node, orders)
    return _told(node, (_product if name(node) in _PRODUCTS else _laid)(node, orders), orders)


def _told(node: fx.Node, dims: list[Dim], orders: Orders) -> list[Dim]:
    """The same with what the values tell."""
    sources = [source for source in node.all_input_nodes if source in orders.content]
    whole, maps = is_whole(node), orders.maps(*sources)
    item, same = node.target is operator.getitem, is_pointwise(node) or node.target in VIEWS
    begins = whole and not (item or same or any(map(is_whole, sources)))  # argmax, bucketize
    largest = not whole and (
        name(sources[0]) in _SORTS if item else _is_reduction(node) and isinstance(node.meta["val"], tuple)
    )
    if begins or largest or name(node) in _BLURS or node.target in (*NORMS, *PROJECTIONS):
        dims, maps = [marked(dim) for dim in dims], NONE
    if not whole or (name(node) in _INEQUALITIES and not maps):
        return dims
    if not maps or not dims:
        return [marked(dim, maps or choice(node)) for dim in dims or [[Axis(1)]]]
    if not is_pointwise(node) or any(map(places, dims)):
        return dims
    # a condition on indices compares them with all that they may be
    beside = (NONE, maps) if is_mask(node) else (maps,)
    return [dim if keys(dim) else marked(dim, *beside) for dim in dims]


def _laid(node: fx.Node, orders: Orders) -> list[Dim]:
    """The dimensions of a result for which rows are not moved by a map, if it is not by one that only this op knows."""
    source = node.all_input_nodes[0]
    dims, shape, given = orders.dims(source), sizes(node), arguments(node) if name(node) else {}
    if rule := _LAYOUTS.get(name(node)):
        return rule(node, dims, shape)
    if _is_reduction(node):
        return _reduced(dims, given.get("dim"), given.get("keepdim", False))
    if name(node) == "stack":
        at = given["dim"] % len(shape)
        dims = _aligned(node, orders, (*shape[:at], *shape[at + 1 :]))
        return [*dims[:at], [Axis(shape[at])], *dims[at:]]
    told = [n for n in node.all_input_nodes if n in orders.content and is_whole(n) and not is_whole(source)]
    if not told or is_pointwise(node) or name(node) in (*_COPIES, *_GROUPED):
        return _aligned(node, orders, shape)
    dims, along = _aligned(node, orders, shape, told), given.get("dim")  # repeat_interleave
    at = range(len(shape)) if not isinstance(along, int) else [along % len(shape)]
    return [moved(dim, choice(node), shape[k]) if k in at else dim for k, dim in enumerate(dims)]


def _permuted(node: fx.Node, dims: list[Dim], shape: tuple[int, ...]) -> list[Dim]:
    probe: Any = torch.empty(tuple(range(2, 2 + len(dims))), device="meta")  # dimensions are told by their sizes
    return [dims[size - 2] for size in node.target(probe, *node.args[1:], **node.kwargs).shape]  # pyright: ignore


def _selected(node: fx.Node, dims: list[Dim], shape: tuple[int, ...]) -> list[Dim]:
    at = arguments(node)["dim"] % len(dims)
    return folded(flat([*dims[:at], [Axis(1, order(dims[at]))], *dims[at + 1 :]]), shape)


def _one_hot(node: fx.Node, dims: list[Dim], shape: tuple[int, ...]) -> list[Dim]:
    return [*dims, [Axis(shape[-1], places=NONE.union(*map(keys, dims)))]]


_Layout = Callable[[fx.Node, list[Dim], tuple[int, ...]], list[Dim]]
_LAYOUTS: Mapping[str, _Layout] = MappingProxyType(
    {
        **dict.fromkeys(_RESHAPES, lambda node, dims, shape: folded(flat(dims), shape)),
        **dict.fromkeys(_PERMUTES, _permuted),
        **dict.fromkeys(("select", "unbind"), _selected),
        "one_hot": _one_hot,
        "scaled_dot_product_attention": lambda node, dims, shape: [*dims[:-1], [Axis(shape[-1])]],
    }
)


def _reduced(dims: list[Dim], along: Any, kept: bool) -> list[Dim]:
    """What is left where all rows of some dimensions, in whatever order, are made one."""
    given = along if isinstance(along, (list, tuple)) else [] if along is None else [along]
    gone = {at % max(len(dims), 1) for at in given} or set(range(len(dims)))
    return [[Axis(1)] if at in gone else dim for at, dim in enumerate(dims) if kept or at not in gone]


def _is_reduction(node: fx.Node) -> bool:
    return torch.Tag.reduction in getattr(node.target, "tags", ())


def _aligned(node: fx.Node, orders: Orders, shape: tuple[int, ...], but: Sequence[fx.Node] = ()) -> list[Dim]:
    """Dimension by dimension, counted from the last, what the operands have; rows copied to all places are in no order."""
    found: list[list[Dim]] = [[] for _ in shape]
    copies = is_pointwise(node) or name(node) in _COPIES
    whole = [n for n in node.all_input_nodes if n in orders.content and sizes(n) == shape]
    single = not copies or all(any(a.size == 1 and a.order for a in flat(orders.dims(n))) for n in whole)
    for source in (n for n in node.all_input_nodes if orders.knows(n) and n not in but):
        dims, given = orders.dims(source), sizes(source)
        if len(dims) > len(shape) or (len(dims) < len(shape) and not copies):
            dims, given = _matched(dims, given, shape), shape
        if (
            copies and whole and given[-1:] == (1,) != shape[-1:]
        ):  # weights of rows that are where another operand has them
            dims = [axes.unordered(dim) for dim in dims]
        for dim, size, into, wide in zip(dims[::-1], given[::-1], found[::-1], shape[::-1], strict=False):
            if copies and size != wide:
                dim = []
            elif not single or (copies and given != shape):  # the one row that was chosen is added to each
                dim = [a if a.size != 1 else Axis(1, (), a.keys, a.places) for a in dim]
            into.append(dim)
    return [axes.joined(dims, size) for dims, size in zip(found, shape, strict=True)]


def _matched(dims: list[Dim], given: tuple[int, ...], shape: tuple[int, ...]) -> list[Dim]:
    """Dimensions of another number: those in front that are alike, and of all others anything."""
    pairs = enumerate(zip(given, shape, strict=False))
    alike = next((at for at, (one, other) in pairs if one != other), min(len(given), len(shape)))
    return [*dims[:alike], *[flat(dims[alike:])] * (len(shape) - alike)]


def _sorted(node: fx.Node, orders: Orders) -> list[Dim]:
    """Sorted values and their indices. To sort the indices of a sort is its inverse."""
    given, source, shape = arguments(node), node.all_input_nodes[0], sizes(node)
    dims, at = orders.dims(source), given.get("dim", 0) % max(len(shape), 1)
    back = name(node) != "topk" and is_permutation(source) and not given.get("descending")
    by = axes.inverse(orders.maps(source)) if back else choice(node)
    dims[at : at + 1] = [moved(dim, by, shape[at]) for dim in dims[at : at + 1]]
    return [marked(dim, by) for dim in dims]


def _product(node: fx.Node, orders: Orders) -> list[Dim]:
    """Rows of one operand or, where they are one-hot, of the other that they pick or send."""
    operands, terms, result = _subscripts(node)
    laid = [dict(zip(term, orders.dims(n), strict=True)) for n, term in zip(operands, terms, strict=True)]
    dims: list[Dim] = []
    for letter, size in zip(result, sizes(node), strict=True):
        own: list[Dim] = []
        told: list[Dim] = []
        for weights in (operand for operand in laid if letter in operand):
            own.append(weights[letter])
            for source, rows in zip(operands, laid, strict=True):
                shared = [n for n in weights if n in rows and n not in result and letter not in rows]
                by = NONE.union(*(_map(weights, letter, n) for n in shared))
                dim = next((rows[n] for n in shared if order(rows[n])), [Axis(1)])
                if by and source in orders.content:
                    told += [moved(dim, by, size), axes.unordered(weights[letter])]
                elif any(order(rows[n]) not in ((), order(weights[n])) for n in shared) and not orders.maps(source):
                    own.append([Axis(size, order(dim))])  # each of its rows is a sum over others
        dims.append(axes.joined(told or own, size))
    return dims


def _map(weights: dict[Name, Dim], row: Name, column: Name) -> Map:
    """What a matrix moves rows by, if it is one-hot along its columns, or its rows."""
    one, other = weights[row], weights[column]
    if keys(one) and places(other):
        # rows of an index that a choice made are moved along the dimension of that choice
        among = any(keys(dim) and order(dim) for dim in weights.values())
        return keys(one) | places(other) if order(one) or not among else NONE
    return axes.inverse(places(one) | keys(other)) if places(one) and keys(other) else NONE


def _subscripts(node: fx.Node) -> tuple[list[fx.Node], list[list[Name]], list[Name]]:
    """The operands of a product, and the names of their dimensions and the result's, as an einsum has them."""
    if name(node) == "einsum":
        operands: list[fx.Node] = arguments(node)["tensors"]
        left, arrow, right = arguments(node)["equation"].replace(" ", "").partition("->")
        if not arrow:
            once = [letter for letter in sorted(set(left) - set(".,")) if left.count(letter) == 1]
            right = "".join(["..." if "..." in left else "", *once])
        terms = [_named(term, rank(n)) for term, n in zip(left.split(","), operands, strict=True)]
        return operands, terms, _named(right, rank(node))
    first: Any = node.args[0]
    second: Any = node.args[1]
    one, other = rank(first), rank(second)
    before, after = range(2 - one, 0), range(2 - other, 0)
    if name(node) == "linear":
        before = range(1 - one, 0)
        return [first, second], [[*before, "k"], [*"nk"[-other:]]], [*before, *"n"[: other - 1]]
    terms = [[*before, *"mk"[-one:]], [*after, *"kn"[:other]]]
    return [first, second], terms, [*max(before, after, key=len), *"m"[: one - 1], *"n"[: other - 1]]


def _named(term: str, dims: int) -> list[Name]:
    front, dots, back = term.partition("...")
    return [*front, *(range(len(front) + len(back) - dims, 0) if dots else ()), *back]
