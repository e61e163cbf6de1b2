"""Rows that content chooses or orders (expert choice, mixture of depths, tokens sorted or merged by likeness).

From step to step they are other tokens, so that nothing kept of one is of any use to the next.
"""

from __future__ import annotations

import operator
from collections.abc import Container, Iterable
from typing import Any

import torch
from torch import fx

from chipmunk_fx.graph.calls import arguments, dtype
from chipmunk_fx.graph.capture import Capture
from chipmunk_fx.graph.inputs import Roles
from chipmunk_fx.graph.pattern import AttentionOperands, MlpOperands
from chipmunk_fx.graph.region import Region
from chipmunk_fx.graph.walk import VIEWS, is_pointwise, rank, storage, strip, written

_PICKS = ("gather", "index_select", "index", "take_along_dim", "take", "masked_select", "embedding")
_ORDERS = ("sort", "topk", "msort")
_SENDS = ("scatter", "scatter_add", "scatter_reduce", "index_put", "index_add", "index_copy", "masked_scatter")
_PRODUCTS = ("matmul", "mm", "bmm", "einsum")
_REDUCTIONS = ("mean", "sum", "amax", "amin", "var", "std")
_SIZES = (  # of all that a tensor says, they read these alone
    *("sym_size", "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like"),
    *("new_zeros", "new_ones", "new_full", "new_empty"),
)
_REASON = "tokens are chosen or ordered by their content, which changes from step to step"


class _Marked(Container[fx.Node]):
    """Nodes marked, and all whose memory a marked one has written to in place so far."""

    def __init__(self, nodes: Iterable[fx.Node] = ()) -> None:
        self._nodes, self._memories = set(nodes), set[int]()

    def add(self, node: fx.Node) -> None:
        self._nodes.add(node)
        self._memories.update(memory for target in written(node) if (memory := storage(target)) is not None)

    def __contains__(self, node: object) -> bool:
        return node in self._nodes or (
            bool(self._memories) and isinstance(node, fx.Node) and storage(node) in self._memories
        )


def chosen_rows(capture: Capture, roles: Roles) -> Container[fx.Node]:
    """The nodes whose rows are chosen or ordered by what the latents, or other activations, hold."""
    content, chosen = _Marked(_activations(capture, roles)), _Marked()
    for node in capture.module.graph.nodes:
        if _name(node) in _SIZES or not any(source in content for source in node.all_input_nodes):
            continue
        content.add(node)
        if node.op == "call_function" and _is_chosen(node, content, chosen):
            chosen.add(node)
    return chosen


def choice_refusal(operands: AttentionOperands | MlpOperands | None, chosen: Container[fx.Node]) -> str | None:
    """Why the rows that a site reads are not those that its caches were made of."""
    if isinstance(operands, AttentionOperands):
        read = [operands.q.node, operands.k.node, operands.v.node]
    else:
        read = [operands.x] if operands else []
    return f"its {_REASON}" if any(node in chosen for node in read) else None


def steady(region: Region | str, chosen: Container[fx.Node]) -> Region | str:
    """Blocks that can be skipped, or why they cannot: what they added last was added to other rows."""
    streams = () if isinstance(region, str) else region.streams
    return f"their {_REASON}" if any(s.start in chosen or s.stop in chosen for s in streams) else region


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


def _is_chosen(node: fx.Node, content: _Marked, chosen: _Marked) -> bool:
    """Whether rows of an op's result are chosen by content, where some of its operands are `content` or `chosen`."""
    name, sources = _name(node), node.all_input_nodes
    if name in _SENDS:
        sent = _sent(node)
        astray = sent in content and sent not in chosen  # rows that nothing picked before are not put back
        return sources[0] in chosen or (astray and _by_content(node, content))
    if name in _PICKS:
        if sources[0] in chosen and (undone := _undone(node)):
            return any(pick.args[0] in chosen for pick in undone)
        return sources[0] in chosen or (sources[0] in content and _by_content(node, content))
    if name in _ORDERS:
        return sources[0] in chosen or _along_rows(node)
    if name == "scaled_dot_product_attention":
        return sources[0] in chosen
    if name in _PRODUCTS:  # the rows are those of the left operand
        left = next(source for source in sources if source in content)
        return left in chosen or _name(strip(left)) == "one_hot"
    if name in _REDUCTIONS and _along_rows(node):
        return False
    return any(source in chosen for source in sources)


def _by_content(node: fx.Node, content: _Marked) -> bool:
    """Whether an op picks rows, not columns, and where they lie depends on content."""
    return any(place in content for place in _places(node)) and _along_rows(node)


def _places(node: fx.Node) -> list[Any]:
    """What tells an op which rows to read or write."""
    given = arguments(node)
    told = next(given[key] for key in ("indices", "index", "mask") if key in given)
    return [place for place in (told if isinstance(told, (list, tuple)) else [told]) if place is not None]


def _sent(node: fx.Node) -> Any:
    given = arguments(node)
    return next((given[key] for key in ("src", "source", "values") if key in given), None)


def _undone(pick: fx.Node) -> list[fx.Node]:
    """The picks in an order that one in the inverse order undoes: by an argsort, or by numbers sent to where it says."""
    inverse = strip(_places(pick)[-1])
    counted = _sent(inverse) if _name(inverse) in _SENDS else None
    if isinstance(counted, fx.Node) and _name(strip(counted)) == "arange":
        order = strip(_places(inverse)[-1])
    elif (sort := _sort(inverse)) is not None and not arguments(sort)["descending"]:
        order = strip(sort.all_input_nodes[0])
    else:
        return []
    return [] if _sort(order) is None else _picks_by(order)


def _sort(order: fx.Node) -> fx.Node | None:
    """The op that a permutation comes of."""
    of_two = order.target is operator.getitem and order.args[1] == 1
    sort = order.all_input_nodes[0] if of_two else order
    return sort if _name(sort) == ("sort" if of_two else "argsort") else None


def _picks_by(order: fx.Node) -> list[fx.Node]:
    """The ops that pick in an order, or by other whole numbers that are reckoned of it."""
    numbers, picks = [order], []
    for number in numbers:  # which grows
        for user in number.users:
            is_pick = _name(user) in _PICKS and user.args[0] is not number
            picks += [user] if is_pick else []
            reckoned = is_pick or user.target in VIEWS or is_pointwise(user)
            if reckoned and user not in numbers and not (dtype(user) or torch.float32).is_floating_point:
                numbers.append(user)
    return picks


def _along_rows(node: fx.Node) -> bool:
    """Whether an op works along another dimension than the last one alone."""
    given: dict[str, Any] = arguments(node)
    last = max(rank(node.all_input_nodes[0]), 1) - 1
    if isinstance(places := given.get("indices"), (list, tuple)):
        first = next(index for index, place in enumerate(places) if place is not None)
        return first < last
    dims = given.get("dim") or 0  # none is all of them
    return any(dim % (last + 1) != last for dim in (dims if isinstance(dims, (list, tuple)) else [dims]))


def _name(node: fx.Node) -> str:
    """`index_put` of aten.index_put_.default."""
    schema = getattr(node.target, "_schema", None)
    return schema.name.split("::")[-1].rstrip("_") if schema is not None else ""
