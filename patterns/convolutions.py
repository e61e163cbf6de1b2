"""1x1 convolution -> pointwise -> 1x1 convolution: an MLP over the channels of [B, C, ...], plain or gated.

Both weights [F, C, 1, ...] are matrices. A convolution that mixes positions makes it none: Sana's mix-FFN has one in between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import fx, nn

from chipmunk_fx.graph.calls import arguments
from chipmunk_fx.graph.language import Call, Expression, Found, Literal, OneOf, Var, Where
from chipmunk_fx.graph.pattern import Accepted, Example, MlpOperands, Part, Pattern, Refused, open_end
from chipmunk_fx.graph.sizes import hint
from chipmunk_fx.graph.walk import shape
from chipmunk_fx.patterns.activations import activation, cast
from chipmunk_fx.patterns.linears import weight_refusal
from chipmunk_fx.patterns.mlp import dtype_refusal, product

aten = torch.ops.aten

_CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
_PLAIN = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}


def _is_matrix(convolution: fx.Node) -> bool:
    weight = convolution.args[1] if convolution.target in _CONVOLUTIONS else None
    return isinstance(weight, fx.Node) and prod(shape(weight)[2:]) == 1


def _convolution(x: Expression, weight: str, bias: str) -> Call:
    settings = {name: Var(f"{weight} {name}") for name in _PLAIN}
    return Call(_CONVOLUTIONS, {"input": x, "weight": Var(weight), "bias": Var(bias), **settings})


def _half(index: int) -> Call:
    """Of the first convolution's channels."""
    two = Literal(lambda value: value == 2, "two halves")
    channels = Literal(lambda value: value == 1, "divided over channels")
    first = _convolution(Var("x"), "w1", "b1")
    return Call((aten.chunk.default,), {"self": first, "chunks": two, "dim": channels}, output=index)


def _gated(gate: int) -> Expression:
    return cast("product", product(activation(_half(gate)), cast("up branch", _half(1 - gate))))


HIDDEN = OneOf("gate", {"none": activation(_convolution(Var("x"), "w1", "b1")), "first": _gated(0), "last": _gated(1)})
EXPRESSION = Where(_is_matrix, "a 1x1 convolution", _convolution(HIDDEN, "w2", "b2"))


def judge(found: Found) -> Accepted | Refused:
    bound = found.bound
    gated = bound["gate"] != "none"
    form = f"convolved {'chunked gated ' if gated else ''}{bound['activation']}"
    reason = (
        _mixing(found)
        or weight_refusal(bound["w1"])
        or weight_refusal(bound["w2"])
        or _input_refusal(bound["x"], bound["w1"])
    )
    reason = reason or dtype_refusal(found) or open_end(found)
    if reason:
        return Refused(form, reason)
    (w1, wu), (b1, bu) = (_branches(bound[name], str(bound["gate"])) for name in ("w1", "b1"))
    assert w1 is not None
    second = Part(bound["w2"]), bound["b2"]
    return Accepted(form, MlpOperands(bound["x"], w1, b1, wu, bu, *second, bound["activation"], channels_first=True))


def _branches(node: fx.Node | None, gate: str) -> tuple[Part | None, Part | None]:
    """Of a weight or bias, what makes the gate and what makes the other branch."""
    if node is None or gate == "none":
        return None if node is None else Part(node), None
    half = shape(node)[0] // 2
    halves = Part(node, 0, 0, half), Part(node, 0, half, 2 * half)
    return halves if gate == "first" else halves[::-1]


def _mixing(found: Found) -> str | None:
    for node in (n for n in found.nodes if n.target in _CONVOLUTIONS):
        given, kernel = arguments(node), shape(node.args[1])[2:]  # pyright: ignore
        if prod(kernel) != 1:
            kind = "depthwise " if given["groups"] == shape(node)[1] else ""
            return f"{node} is a {kind}{'x'.join(map(str, kernel))} convolution, which mixes positions: no MLP"
        for name, plain in _PLAIN.items():
            value = given[name]
            if any(v != plain for v in (value if isinstance(value, (list, tuple)) else [value])):
                return f"{node} has {name}={value}, {plain} is supported"
    return None


def _input_refusal(x: fx.Node, weight: fx.Node) -> str | None:
    sizes = shape(x)
    told = "x".join(map(str, sizes))
    if len(sizes) != len(shape(weight)):
        return f"input {told} has no batch"
    if prod(hint(size) for size in sizes[2:]) == 1:
        return f"input {told} has one position a sample: a conditioning vector, or no tokens to group"
    return None


class _Convolved(nn.Module):
    """`act` between two convolutions of [B, 16, ...], the second of `width` channels; `first` replaces the first."""

    def __init__(
        self,
        act: Callable[[torch.Tensor], torch.Tensor],
        width: int = 32,
        dims: int = 2,
        first: nn.Module | None = None,
    ) -> None:
        super().__init__()
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        self.first, self.second = first or kind(16, 32, 1), kind(width, 16, 1, bias=dims > 1)
        self.act = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.act(self.first(x.sin())))


class _Mixed(_Convolved):
    """As Sana has it: a depthwise convolution before the gate."""

    def __init__(self) -> None:
        super().__init__(lambda h: (parts := h.chunk(2, 1))[0] * F.silu(parts[1]), 16)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.act(self.depthwise(F.silu(self.first(x.sin())))))


def _x(dims: int = 2) -> tuple[torch.Tensor]:
    return (torch.randn(2, 16, *(24,) if dims == 1 else (4, 6, 2)[:dims]),)


def _halves(join: Callable[..., torch.Tensor], dim: int = 1) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda h: join(*h.chunk(2, dim))


def examples() -> Sequence[Example]:
    return [
        *(Example(f"{dims}d", lambda dims=dims: (_Convolved(F.gelu, dims=dims), _x(dims))) for dims in (1, 2, 3)),
        Example("gate first", lambda: (_Convolved(_halves(lambda a, b: F.silu(a) * b), 16), _x())),
        Example("gate last", lambda: (_Convolved(_halves(lambda a, b: a * F.gelu(b)), 16), _x())),
        Example("channels last", lambda: (_Convolved(F.silu).to(memory_format=torch.channels_last), _x())),  # pyright: ignore
    ]


def near_misses() -> Sequence[Example]:
    firsts = {
        "3x3 first": (nn.Conv2d(16, 32, 3, padding=1), "is a 3x3 convolution, which mixes positions"),
        "groups": (nn.Conv2d(16, 32, 1, groups=2), "has groups=2"),
        "stride": (nn.Conv2d(16, 32, 1, stride=2), "has stride=[2, 2]"),
        "padding": (nn.Conv2d(16, 32, 1, padding=1), "has padding=[1, 1]"),
    }
    return [
        *(
            Example(name, lambda first=first: (_Convolved(F.gelu, first=first), _x()), why)
            for name, (first, why) in firsts.items()
        ),
        Example("depthwise between", lambda: (_Mixed(), _x()), "is a depthwise 3x3 convolution, which mixes positions"),
        Example("one position", lambda: (_Convolved(F.gelu), (torch.randn(2, 16, 1, 1),)), "one position a sample"),
        Example("no batch", lambda: (_Convolved(F.gelu, dims=1), (torch.randn(16, 24),)), "has no batch"),
        Example("no batch, 2d", lambda: (_Convolved(F.gelu), (torch.randn(16, 16, 6),)), "has no batch"),
        Example("no activation", lambda: (_Convolved(lambda h: h), _x())),
        Example("divided over rows", lambda: (_Convolved(_halves(lambda a, b: F.silu(a) * b, 2)), _x())),
    ]


CONVOLVED = Pattern("convolved mlp", "mlp", EXPRESSION, judge, examples, near_misses)
