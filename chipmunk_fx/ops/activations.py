"""Activations between the two products of an MLP, by the name that the ops take."""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor


def gelu_tanh(x: Tensor) -> Tensor:
    """x (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3): arXiv 1606.08415, section 2.

    On a CPU as x / (1 + exp(-2 u)): PyTorch's tanh there costs a bf16 MLP as much as its two sparse products.
    """
    if x.device.type != "cpu":
        return F.gelu(x, approximate="tanh")
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    slope = -2 * math.sqrt(2 / math.pi)
    power = torch.addcmul(wide.new_tensor(slope), wide, wide, value=0.044715 * slope).mul_(wide)
    return torch.div(wide, power.exp_().add_(1), out=power).to(x.dtype)


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), the approximation of "Gaussian Error Linear Units" (arXiv 1606.08415), section 2."""
    return x * torch.sigmoid(1.702 * x)


def relu2(x: Tensor) -> Tensor:
    """max(x, 0)^2: "Primer: Searching for Efficient Transformers" (arXiv 2109.08668)."""
    return F.relu(x).square()


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "gelu": F.gelu,
        "gelu_tanh": gelu_tanh,
        "quick_gelu": quick_gelu,
        "silu": F.silu,
        "relu": F.relu,
        "relu2": relu2,
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
        "identity": torch.clone,
    }
)


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The function called `name`; ValueError that lists the known names for any other."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r} is unknown; known are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]
