"""Functions of one tensor, told by their values: however an activation is written out, it is known by what it computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import unset_fake_temporarily

from chipmunk_fx.graph.calls import CASTS, SAME, arguments, is_no_dropout

aten = torch.ops.aten

_UNARY = (
    *("gelu", "silu", "relu", "sigmoid", "tanh", "mish", "softplus", "hardswish", "hardsigmoid", "elu", "leaky_relu"),
    *("relu6", "selu", "celu", "hardtanh", "log_sigmoid", "erf", "exp", "expm1", "log1p", "neg", "abs", "square"),
    *("sqrt", "rsqrt", "reciprocal", "sin", "cos", "clamp", "clamp_min", "clamp_max"),
)
_BINARY = ("add", "sub", "mul", "div", "pow", "rsub", "maximum", "minimum")
_INPLACE = ("gelu_", "silu_", "relu_", "sigmoid_", "tanh_", "mul_", "add_", "square_", "leaky_relu_", "elu_")
_OVERLOADS = ("default", "Tensor", "Scalar", "Tensor_Scalar")
_LONGEST = 24  # ops; the widest spelling of gelu takes 9

Function = Callable[[torch.Tensor], torch.Tensor]


def _targets(names: Sequence[str]) -> frozenset[Any]:
    packets = [getattr(aten, name) for name in names]
    return frozenset(getattr(p, o) for p in packets for o in _OVERLOADS if o in p.overloads())


INPLACE = _targets(_INPLACE)
POINTWISE = _targets((*_UNARY, *_BINARY)) | INPLACE


def origins(value: fx.Node) -> Iterator[tuple[fx.Node, tuple[fx.Node, ...]]]:
    """Every node that alone determines `value` pointwise, nearest first, with the ops between, outermost first."""
    front, between = {value}, []
    while len(between) < _LONGEST:
        last = max(front)
        if not _is_pointwise(last):
            return
        front.remove(last)
        front.update(last.all_input_nodes[:1] if last.target in CASTS else last.all_input_nodes)
        between.append(last)
        if len(front) == 1:
            yield next(iter(front)), tuple(between)


def name_of(between: Sequence[fx.Node], origin: fx.Node, known: Mapping[str, Function]) -> str | None:
    """Which of the `known` functions the ops compute of `origin`: the one with the same values in fp64.

    Casts are left out: that a model rounds on the way is not what its function is.
    """
    if any(node.target is aten.dropout.default and not is_no_dropout(node) for node in between):
        return None
    with unset_fake_temporarily(), torch.no_grad():
        computed = _evaluate(between, origin)
        for name, values in _samples(tuple(known.items())).items():
            if torch.allclose(computed, values, rtol=1e-6, atol=1e-6):
                return name
    return None


def _is_pointwise(node: fx.Node) -> bool:
    if node.op != "call_function" or not node.all_input_nodes:
        return False
    if node.target in CASTS or node.target in SAME or node.target is aten.dropout.default:
        return True
    # What is written over must be read by nobody else.
    return node.target in POINTWISE and (node.target not in INPLACE or len(node.all_input_nodes[0].users) == 1)


def _evaluate(between: Sequence[fx.Node], origin: fx.Node) -> torch.Tensor:
    known = {origin: _grid()}
    for node in sorted(set(between)):
        first = known.get(node.args[0])  # pyright: ignore[reportArgumentType, reportCallIssue]
        if first is not None and (node.target in CASTS or node.target in SAME or node.target is aten.dropout.default):
            known[node] = first
            continue
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: known[n].clone())
        known[node] = node.target(*args, **kwargs)  # pyright: ignore[reportCallIssue]
    return known[max(between)]


@cache
def _grid() -> torch.Tensor:
    """Dense where activations bend, and far out, where they may be cut off."""
    near = torch.linspace(-12, 12, 2401, dtype=torch.float64, device="cpu")
    far = torch.logspace(1, 4, 64, dtype=torch.float64, device="cpu")
    return torch.cat([-far.flip(0), near, far])


@cache
def _samples(known: tuple[tuple[str, Function], ...]) -> Mapping[str, torch.Tensor]:
    return MappingProxyType({name: function(_grid()) for name, function in known})


def described(between: Sequence[fx.Node]) -> str:
    """The ops from the origin on, with their constants: `relu, pow 3`."""
    words = []
    for node in reversed(between):
        if node.target not in CASTS and node.target not in SAME:
            constants = [str(v) for v in arguments(node).values() if isinstance(v, (int, float)) and v not in (0, 1)]
            words.append(" ".join([str(node.target).split(".")[1], *constants]))
    return ", ".join(words)
