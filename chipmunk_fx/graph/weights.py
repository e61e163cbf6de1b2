"""Attention weights that never meet values in a way that a pattern begins with: listed, so that no attention goes unsaid."""

from __future__ import annotations

import operator
from collections.abc import Collection

import torch
from torch import fx

from chipmunk_fx.graph.calls import arguments
from chipmunk_fx.graph.pointwise import POINTWISE
from chipmunk_fx.graph.walk import VIEWS, rank, reaches

aten = torch.ops.aten

_PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.einsum.default, aten.baddbmm.default)
_CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
_PARTS = (aten.slice.Tensor, aten.select.int, aten.cat.default, aten.chunk.default, aten.split.Tensor, operator.getitem)
_BETWEEN = (*VIEWS, *_PARTS, *POINTWISE, aten.masked_fill.Scalar, aten.where.self, aten.where.ScalarOther)


def unread_weights(softmax: fx.Node, anchors: Collection[fx.Node]) -> str | None:
    """Why a softmax over scores belongs to no candidate, of which `anchors` are the ends; None where it does, or has none.

    Scores are a product of two activations: a router's come out of a linear.
    """
    if softmax.target is not aten.softmax.int or rank(softmax) < 3 or not _is_product(softmax.all_input_nodes[0]):
        return None
    if arguments(softmax)["dim"] not in (-1, rank(softmax) - 1):
        return None
    if reaches(softmax, _BETWEEN, lambda node, user: user in anchors):
        return None
    users = ", ".join(sorted({str(user.target) for user in softmax.users}))
    return f"its weights {softmax} go to {users}; their product with values, weights first, is supported"


def _is_product(node: fx.Node) -> bool:
    """Whether `node` was a product of two tensors before scales, masks, views and other columns came to it."""
    seen, queue = {node}, [node]
    while queue:
        node = queue.pop()
        if node.target in _PRODUCTS:
            return True
        sources = node.all_input_nodes if node.target in _BETWEEN else []
        if node.target in _CONVOLUTIONS:  # that mixes the scores of heads
            sources = node.all_input_nodes[:1]
        fresh = [n for n in sources if n not in seen]
        seen.update(fresh)
        queue.extend(fresh)
    return False
