"""Dense attention of whole models: the kernels that PyTorch has, and flash-attn-4 where it is installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._dynamo import lookup_backend
from torch.nn.attention import SDPBackend, sdpa_kernel

from chipmunk_fx.ops import flash4

FLASH4 = "flash4"
# flash-attn-4 serves what it is fast for; cuDNN is next for the rest
_FIRST = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    FLASH4: SDPBackend.CUDNN_ATTENTION,
}


def kernels(device: torch.device) -> tuple[str, ...]:
    """Names of the kernels to try there."""
    if device.type != "cuda":
        return ("default",)
    newer = torch.cuda.get_device_capability(device) == flash4.CAPABILITY and flash4.installed()
    return ("flash", "cudnn", *((FLASH4,) if newer else ()))


@contextmanager
def preferred(kernel: str) -> Iterator[None]:
    """Prefer one kernel of scaled_dot_product_attention; the others still serve what it refuses.

    What is compiled in here is cached apart: the kernel is chosen while a graph is traced, and no key of PyTorch's says which.
    """
    if kernel == "default":
        yield
        return
    rest = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
    tag = torch.compiler.config.cache_key_tag + kernel
    cached_apart = torch.compiler.config.patch(cache_key_tag=tag)  # pyright: ignore[reportAttributeAccessIssue]
    with cached_apart, sdpa_kernel(list(dict.fromkeys((_FIRST[kernel], *rest))), set_priority=True):
        yield


def through_op(backend: str) -> Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]:
    """`backend` of torch.compile, with scaled_dot_product_attention as the operator attention_dense, which takes flash-attn-4."""
    compiler: Any = lookup_backend(backend)

    def compiled(module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        for node in module.graph.nodes:
            if node.target is F.scaled_dot_product_attention:
                node.target = _attention
        module.recompile()
        return compiler(module, inputs)

    return compiled


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    plain = attn_mask is None and not dropout_p and not is_causal and query.ndim == 4
    if not plain or value.shape[-1] != query.shape[-1]:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return torch.ops.chipmunk.attention_dense(query, key, value, None, None, scale=scale, sdpa="")
