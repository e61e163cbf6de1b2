"""Functions told by their values."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from chipmunk_fx.graph.pointwise import described, name_of, origins
from chipmunk_fx.ops.activations import ACTIVATIONS
from tests.graph.capturing import traced

aten = torch.ops.aten

SPELLINGS: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "gelu": ("gelu", F.gelu),
    "gelu by erf": ("gelu", lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))),
    "gelu-tanh": ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")),
    "gelu-tanh with a power": (
        "gelu_tanh",
        lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3)))),
    ),
    "gelu-tanh factored": (
        "gelu_tanh",
        lambda x: x * 0.5 * (1 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x))),
    ),
    "quick gelu": ("quick_gelu", lambda x: x * torch.sigmoid(1.702 * x)),
    "silu by exp": ("silu", lambda x: x / (1 + torch.exp(-x))),
    "silu in place": ("silu", lambda x: F.silu(x * 1, inplace=True)),
    "silu in fp32 between casts": ("silu", lambda x: F.silu(x.bfloat16().float()).bfloat16()),
    "relu by clamp": ("relu", lambda x: x.clamp(min=0)),
    "relu squared": ("relu2", lambda x: F.relu(x).square()),
    "relu times relu": ("relu2", lambda x: (y := F.relu(x)) * y),
    "tanh": ("tanh", torch.tanh),
    "tanh by sigmoid": ("tanh", lambda x: 2 * torch.sigmoid(2 * x) - 1),
}
UNKNOWN: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "scaled": lambda x: 1.1 * F.gelu(x),
    "shifted": lambda x: F.gelu(x) + 1e-3,
    "cut off far out": lambda x: F.relu(x).clamp(max=1000),
    "relu6": F.relu6,
    "another constant": lambda x: x * torch.sigmoid(1.7 * x),
    "random": lambda x: F.dropout(F.gelu(x), 0.1, training=True),
}


def named(function: Callable[[torch.Tensor], torch.Tensor]) -> list[str | None]:
    """The name found for each origin of the function's value."""
    graph = traced(lambda x: function(x.sum(0)), torch.randn(2, 3)).graph
    value = next(n for n in graph.nodes if n.op == "output").args[0]
    return [name_of(between, origin, ACTIVATIONS) for origin, between in origins(value)]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_an_activation_is_known_in_all_spellings(spelling: str):
    wanted, function = SPELLINGS[spelling]
    assert named(function)[-1] == wanted


@pytest.mark.parametrize("spelling", UNKNOWN)
def test_other_functions_have_no_name(spelling: str):
    assert named(UNKNOWN[spelling])[-1] is None


def test_naming_draws_no_random_numbers():
    graph = traced(lambda x: UNKNOWN["random"](x.sum(0)), torch.randn(2, 3)).graph
    state = torch.get_rng_state()
    for origin, between in origins(next(n for n in graph.nodes if n.op == "output").args[0]):
        name_of(between, origin, ACTIVATIONS)
    assert torch.equal(state, torch.get_rng_state())


def test_a_function_of_two_tensors_has_no_origin():
    graph = traced(lambda x: F.silu(x.sum(0)) * x.sum(0), torch.randn(2, 3)).graph
    assert list(origins(next(n for n in graph.nodes if n.op == "output").args[0])) == []


def test_what_others_read_is_not_written_over():
    graph = traced(lambda x: [(y := x.sum(0)).cos(), F.silu(y, inplace=True)], torch.randn(2, 3)).graph
    assert list(origins(next(n for n in graph.nodes if n.target is aten.silu_.default))) == []


def test_ops_are_described_from_the_origin_on():
    graph = traced(lambda x: F.relu(x.sum(0)) ** 3, torch.randn(2, 3)).graph
    *_, (_, between) = origins(next(n for n in graph.nodes if n.op == "output").args[0])
    assert described(between) == "relu, pow 3"
