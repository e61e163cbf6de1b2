"""Pieces of patterns that several share."""

from __future__ import annotations

import torch

from chipmunk_fx.graph.calls import CASTS, dtype
from chipmunk_fx.graph.language import Call, Expression, Literal, OneOf, Where

ANYTHING = Literal(lambda _: True, "anything")
_TO = {name: ANYTHING for name in ("dtype", "layout", "device", "pin_memory", "non_blocking", "copy", "memory_format")}


def cast(inner: Expression) -> Call:
    return Call(CASTS, {"self": inner, **_TO})


def maybe_cast(inner: Expression) -> OneOf:
    """A cast of `inner`, or `inner`."""
    return OneOf("cast", {"cast": cast(inner), "none": inner})


def maybe_wide(inner: Expression) -> OneOf:
    """A cast of `inner` to fp32, or `inner`."""
    wide = Where(lambda node: dtype(node) == torch.float32, "fp32", cast(inner))
    return OneOf("wide", {"wide": wide, "none": inner})
