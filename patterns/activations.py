"""The pointwise functions between two linears, in every spelling that the MLP patterns know."""

from __future__ import annotations

import torch

from chipmunk_fx.graph.language import Call, Expression, Literal, OneOf

aten = torch.ops.aten


def activation(inner: Expression) -> OneOf:
    """`f(inner)` with the name of f (as in chipmunk_fx.ops.activations) bound to "activation"."""
    relu = Call((aten.relu.default,), {"self": inner})
    two = Literal(lambda value: value == 2, "exponent 2")
    return OneOf(
        "activation",
        {
            "gelu_tanh": Call(
                (aten.gelu.default,),
                {"self": inner, "approximate": Literal(lambda value: value == "tanh", "approximate='tanh'")},
            ),
            "gelu": Call((aten.gelu.default,), {"self": inner}),
            "silu": Call((aten.silu.default,), {"self": inner}),
            "relu2": Call((aten.pow.Tensor_Scalar,), {"self": relu, "exponent": two}),
            "relu": relu,
        },
    )
