"""The pointwise functions between two linears, in any spelling: they are told by their values."""

from __future__ import annotations

from types import MappingProxyType

from chipmunk_fx.graph.language import Expression, Function, OneOf
from chipmunk_fx.ops.activations import ACTIVATIONS

# Two linears in a row are one linear of low rank, no MLP.
KNOWN = MappingProxyType({name: function for name, function in ACTIVATIONS.items() if name != "identity"})
NONE = MappingProxyType({"none": ACTIVATIONS["identity"]})


def activation(inner: Expression) -> Function:
    """`f(inner)` with the name of f (as in chipmunk_fx.ops.activations) bound to "activation".

    Casts, and dropouts that drop nothing, may stand before, within and after: an op computes f in the linear's dtype.
    """
    return Function("activation", KNOWN, inner, f"a known activation ({', '.join(KNOWN)})")


def cast(name: str, inner: Expression) -> OneOf:
    """`inner`, or casts of it."""
    return OneOf(name, {"cast": Function(f"{name} by", NONE, inner, "nothing but casts"), "as it is": inner})
