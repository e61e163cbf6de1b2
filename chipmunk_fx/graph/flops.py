"""Floating-point operations of a graph's products (a multiply and an add count two)."""

from __future__ import annotations

from collections.abc import Collection
from math import prod

import torch
from torch import fx

from chipmunk_fx.graph.sizes import hints
from chipmunk_fx.graph.walk import shape

aten = torch.ops.aten

_PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.mm.default)
_ATTENTION = aten.scaled_dot_product_attention.default
_CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.convolution.default)


def product_flops(module: fx.GraphModule, leave_out: Collection[fx.Node] = ()) -> int:
    """Sum over linears, matrix products, convolutions and attention; `leave_out` are counted by their sites."""
    skip = set(leave_out)
    return sum(node_flops(n) for n in module.graph.nodes if n.op == "call_function" and n not in skip)


def node_flops(node: fx.Node) -> int:
    if node.target is aten.linear.default:
        return 2 * _numel(node) * hints(shape(node.args[1]))[-1]
    if node.target in _PRODUCTS:
        return 2 * _numel(node) * hints(shape(node.args[0]))[-1]
    if node.target in (aten.baddbmm.default, aten.addmm.default):
        return 2 * _numel(node) * hints(shape(node.args[1]))[-1]
    if node.target in _CONVOLUTIONS:
        return 2 * _numel(node) * prod(hints(shape(node.args[1]))[1:])
    if node.target is _ATTENTION:
        q, k, v = (hints(shape(a)) for a in node.args[:3])
        return 2 * prod(q[:-1]) * k[-2] * (q[-1] + v[-1])
    return 0


def _numel(node: fx.Node) -> int:
    return prod(hints(shape(node)))
