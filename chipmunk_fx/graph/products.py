"""Products in a row without a softmax between (linear attention, sigmoid attention): listed, so that no attention goes unsaid."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable

import torch
from torch import fx

from chipmunk_fx.graph.calls import CASTS, SAME
from chipmunk_fx.graph.pointwise import POINTWISE
from chipmunk_fx.graph.walk import VIEWS, is_used, projections, rank

aten = torch.ops.aten

_PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.einsum.default, aten.baddbmm.default)
_PARTS = (
    *(aten.slice.Tensor, aten.select.int, aten.cat.default, aten.stack.default, aten.constant_pad_nd.default),
    operator.getitem,
)
_LEAST = 3  # of four operands that are projections of tokens: a recurrence begins with zeros
_SILENT = (*VIEWS, *CASTS, *SAME, *_PARTS, aten.mT.default)
_MASKS = (aten.tril.default, aten.triu.default, aten.masked_fill.Scalar, aten.where.self)
_BETWEEN = (*_SILENT, *_MASKS, *(POINTWISE - {aten.exp.default}))  # exponentials are a softmax's


def unweighted(nodes: Iterable[fx.Node], explained: Collection[fx.Node]) -> list[tuple[fx.Node, fx.Node, str]]:
    """Products (last, first) of three projections of tokens that no candidate explains, and why they are left as they are."""
    found = []
    for last in nodes:
        if last.target not in _PRODUCTS or rank(last) < 3 or last in explained or not is_used(last):
            continue
        first, between = _before(last)
        if first is None or first in explained or sum(map(_of_tokens, _operands(first, last))) < _LEAST:
            continue
        ops = ", ".join(dict.fromkeys(str(n.target).split(".")[1] for n in between if n.target not in _SILENT))
        stand = f"stand {ops} and no softmax" if ops else "stands no softmax"
        why = f"between the products {first} and {last} {stand}: linear attention, or weights of another kind"
        found.append((last, first, f"{why}; softmax(q k^T) v is supported"))
    return found


def _before(last: fx.Node) -> tuple[fx.Node | None, list[fx.Node]]:
    """The product nearest behind an operand of another, and what stands between, in order."""
    seen, queue = {last}, [last]
    while queue:
        node = queue.pop(0)
        if node is not last and node.target in _PRODUCTS:
            return node, sorted(n for n in seen if n > node and n is not last and n.target in _BETWEEN)
        fresh = [n for n in node.all_input_nodes if n not in seen] if node is last or node.target in _BETWEEN else []
        seen.update(fresh)
        queue.extend(fresh)
    return None, []


def _operands(first: fx.Node, last: fx.Node) -> list[fx.Node]:
    return [*first.all_input_nodes, *last.all_input_nodes]


def _of_tokens(operand: fx.Node) -> bool:
    return any(rank(n) >= 3 for n in projections(operand))
