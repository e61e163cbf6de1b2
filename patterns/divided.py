"""A first linear that makes more than one thing: both branches of a gate, or q, k, v and the MLP's hidden values.

The rows of its weight that the MLP needs become the op's; the others stay a linear of their own.
"""

from __future__ import annotations

import torch
from torch import fx

from chipmunk_fx.graph.columns import Columns, parts
from chipmunk_fx.graph.language import Found
from chipmunk_fx.graph.pattern import Kept, Part
from chipmunk_fx.graph.walk import is_used, shape

aten = torch.ops.aten


def rows(node: fx.Node | None, columns: Columns | None) -> Part | None:
    """Of a weight [F, C] or bias [F], the rows that make `columns` of the product."""
    if node is None or columns is None:
        return None if node is None else Part(node)
    return Part(node, 0, columns.start, columns.stop)


def divided_refusal(found: Found) -> str | None:
    """Why the columns that an MLP reads of a wider linear cannot be told apart from the others."""
    gate, up = found.bound["gate"], found.bound.get("up")
    same = found.bound.get("wu") is found.bound["w1"]
    if same and (gate is None or up is None or max(gate.start, up.start) < min(gate.stop, up.stop)):
        return f"both branches read columns {_span(gate)} and {_span(up)} of the product with {found.bound['w1']}"
    for source in _sources(found):
        if parts(source) is None:
            whole = next((user for user in source.users if user not in found.nodes), "what divides it")
            return f"{source} is also used by {whole} outside the pattern"
    others = _others(found)
    if not others:
        return None
    if len({part.source for part in others}) > 1 or others[0].source.target is not aten.linear.default:
        return f"{others[0].node} reads other columns of {others[0].source}, one of two linears"
    start, stop = _taken(found)
    if shared := next((part for part in others if part.start < stop and part.stop > start), None):
        return f"{shared.node} reads columns of {shared.source} that the MLP reads too"
    if start != 0 and stop != shape(others[0].source)[-1]:
        return f"the MLP reads columns {start} to {stop} of {others[0].source}, in the middle of those read elsewhere"
    return None


def beside(found: Found) -> set[fx.Node]:
    """Nodes outside the pattern that divide the first linear's result."""
    return {node for part in _others(found) for node in part.through}


def kept(found: Found) -> Kept | None:
    """What else the first linear makes, of a match that `divided_refusal` lets pass."""
    others = _others(found)
    if not others:
        return None
    source = others[0].source
    start, stop = _taken(found)
    rest = (stop, shape(source)[-1]) if start == 0 else (0, start)
    bias = found.bound["b1"]
    made = Columns(source, source, *rest, ())
    weight = rows(found.bound["w1"], made)
    assert weight is not None
    return Kept(source, weight, rows(bias, made), tuple(others), rest[0], made.width)


def _sources(found: Found) -> list[fx.Node]:
    return list({c.source: None for c in (found.bound["gate"], found.bound.get("up")) if c is not None})


def _others(found: Found) -> list[Columns]:
    """Parts of the first linears that are read outside the pattern."""
    inside = set(found.nodes)
    read = [part for source in _sources(found) for part in parts(source) or ()]
    return [part for part in read if part.node not in inside and is_used(part.node)]


def _taken(found: Found) -> tuple[int, int]:
    taken = [c for c in (found.bound["gate"], found.bound.get("up")) if c is not None]
    return min(c.start for c in taken), max(c.stop for c in taken)


def _span(columns: Columns | None) -> str:
    return "all" if columns is None else f"{columns.start} to {columns.stop}"
