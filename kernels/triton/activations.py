"""The activations of chipmunk_fx.ops.activations inside a kernel, on fp32."""

import triton
import triton.language as tl

NAMES = ("gelu", "gelu_tanh", "quick_gelu", "silu", "relu", "relu2", "sigmoid", "tanh", "identity")


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp2(-1.4426950408889634 * x))


@triton.jit
def activate(x, NAME: tl.constexpr):
    """NAME(x) elementwise, x fp32."""
    if NAME == "gelu":
        x = 0.5 * x * (1 + tl.math.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        # (1 + tanh(u)) / 2 = sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
        x = x * sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif NAME == "quick_gelu":
        x = x * sigmoid(1.702 * x)
    elif NAME == "silu":
        x = x * sigmoid(x)
    elif NAME == "relu":
        x = tl.maximum(x, 0.0)
    elif NAME == "relu2":
        x = tl.maximum(x, 0.0) * tl.maximum(x, 0.0)
    elif NAME == "sigmoid":
        x = sigmoid(x)
    elif NAME == "tanh":
        x = 2 * sigmoid(2 * x) - 1
    else:
        tl.static_assert(NAME == "identity", "unknown activation")
    return x
