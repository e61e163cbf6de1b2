"""The operators torch.ops.chipmunk.*: schemas, what a tracer sees of them, and the plain PyTorch that runs them.

Every argument named with "!" is written in place and read by later calls; nothing else is. The operators take part in
graphs as opaque calls, serve any device, and leave gradients to the caller (they are used where none are needed).
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from chipmunk_fx.ops.attention import attention_refresh, attention_sparse
from chipmunk_fx.ops.mlp import mlp_refresh, mlp_sparse

NAMESPACE = "chipmunk"

_MLP = (
    "Tensor x, Tensor w1, Tensor? b1, Tensor? wu, Tensor? bu, Tensor w2, Tensor? b2, Tensor? order, Tensor clock, "
    "Tensor(a!) hidden, Tensor(b!) out, Tensor(c!) mean, Tensor(d!) lists, *, str activation, int group_rows"
)
SCHEMAS = MappingProxyType(
    {
        "attention_refresh": (
            "(Tensor q, Tensor k, Tensor v, Tensor? order, Tensor? always, Tensor clock, Tensor(a!) rest, "
            "Tensor(b!) share, Tensor(c!) lists, *, float scale, int group_rows, float random_density, float power, "
            "int mass_stride, int seed, int site) -> Tensor"
        ),
        "attention_sparse": (
            "(Tensor q, Tensor k, Tensor v, Tensor? order, Tensor rest, Tensor share, Tensor lists, *, float scale, "
            "int group_rows) -> Tensor"
        ),
        "mlp_refresh": f"({_MLP}) -> Tensor",
        "mlp_sparse": f"({_MLP}, float random_density, int seed, int site) -> Tensor",
    }
)
REFERENCE: MappingProxyType[str, Callable[..., Tensor]] = MappingProxyType(
    {
        "attention_refresh": attention_refresh,
        "attention_sparse": attention_sparse,
        "mlp_refresh": mlp_refresh,
        "mlp_sparse": mlp_sparse,
    }
)


def bind(op: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of `op` by name."""
    return dict(zip(argument_names(op), args, strict=False)) | dict(kwargs)


def argument_names(op: str, keywords: bool = False) -> list[str]:
    """The positional arguments of `op`, or its keyword-only ones, in order."""
    schema = getattr(getattr(torch.ops, NAMESPACE), op).default._schema
    return [argument.name for argument in schema.arguments if argument.kwarg_only == keywords]


def attention_fake(q: Tensor, *_, **__) -> Tensor:
    """[B, H, N, D] over contiguous [B, N, H, D]."""
    batch, heads, rows, width = q.shape
    return q.new_empty(batch, rows, heads, width).transpose(1, 2)


def mlp_fake(x: Tensor, w1: Tensor, b1: Tensor, wu: Tensor, bu: Tensor, w2: Tensor, *_, **__) -> Tensor:
    """[..., C2], contiguous."""
    return x.new_empty(*x.shape[:-1], w2.shape[0])


def _define() -> torch.library.Library:
    # kept alive by the module: the operators vanish with it
    library = torch.library.Library(NAMESPACE, "DEF")
    for name, schema in SCHEMAS.items():
        # exact strides: inputs arrive as the model laid them out, so that Inductor neither pads nor copies them
        library.define(name + schema, tags=torch.Tag.needs_exact_strides)
        library.impl(name, REFERENCE[name], "CompositeExplicitAutograd")
        fake = attention_fake if name.startswith("attention") else mlp_fake
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    return library


LIBRARY = _define()
