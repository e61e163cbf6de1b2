"""Write out what Dynamo's graph holds as one call though its formula is known: checkpoints, PyTorch's encoder layer, GLU.

Without gradients a checkpointed region is no more than its body, and the fused kernel of nn.TransformerEncoderLayer no
more than the layer: written out, their attention and MLPs are found as any others are.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

_CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint
_PADDING, _NO_MASK = 1, None  # what the fused layer calls its masks


def open_up(graph: fx.Graph, module: fx.GraphModule) -> None:
    """Regions within regions too; what is not known stays as it is. `module` holds what `graph` refers to."""
    while region := next((n for n in graph.nodes if n.target is _CHECKPOINT), None):
        _inline(graph, module, region)
    for node in graph.nodes:
        if node.target is torch._transformer_encoder_layer_fwd and _is_plain(node):
            node.target = encoder_layer
        elif node.target is F.glu:
            node.target = glu


def encoder_layer(
    src: Tensor,
    width: int,
    heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    gelu: bool,
    norm_first: bool,
    eps: float,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    """torch._transformer_encoder_layer_fwd of src [B, N, width], as documented for nn.TransformerEncoderLayer.

    `mask`: None, or bool [B, N], true where a key is padding.
    """

    def attend(x: Tensor) -> Tensor:
        qkv = F.linear(x, qkv_weight, qkv_bias).unflatten(-1, (3, heads, width // heads))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        present = None if mask is None else ~mask[:, None, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=present)
        return F.linear(out.transpose(1, 2).flatten(2), proj_weight, proj_bias)

    def feed_forward(x: Tensor) -> Tensor:
        hidden = F.linear(x, w1, b1)
        return F.linear(F.gelu(hidden) if gelu else F.relu(hidden), w2, b2)

    def norm1(x: Tensor) -> Tensor:
        return F.layer_norm(x, (width,), norm1_weight, norm1_bias, eps)

    def norm2(x: Tensor) -> Tensor:
        return F.layer_norm(x, (width,), norm2_weight, norm2_bias, eps)

    if norm_first:
        x = src + attend(norm1(src))
        return x + feed_forward(norm2(x))
    x = norm1(src + attend(src))
    return norm2(x + feed_forward(x))


def glu(input: Tensor, dim: int = -1) -> Tensor:  # named as in torch: keywords are passed on
    value, gate = input.chunk(2, dim)
    return value * gate.sigmoid()


def _is_plain(layer: fx.Node) -> bool:
    """Whether the layer's mask is one that `encoder_layer` takes."""
    mask, kind = (*layer.args[18:20], None, None)[:2]
    mask, kind = layer.kwargs.get("mask", mask), layer.kwargs.get("mask_type", kind)
    if not isinstance(mask, fx.Node):
        return mask is _NO_MASK
    value = mask.meta.get("example_value")
    return kind == _PADDING and isinstance(value, Tensor) and value.dtype == torch.bool and value.dim() == 2


def _inline(graph: fx.Graph, module: fx.GraphModule, region: fx.Node) -> None:
    """The body of a region in the place of its call: its inputs are the call's arguments."""
    held, *arguments = region.args
    assert isinstance(held, fx.Node)
    body: Any = module.get_submodule(str(held.target))
    inputs = [n for n in body.graph.nodes if n.op == "placeholder"]
    copied: dict[fx.Node, Any] = dict(zip(inputs, arguments, strict=True))
    with graph.inserting_before(region):
        results = graph.graph_copy(body.graph, copied)
    for node in copied.values():
        if isinstance(node, fx.Node) and node.op == "get_attr" and node not in arguments:
            node.target = f"{held.target}.{node.target}"
    for user in list(region.users):
        if user.target is not operator.getitem:
            raise NotImplementedError(f"{user} takes all results of {region}")
        user.replace_all_uses_with(results[user.args[1]])  # pyright: ignore
        graph.erase_node(user)
    graph.erase_node(region)
    if not held.users:
        graph.erase_node(held)
