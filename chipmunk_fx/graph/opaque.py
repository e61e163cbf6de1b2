"""Attention by kernels that a graph shows as one call without a formula, and experts in one product: left to the user."""

from __future__ import annotations

import operator
import re

import torch
from torch import fx

from chipmunk_fx.graph.pointwise import POINTWISE
from chipmunk_fx.graph.walk import VIEWS, ancestors, rank, strip

_NAMES = re.compile(r"attn|attention|sage|fmha")
_OURS = ("chipmunk", "prims")
_GROUPED = torch.ops.aten._grouped_mm.default
_BATCHED = (torch.ops.aten.bmm.default, torch.ops.aten.matmul.default, torch.ops.aten.einsum.default)
_BETWEEN = (*VIEWS, *POINTWISE, torch.ops.aten.chunk.default, torch.ops.aten.slice.Tensor, operator.getitem)
_OPEN = (torch.ops.aten.scaled_dot_product_attention.default,)


def grouped_experts(node: fx.Node) -> str | None:
    """Why the experts of a mixture, all in one grouped product after another, are left as they are. None for anything else."""
    if node.target is not _GROUPED or not any(n.target is _GROUPED for n in _behind(node)):
        return None
    return "experts in one grouped product: each reads rows picked out of a sequence, others at every step"


def batched_experts(node: fx.Node) -> str | None:
    """The same of experts in batched products, one matrix for each of them."""
    if not _by_matrices(node) or not any(map(_by_matrices, _behind(node))):
        return None
    return "experts in batched products: each has weights of its own; one linear for all rows is supported"


def _by_matrices(node: fx.Node) -> bool:
    """Whether a product's right operand is a weight of the graph [experts, in, out]."""
    if node.target not in _BATCHED or len(node.all_input_nodes) != 2:
        return False
    weight = strip(node.all_input_nodes[1])
    return rank(weight) == 3 and weight.op in ("placeholder", "get_attr")


def _behind(product: fx.Node) -> list[fx.Node]:
    """What the left operand comes of pointwise, or as a part, and what that is computed of."""
    return ancestors(product.all_input_nodes[0], lambda n: n.target not in _BETWEEN)


def opaque_attention(node: fx.Node) -> str | None:
    """Why an attention that is an operator of its own (flash-attn, sage, xformers, ...) is left as it is.

    Its tensors' layout, scale and masks are a matter between the user and that library. None for anything else.
    """
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target in _OPEN or target.namespace in _OURS:
        return None
    operands = [argument for argument in node.args if isinstance(argument, fx.Node) and rank(argument) in (3, 4)]
    if len(operands) < 3 or not _NAMES.search(f"{target.namespace}.{target.__name__}"):
        return None
    return (
        f"{target} is opaque: it runs as the user chose it. scaled_dot_product_attention (diffusers: "
        'set_attention_backend("native"), or "_native_cudnn") can be computed sparsely'
    )
