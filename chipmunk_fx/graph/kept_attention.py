"""Attentions that a rewritten graph leaves dense: by the kernel that the user chose, and long ones by flash-attn-4."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from chipmunk_fx.graph.calls import arguments
from chipmunk_fx.graph.capture import SDPA_CHOICE
from chipmunk_fx.ops import flash4

SDPA = torch.ops.aten.scaled_dot_product_attention.default


def keep_kernels(graph: fx.Graph) -> None:
    """Write the user's choice of kernel into the graph; where there is none, leave long attentions to our dense operator."""
    for node in graph.nodes:
        if allowed := _allowed(node):
            node.target, node.args = _chosen_attention, (allowed, *node.args)
        elif is_long(node):
            given = arguments(node)
            scale = given["query"].meta["val"].shape[-1] ** -0.5 if given["scale"] is None else given["scale"]
            node.target, node.kwargs = torch.ops.chipmunk.attention_dense.default, {"scale": scale, "sdpa": ""}
            node.args = (given["query"], given["key"], given["value"], None, None)


def is_long(node: fx.Node) -> bool:
    """Whether it is an attention for flash-attn-4: plain, of static sizes, left to us by the user, on a card where it pays."""
    if node.target is not SDPA or _allowed(node):
        return False
    given = arguments(node)
    if given["attn_mask"] is not None or given["dropout_p"] or given["is_causal"]:
        return False
    q, k, v = (given[name].meta["val"] for name in ("query", "key", "value"))
    static = all(isinstance(size, int) for x in (q, k, v) for size in x.shape)
    if not static or q.ndim != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        return False
    return q.shape[1] % k.shape[1] == 0 and flash4.suits(q, k) and flash4.installed()  # where it pays it is imported


def has_long_attention(graph: fx.Graph) -> bool:
    return any(is_long(node) for node in graph.nodes)


def _allowed(node: fx.Node) -> str | None:
    return node.meta.get("custom", {}).get(SDPA_CHOICE) if node.target is SDPA else None


def _chosen_attention(allowed: str, *args: Any, **kwargs: Any) -> torch.Tensor:
    with sdpa_kernel([getattr(SDPBackend, name) for name in allowed.split(",")]):
        return SDPA(*args, **kwargs)
