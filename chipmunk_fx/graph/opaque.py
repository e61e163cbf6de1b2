"""Attention by kernels that a graph shows as one call without a formula: known by name, and left to the user."""

from __future__ import annotations

import re

import torch
from torch import fx

from chipmunk_fx.graph.walk import rank

_NAMES = re.compile(r"attn|attention|sage|fmha")
_OURS = ("chipmunk", "prims")
_OPEN = (torch.ops.aten.scaled_dot_product_attention.default,)


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
