"""Dimensions along which a tensor says the same everywhere, told by the ops that made it: masks copied for every head or row."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from chipmunk_fx.graph.calls import CASTS, SAME, arguments
from chipmunk_fx.graph.walk import rank, shape, writers

aten = torch.ops.aten

FOLDS = (
    *(aten.reshape.default, aten.view.default, aten._unsafe_view.default),
    *(aten.flatten.using_ints, aten.unflatten.int, aten.contiguous.default, aten.clone.default),
)
_NAMES = (
    *("__and__", "__or__", "bitwise_and", "bitwise_or", "bitwise_not", "logical_and", "logical_or", "logical_not"),
    *("eq", "ne", "gt", "ge", "lt", "le", "add", "sub", "rsub", "mul", "masked_fill", "where"),
)
_POINTWISE = frozenset(
    [
        *CASTS,
        *SAME,
        *(getattr(getattr(aten, n), o) for n in _NAMES for o in getattr(aten, n).overloads() if "out" not in o),
    ]
)
_SPREADS = (aten.expand.default, aten.repeat.default)


def alike(node: fx.Node, dim: int) -> bool:
    """Whether the values are surely the same all along `dim`."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return False
    dim %= value.dim()
    if statically_known_true(value.shape[dim] == 1) or statically_known_true(value.stride()[dim] == 0):
        return True
    if node.op != "call_function" or writers([node]):
        return False
    if node.target in _POINTWISE or node.target in _SPREADS:
        return all(_below(source, dim, value.dim()) for source in node.all_input_nodes if rank(source))
    if node.target in FOLDS:
        return _in_runs(node.all_input_nodes[0], shape(node), dim)
    return _moved(node, dim)


def _below(node: fx.Node, dim: int, above: int) -> bool:
    """The same of what is broadcast to `above` dimensions."""
    dim -= above - rank(node)
    return dim < 0 or alike(node, dim)


def _moved(node: fx.Node, dim: int) -> bool:
    given: dict[str, Any] = arguments(node)
    source = given.get("self")
    if not isinstance(source, fx.Node):
        return False
    if node.target is aten.transpose.int:
        first, second = given["dim0"] % rank(node), given["dim1"] % rank(node)
        return alike(source, {first: second, second: first}.get(dim, dim))
    if node.target is aten.permute.default:
        return alike(source, given["dims"][dim])
    if node.target is aten.unsqueeze.default:
        return alike(source, dim - (dim > given["dim"] % rank(node)))
    if node.target is aten.slice.Tensor:
        return alike(source, dim)
    return node.target is aten.repeat_interleave.self_int and given["dim"] is not None and alike(source, dim)


def _in_runs(source: fx.Node, sizes: Sequence[Any], dim: int) -> bool:
    """Whether a dimension of a reshaped tensor is just the copies side by side that repeat_interleave made."""
    if source.target is not aten.repeat_interleave.self_int or writers([source]):
        return False
    given: dict[str, Any] = arguments(source)
    if given["dim"] is None:
        return False
    after = shape(source)[given["dim"] % rank(source) + 1 :]
    return statically_known_true(sizes[dim] == given["repeats"]) and statically_known_true(
        prod(sizes[dim + 1 :]) == prod(after)
    )
