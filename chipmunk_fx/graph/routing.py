"""Rows that content chooses or orders (expert choice, mixture of depths, tokens sorted or merged by likeness).

From step to step they are other tokens, so that nothing kept of one is of any use to the next. Indices, masks and one-hot
matrices that are made of content are maps of positions: a gather (or a product with one-hot rows) moves rows by one, a
scatter (or a product with its transpose) by the inverse, and rows moved by a map and then its inverse are where they were.
"""

from __future__ import annotations

import operator
from collections.abc import Container, Iterable
from typing import Any

import torch
from torch import fx

from chipmunk_fx.graph.axes import NOWHERE, Axis, Map, Part, bare, folded, inverse, joined, keyed, moved, order
from chipmunk_fx.graph.calls import arguments, dtype
from chipmunk_fx.graph.capture import Capture
from chipmunk_fx.graph.inputs import Roles
from chipmunk_fx.graph.pattern import AttentionOperands, MlpOperands
from chipmunk_fx.graph.region import Region
from chipmunk_fx.graph.sizes import hints
from chipmunk_fx.graph.walk import NORMS, PROJECTIONS, VIEWS, is_pointwise, rank, storage, strip, written

_RESHAPES = ("view", "reshape", "_unsafe_view", "view_as", "unflatten", "flatten", "ravel", "unsqueeze", "squeeze")
_PERMUTES = ("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "mT", "numpy_T")
_COPIES = ("expand", "expand_as", "repeat", "copy")  # one row may become many
_PICKS = ("gather", "take_along_dim", "index", "index_select", "take", "masked_select", "embedding")
_SENDS = (
    *("scatter", "scatter_add", "scatter_reduce", "index_put", "index_add", "index_copy", "index_fill"),
    "masked_scatter",
)
_ORDERS = ("sort", "topk", "msort", "argsort")
_PRODUCTS = ("matmul", "mm", "bmm", "einsum", "linear")
_UNMOVED = (
    *_COPIES,
    *_PRODUCTS,
    "_grouped_mm",
    "_scaled_grouped_mm",
)  # whatever whole numbers are among their operands
_MARKS = (
    "gt",
    "ge",
    "lt",
    "le",
    "greater",
    "greater_equal",
    "less",
    "less_equal",
)  # more or less: no row is pointed to
_BLURS = ("softmax", "_softmax", "log_softmax", "scaled_dot_product_attention")  # no zeros are left of one-hot rows
_SIZES = (  # of all that a tensor says, they read these alone
    *("sym_size", "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like"),
    *("new_zeros", "new_ones", "new_full", "new_empty"),
)
_REASON = "tokens are chosen or ordered by their content, which changes from step to step"


class _Content(Container[fx.Node]):
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


class Orders(Container[fx.Node]):
    """How content orders the rows of a graph's nodes. In it are those of whose rows it orders any."""

    def __init__(self, content: Iterable[fx.Node], nodes: Iterable[fx.Node]) -> None:
        self.content = _Content(content)
        self._axes: dict[fx.Node, Part] = {}
        self._at: dict[fx.Node, int] = {}
        self._writers: dict[int, list[fx.Node]] = {}
        for at, node in enumerate(nodes):
            self._at[node] = at
            if _name(node) in _SIZES or not any(source in self.content for source in node.all_input_nodes):
                continue
            axes = _axes(_result(node, self)) if node.op == "call_function" else []
            self.content.add(node)
            if not all(axis.is_plain for axis in axes):
                self._axes[node] = axes
                for memory in {storage(target) for target in written(node)} - {None}:
                    self._writers.setdefault(memory, []).append(node)  # pyright: ignore[reportArgumentType]

    def __contains__(self, node: object) -> bool:
        return isinstance(node, fx.Node) and self.moved(node)

    def moved(self, node: fx.Node, channels: int = -1) -> bool:
        """Whether content orders a dimension other than that of the channels, or chose a single row."""
        dims = self.dims(node)
        return any(
            axis.order and (axis.size == 1 or at != channels % len(dims))
            for at, part in enumerate(dims)
            for axis in part
        )

    def dims(self, node: Any) -> list[Part]:
        """Of the dimensions of a node, or of the first of several results, the axes."""
        sizes = _sizes(node)
        dims = folded(self._axes.get(node, []), sizes)
        later = self._writers.get(storage(node) or 0, []) if self._writers else []
        for writer in (writer for writer in later if self._at[writer] > self._at[node]):
            others = folded(self._axes[writer], _sizes(writer))
            if len(others) != len(sizes):  # it wrote to a part, and which is not looked at
                others = [_axes(others)] * len(sizes)
            dims = [joined(pair, size) for *pair, size in zip(dims, others, sizes, strict=True)]
        return dims

    def maps(self, *nodes: fx.Node) -> Map:
        """What the values of nodes tell."""
        axes = [axis for n in nodes for part in (self._axes.get(n, []), *self.dims(n)) for axis in part]
        return NOWHERE.union(*(axis.keys | axis.places for axis in axes))

    def index(self, node: fx.Node) -> Map:
        """The map that an op moves rows by which reads an index or a mask."""
        return (self.maps(node) or _first(node)) if node in self.content else NOWHERE


def chosen_rows(capture: Capture, roles: Roles) -> Orders:
    """How what the latents, or other activations, hold orders the rows of all nodes."""
    return Orders(_activations(capture, roles), capture.module.graph.nodes)


def choice_refusal(operands: AttentionOperands | MlpOperands | None, orders: Orders) -> str | None:
    """Why the rows that a site reads are not those that its caches were made of."""
    if isinstance(operands, AttentionOperands):
        read = [(laid.node, (laid.dims or [-1])[-1]) for laid in (operands.q, operands.k, operands.v)]
    else:
        read = [(operands.x, 1 if operands.channels_first else -1)] if operands else []
    return f"its {_REASON}" if any(orders.moved(node, -1 if at is None else at) for node, at in read) else None


def steady(region: Region | str, orders: Orders) -> Region | str:
    """Blocks that can be skipped, or why they cannot: what they added last was added to other rows."""
    streams = () if isinstance(region, str) else region.streams
    return f"their {_REASON}" if any(s.start in orders or s.stop in orders for s in streams) else region


def _activations(capture: Capture, roles: Roles) -> list[fx.Node]:
    """The latents and, mostly in a piece of a model, streams whose role is not known."""
    told = {roles.timestep, *roles.ids, *roles.text}
    inputs = [n for n in capture.module.graph.nodes if n.op == "placeholder"]
    return [
        node
        for index, (node, entry) in enumerate(zip(inputs, capture.inputs, strict=True))
        if index == roles.latents
        or (index not in told and not entry.is_parameter and rank(node) >= 3 and entry.value.is_floating_point())
    ]


def _result(node: fx.Node, orders: Orders) -> list[Part]:
    """The axes of an op's result, some of whose operands are content."""
    name = _name(node)
    if name in _PICKS:
        return _picked(node, orders)
    if name in _SENDS:
        return _sent(node, orders)
    if name in _ORDERS:
        return _sorted(node, orders)
    return _told(node, _product(node, orders) if name in _PRODUCTS else _laid(node, orders), orders)


def _told(node: fx.Node, dims: list[Part], orders: Orders) -> list[Part]:
    """The same with what the values tell: whole numbers and conditions made of content are maps from then on."""
    sources = [source for source in node.all_input_nodes if source in orders.content]
    maps, name, whole = orders.maps(*sources), _name(node), _is_whole(node)
    item = node.target is operator.getitem
    reduced = not (
        item or is_pointwise(node) or node.target in VIEWS or any(map(_is_whole, sources))
    )  # argmax, bucketize
    ends = name in _BLURS or node.target in (*NORMS, *PROJECTIONS) or (whole and reduced)
    ends |= not whole and (item or torch.Tag.reduction in getattr(node.target, "tags", ()))
    dims, maps = ([bare(part) for part in dims], NOWHERE) if ends else (dims, maps)
    if not whole or name in _MARKS:
        return dims
    if not dims or not maps:
        return [[keyed(axis, maps or _first(node)) for axis in part] for part in dims or [[Axis(1)]]]
    if is_pointwise(node) and not any(axis.places for part in dims for axis in part):
        compared = dtype(node) is torch.bool  # with all that it may be: one-hot rows
        return [
            [a if a.keys else Axis(a.size, a.order, *((NOWHERE, maps) if compared else (maps,))) for a in part]
            for part in dims
        ]
    return dims


def _laid(node: fx.Node, orders: Orders) -> list[Part]:
    """The axes of a result in whose making no index moves rows."""
    name, source, sizes = _name(node), node.all_input_nodes[0], _sizes(node)
    dims, given = orders.dims(source), arguments(node) if _name(node) else {}
    dim = given.get("dim")
    if name in _RESHAPES:
        return folded(_axes(dims), sizes)
    if name in _PERMUTES:
        probe = torch.empty(tuple(range(2, 2 + len(dims))), device="meta")  # told by their sizes
        return [dims[size - 2] for size in node.target(probe, *node.args[1:], **node.kwargs).shape]  # pyright: ignore
    if name in ("select", "unbind"):
        dims[dim % len(dims)] = [Axis(1, order(dims[dim % len(dims)]))]
        return folded(_axes(dims), sizes)
    if name == "stack":
        dims = _aligned(node, orders, sizes[: dim % len(sizes)] + sizes[dim % len(sizes) + 1 :])
        return [*dims[: dim % len(sizes)], [Axis(sizes[dim % len(sizes)])], *dims[dim % len(sizes) :]]
    if name == "one_hot":
        return [*dims, [Axis(sizes[-1], (), NOWHERE, orders.maps(source))]]
    if name == "scaled_dot_product_attention":
        return [*dims[:-1], [Axis(sizes[-1])]]
    if torch.Tag.reduction in getattr(node.target, "tags", ()):
        gone = (
            range(len(dims))
            if dim in (None, [])
            else [d % len(dims) for d in (dim if isinstance(dim, list) else [dim])]
        )
        kept = [[Axis(1)] if at in gone else part for at, part in enumerate(dims)]
        return kept if given.get("keepdim") else [part for at, part in enumerate(kept) if at not in gone]
    whole = [s for s in node.all_input_nodes[1:] if s in orders.content and _is_whole(s)]
    dims = _aligned(node, orders, sizes)
    if whole and not is_pointwise(node) and not _is_whole(source) and name not in _UNMOVED:
        at = range(len(dims)) if not isinstance(dim, int) else [dim % len(dims)]
        dims = [moved(part, _first(node), sizes[k]) if k in at else part for k, part in enumerate(dims)]
    return dims


def _aligned(node: fx.Node, orders: Orders, sizes: tuple[int, ...]) -> list[Part]:
    """Dimension by dimension what the operands have, counted from the last; of a row copied to many nothing is left."""
    found: list[list[Part]] = [[] for _ in sizes]
    for source in node.all_input_nodes:
        dims, given = orders.dims(source), _sizes(source)
        if len(dims) > len(sizes) or (len(dims) < len(sizes) and not is_pointwise(node) and _name(node) not in _COPIES):
            same = next(
                (k for k, pair in enumerate(zip(given, sizes, strict=False)) if pair[0] != pair[1]),
                min(len(dims), len(sizes)),
            )
            rest = _axes(dims[same:])
            dims, given = [*dims[:same], *[rest] * (len(sizes) - same)], sizes
        copied = (is_pointwise(node) or _name(node) in _COPIES) and given != sizes
        for part, size, whole, into in zip(dims[::-1], given[::-1], sizes[::-1], found[::-1], strict=False):
            if copied:
                part = (
                    []
                    if size != whole
                    else [axis if axis.size != 1 else Axis(1, (), axis.keys, axis.places) for axis in part]
                )
            into.append(part)
    return [joined(parts, size) for parts, size in zip(found, sizes, strict=True)]


def _sorted(node: fx.Node, orders: Orders) -> list[Part]:
    """Sorted values, or their indices; an argsort of the indices is the inverse."""
    given, source, sizes = arguments(node), node.all_input_nodes[0], _sizes(node)
    dims, at = orders.dims(source), given.get("dim", 0) % max(len(sizes), 1)
    undone = _name(node) != "topk" and _is_permutation(source) and not given.get("descending")
    by = inverse(orders.maps(source)) if undone else _first(node)
    dims[at : at + 1] = [moved(part, by, sizes[at]) for part in dims[at : at + 1]]
    return [[keyed(axis, by) for axis in part] for part in dims]


def _picked(node: fx.Node, orders: Orders) -> list[Part]:
    """Rows read where an index says: of content those that it chose; a table has its values in the index's own order."""
    name, given, sizes = _name(node), arguments(node), _sizes(node)
    source = given.get("self", given.get("weight"))
    dims, dim, told = orders.dims(source), given.get("dim"), _told_by(node)
    if name in ("gather", "take_along_dim") and dim is not None:
        index, at = told[0], dim % len(sizes)
        laid = [bare(part) for part in orders.dims(index)]
        found = [joined(pair, size) for *pair, size in zip(dims, laid, sizes, strict=True)]
        found[at] = _read(dims[at], orders.index(index), laid[at], sizes[at], source in orders.content)
    else:
        if name in ("take", "take_along_dim", "masked_select"):
            dims = [_axes(dims)]
        found = _indexed(source, dims, [*[None] * ((dim or 0) % len(dims)), *told], sizes, orders)
    if not _is_whole(node):
        return found
    maps = NOWHERE.union(*(orders.index(n) for n in [source, *told] if n is not None)) or _first(node)
    return [[keyed(axis, maps) for axis in part] for part in found]


def _indexed(source: fx.Node, dims: list[Part], told: list[Any], sizes: tuple[int, ...], orders: Orders) -> list[Part]:
    """source[told], where None leaves a dimension as it is, and a mask takes as many as it has."""
    spots, content = _spots(told), source in orders.content
    first = spots[0][1].start if spots[-1][1].start - spots[0][1].start < len(spots) else 0
    width = max(1 if _is_mask(index) else rank(index) for index, _ in spots)
    lead: list[Part] = []
    alone = content
    for at, size in enumerate(sizes[first : first + width]):
        read: dict[bool, list[Part]] = {True: [], False: []}
        for index, spot in spots:
            laid = {width - 1: [Axis(size)]} if _is_mask(index) else _from_last(orders.dims(index), width)
            if at in laid and (_is_mask(index) or _from_last(_sizes(index), width)[at] == size):
                by = orders.index(index)
                read[bool(by)].append(_read(_axes(dims[spot]), by, laid[at], size, content))
        lead.append(joined(read[False] or read[True], size))
        alone &= bool(read[False] or not read[True])
    by = NOWHERE.union(*(orders.index(index) for index, _ in spots))
    kept = [part for at, part in enumerate(dims) if not any(spot.start <= at < spot.stop for _, spot in spots)]
    if not content:  # rows of zeros and ones, it may be
        lead = [[keyed(axis, by) for axis in part] for part in lead]
        kept = [[Axis(axis.size, axis.order, NOWHERE, by) for axis in part] for part in kept]
    elif by and alone:
        lead.append([Axis(1, (by,))])
    return [*kept[:first], *lead, *kept[first:]]


def _read(rows: Part, by: Map, laid: Part, size: int, content: bool) -> Part:
    """One dimension of what an index reads."""
    if not content:
        return bare(laid)
    return moved(rows, by, size) if by else joined([rows], size)


def _sent(node: fx.Node, orders: Orders) -> list[Part]:
    """Rows written where an index says: those that it picked before are in their places again."""
    given, sizes, told = arguments(node), _sizes(node), _told_by(node)
    target: Any = node.args[0]
    source = next((given[key] for key in ("src", "source", "values") if key in given), None)
    dims, dim = orders.dims(target), given.get("dim")
    if dim is not None:
        spots = [(told[0], slice(dim % len(sizes), dim % len(sizes) + 1))]
    else:
        spots = [(told[0], slice(0, len(sizes)))] if "mask" in given else _spots(told)
    still = [spot.start for index, spot in spots if index not in orders.content]
    spots = [spot for spot in spots if spot[0] in orders.content]
    by = NOWHERE.union(*(orders.index(index) for index, _ in spots))
    inside = [at for at in range(len(sizes)) if any(spot.start <= at < spot.stop for _, spot in spots)]
    if not by:
        return _aligned(node, orders, sizes)
    if source in orders.content:
        sent = orders.dims(source)
        rows = sent[inside[0]] if dim is not None else _axes(sent)
        astray = order(moved(rows, inverse(by), sizes[inside[0]]))
        # onto tokens, rows are put back that were sorted by their values, not by an index
        if astray and not (target in orders.content and order(rows)):
            dims = [
                joined([part, [Axis(sizes[at], astray)]], sizes[at]) if at in inside else part
                for at, part in enumerate(dims)
            ]
    if target in orders.content:
        return dims
    if isinstance(source, fx.Node) and _name(strip(source)) == "arange":  # the inverse of a permutation
        back = inverse(by) if _is_permutation(told[-1]) else _first(node)
        return [[keyed(axis, back) for axis in part] for part in dims]
    along = _from_last(orders.dims(told[0]), len(sizes)) if dim is not None else {}
    keys = {at for at, part in along.items() if any(axis.keys for axis in part)} or set(still)
    return [
        [
            Axis(a.size, a.order, by if at in keys and at not in inside else NOWHERE, by if at in inside else NOWHERE)
            for a in part
        ]
        for at, part in enumerate(dims)
    ]


def _product(node: fx.Node, orders: Orders) -> list[Part]:
    """Rows of one operand, or of content what one-hot rows of the other pick or send."""
    operands, letters, result = _subscripts(node)
    laid = [dict(zip(names, orders.dims(n), strict=True)) for n, names in zip(operands, letters, strict=True)]
    dims: list[Part] = []
    for letter, size in zip(result, _sizes(node), strict=True):
        own: list[Part] = []
        told: list[Part] = []
        for weights in (parts for parts in laid if letter in parts):
            own.append(weights[letter])
            for rows, parts in zip(operands, laid, strict=True):
                shared = [] if letter in parts else sorted((weights.keys() & parts.keys()) - set(result))
                by = {_by(weights[letter], weights[name]) for name in shared} - {NOWHERE}
                part = next((parts[name] for name in shared if order(parts[name])), [Axis(1)])
                if by and rows in orders.content:
                    told += [moved(part, by.pop(), size), [Axis(a.size, (), a.keys, a.places) for a in own[-1]]]
                elif any(order(parts[name]) not in ((), order(weights[name])) for name in shared):
                    own.append([Axis(size, order(part))])
        dims.append(joined(told or own, size))
    return dims


def _by(row: Part, column: Part) -> Map:
    """What rows of weights move rows by whose places, or keys, are the weights' columns."""
    keys, places = NOWHERE.union(*(axis.keys for axis in row)), NOWHERE.union(*(axis.places for axis in column))
    if keys and places:
        return keys | places
    keys, places = NOWHERE.union(*(axis.keys for axis in column)), NOWHERE.union(*(axis.places for axis in row))
    return inverse(keys | places) if keys and places else NOWHERE


def _subscripts(node: fx.Node) -> tuple[list[Any], list[str], str]:
    """The operands of a product, and what an einsum would name their dimensions and the result's."""
    given, many = arguments(node), "0123456789"
    if _name(node) == "einsum":
        operands, (left, _, result) = given["tensors"], given["equation"].replace(" ", "").partition("->")
        names = left.split(",")
        wide = [many[len(many) - rank(n) + len(said) - 3 :] for n, said in zip(operands, names, strict=True)]
        if "->" not in given["equation"]:
            result = "..." * ("..." in left) + "".join(sorted(c for c in set(left) - {",", "."} if left.count(c) == 1))
        names = [said.replace("...", dots) for said, dots in zip(names, wide, strict=True)]
        return (
            operands,
            names,
            result.replace(
                "...", max((d for d, n in zip(wide, left.split(","), strict=True) if "..." in n), key=len, default="")
            ),
        )
    left, right = node.args[:2]
    first, second = rank(left), rank(right)  # pyright: ignore[reportArgumentType]
    if _name(node) == "linear":
        return (
            [left, right],
            [many[len(many) - first + 1 :] + "k", "nk"[2 - second :]],
            many[len(many) - first + 1 :] + "n"[: second - 1],
        )
    a, b = (many[len(many) - max(n - 2, 0) :] for n in (first, second))
    rows, columns = "m"[: first - 1], "n"[: second - 1]
    return [left, right], [f"{a}{rows}k", f"{b}k{columns}"], f"{max(a, b, key=len)}{rows}{columns}"


def _told_by(node: fx.Node) -> list[Any]:
    """What tells an op where to read or write rows."""
    given = arguments(node)
    told = next(given[key] for key in ("indices", "index", "mask") if key in given)
    return list(told) if isinstance(told, (list, tuple)) else [told]


def _spots(told: list[Any]) -> list[tuple[fx.Node, slice]]:
    """Indices, and the dimensions that each of them reads or writes."""
    spots, at = [], 0
    for index in told:
        wide = rank(index) if index is not None and _is_mask(index) else 1
        spots += [] if index is None else [(index, slice(at, at + wide))]
        at += wide
    return spots


def _is_permutation(index: fx.Node) -> bool:
    """Whether an index is the order of a sort, not of a part of it."""
    index = strip(index)
    of_two = index.target is operator.getitem and index.args[1] == 1
    return _name(index.all_input_nodes[0] if of_two else index) == ("sort" if of_two else "argsort")


def _is_whole(node: fx.Node) -> bool:
    """Whether values are whole numbers or conditions."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return not (value.is_floating_point() or value.is_complex())
    return isinstance(value, (int, torch.SymInt, torch.SymBool))


def _is_mask(index: fx.Node) -> bool:
    return dtype(index) is torch.bool


def _first(node: fx.Node) -> Map:
    """The map that an op chooses."""
    return frozenset({(node.args[0] if node.target is operator.getitem else node, 1)})  # pyright: ignore[reportReturnType]


def _axes(dims: list[Part]) -> Part:
    return [axis for part in dims for axis in part]


def _from_last(values: Any, width: int) -> dict[int, Any]:
    """Values of dimensions by their places among `width`, counted from the last."""
    return {at + width - len(values): value for at, value in enumerate(values)}


def _sizes(node: Any) -> tuple[int, ...]:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    value = value[0] if isinstance(value, (tuple, list)) and value else value
    return hints(value.shape) if isinstance(value, torch.Tensor) else ()


def _name(node: Any) -> str:
    """`index_put` of aten.index_put_.default."""
    schema = getattr(node.target, "_schema", None)
    return schema.name.split("::")[-1].rstrip("_") if schema is not None else ""
