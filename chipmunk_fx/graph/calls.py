"""ATen calls: their arguments by name, and which of them change no value."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

CASTS = (
    *(aten.to.dtype, aten.to.dtype_layout, aten.to.other, aten.to.device, aten._to_copy.default, aten.type_as.default),
)
ALIASES = (aten.alias.default, aten.detach.default)
SAME = (*ALIASES, aten.contiguous.default, aten.clone.default)


def arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments of an ATen call by schema name, defaults filled in."""
    schema = node.target._schema.arguments  # pyright: ignore[reportFunctionMemberAccess, reportAttributeAccessIssue]
    filled = {a.name: a.default_value for a in schema if a.has_default_value()}
    filled.update(zip((a.name for a in schema), node.args, strict=False))
    return filled | dict(node.kwargs)


def is_identity(node: Any) -> bool:
    """Ops that return their first argument's values unchanged (same shape, same dtype)."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    if node.target in SAME or is_no_dropout(node):
        return True
    if node.target in CASTS:
        source = node.args[0]
        return isinstance(source, fx.Node) and dtype(source) is not None and dtype(source) == dtype(node)
    return False


def is_no_dropout(node: fx.Node) -> bool:
    """A dropout that drops nothing: outside training, or of probability 0."""
    return node.target is aten.dropout.default and (arguments(node)["train"] is False or arguments(node)["p"] == 0)


def dtype(node: fx.Node) -> torch.dtype | None:
    return getattr(node.meta.get("val"), "dtype", None)
