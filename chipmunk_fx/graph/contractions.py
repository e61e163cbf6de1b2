"""Products of rows with a matrix that are written as `einsum` or `tensordot` become products by `matmul`, which patterns know."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from chipmunk_fx.graph.sizes import hint
from chipmunk_fx.graph.walk import is_parameter, placeholders, rank, shape

aten = torch.ops.aten


def to_products(graph: fx.Graph) -> None:
    """With the transpose of a weight that is [out, in], as linears have it."""
    for node in graph.nodes:
        if node.target is aten.einsum.default:
            found = _of_einsum(*node.args[:2])
        elif node.target is aten.tensordot.default:
            found = _of_tensordot(*node.args[:4])
        else:
            continue
        if found is not None:
            x, weight, is_turned = found
            node.target, node.args, node.kwargs = aten.matmul.default, (x, weight), {}
            if not is_turned:
                with graph.inserting_before(node):
                    node.args = x, (other := graph.call_function(aten.t.default, (weight,)))
                other.meta = node.meta | {"val": weight.meta["val"].t()}


def _of_einsum(equation: str, operands: Any) -> tuple[fx.Node, fx.Node, bool] | None:
    """x, the weight and whether that is [in, out], of `...c, fc -> ...f` in any letters and either order."""
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow or len(terms) != 2:
        return None
    pair = list(zip(operands, terms, strict=True))
    for (x, term), (weight, letters) in (pair, pair[::-1]):
        inner, outer = term[-1:], letters.replace(term[-1:], "")
        product = len(letters) == 2 and len(outer) == 1 and outer not in term and term.count(inner) == 1
        if product and result == term[:-1] + outer and _is_matrix(weight) and _fits(x, weight, letters.index(inner)):
            return x, weight, letters[0] == inner
    return None


def _of_tensordot(x: Any, weight: Any, dims: list[int], others: list[int]) -> tuple[fx.Node, fx.Node, bool] | None:
    """The same of a product over the last dimension of x."""
    if (
        len(dims) != 1
        or dims[0] % rank(x) != rank(x) - 1
        or not _is_matrix(weight)
        or not _fits(x, weight, others[0] % 2)
    ):
        return None
    return x, weight, others[0] % 2 == 0


def _fits(x: fx.Node, weight: fx.Node, dim: int) -> bool:
    """Whether the inner dimension is as long in both: einsum repeats one of length 1."""
    return hint(shape(x)[-1]) == hint(shape(weight)[dim])


def _is_matrix(weight: Any) -> bool:
    if not isinstance(weight, fx.Node) or rank(weight) != 2:
        return False
    sources = placeholders(weight)
    return bool(sources) and all(map(is_parameter, sources))
