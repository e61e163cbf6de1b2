"""Two linears with something between that no pattern knows: listed, so that no MLP goes unsaid."""

from __future__ import annotations

import operator
from collections.abc import Collection

import torch
from torch import fx

from chipmunk_fx.graph.calls import CASTS, SAME
from chipmunk_fx.graph.walk import LINEAR, PROJECTIONS, VIEWS, is_used, rank, shape

aten = torch.ops.aten

_CONVOLUTIONS = tuple(op for op in PROJECTIONS if op not in LINEAR)
_PARTS = (operator.getitem, aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.slice.Tensor)
_SILENT = (*VIEWS, *CASTS, *SAME, *_PARTS, aten.mT.default, aten.numpy_T.default, aten.swapaxes.default)
_ENDS = (  # what makes of hidden values something that is no MLP's
    *(aten.scaled_dot_product_attention.default, aten.matmul.default, aten.bmm.default, aten.mm.default),
    *(aten.einsum.default, aten.baddbmm.default, aten.addmm.default, aten.cat.default, aten.index.Tensor),
)


def unknown_between(last: fx.Node, explained: Collection[fx.Node]) -> tuple[str, fx.Node] | None:
    """Why a linear that narrows what another one widened is no MLP's, and that other; None where it is, or nothing is between.

    `explained`: the nodes of all candidates.
    """
    if not _is_linear(last) or rank(last) < 3 or last in explained or not is_used(last):
        return None
    between: dict[fx.Node, None] = {}
    firsts: dict[fx.Node, None] = {}
    queue = [last.args[0]]
    while queue:
        node = queue.pop()
        if not isinstance(node, fx.Node) or node in between or node in firsts:
            continue
        if node.target in _ENDS or node in explained:
            return None
        if _is_linear(node):
            firsts[node] = None
            continue
        if node.op == "call_function":
            between[node] = None
            # of a convolution the weight is no stream
            queue += node.all_input_nodes[:1] if node.target in _CONVOLUTIONS else node.all_input_nodes
    first = next(iter(firsts), None)
    if first is None or not all(_widens(node, last) and node.args[0] is first.args[0] for node in firsts):
        return None
    ops = [str(node.target).split(".")[1] for node in reversed(between) if node.target not in _SILENT]
    if not ops:
        return None
    stand = ", ".join(dict.fromkeys(ops))
    return f"between {first} and {last} stand {stand}; a pointwise function of each neuron is supported", first


def _is_linear(node: fx.Node) -> bool:
    """A linear, or a convolution of one place."""
    if node.target in _CONVOLUTIONS:
        return all(size == 1 for size in shape(node.args[1])[2:])  # pyright: ignore[reportArgumentType]
    return node.target in LINEAR


def _widens(first: fx.Node, last: fx.Node) -> bool:
    """Whether `first` goes from a width to more, and `last` back to that width."""
    wide, narrow = (shape(node.args[1])[:2] for node in (first, last))  # pyright: ignore[reportArgumentType]
    return wide[0] > wide[1] and wide[1] == narrow[0] and rank(first) >= 3
