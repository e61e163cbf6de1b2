"""linear -> pointwise -> linear, the feed-forward block of most transformers, plain and gated.

Plain: act(x W1^T + b1) W2^T + b2. Gated (SwiGLU, GEGLU; Shazeer 2020): act(x Wg^T) * (x Wu^T), from two linears or from the
halves of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from chipmunk_fx.graph.language import Call, Expression, Found, Literal, Var
from chipmunk_fx.graph.pattern import Accepted, Example, MlpOperands, Part, Pattern, Refused, open_end
from chipmunk_fx.graph.walk import rank, shape, strip
from chipmunk_fx.patterns.activations import activation

aten = torch.ops.aten


def linear(x: Expression, weight: str, bias: str) -> Call:
    return Call((aten.linear.default,), {"input": x, "weight": Var(weight), "bias": Var(bias)})


def half(inner: Expression, index: int) -> Call:
    """One half of dimension "dim" (which `mlp_refusal` wants to be the last), by chunk(2)."""
    two = Literal(lambda value: value == 2, "two chunks")
    return Call((aten.chunk.default,), {"self": inner, "chunks": two, "dim": Var("dim")}, output=index)


def product(a: Expression, b: Expression) -> Call:
    return Call((aten.mul.Tensor,), {"self": a, "other": b}, commutes=("self", "other"))


FC1 = linear(Var("x"), "w1", "b1")
UP = linear(Var("x"), "wu", "bu")
PLAIN = linear(activation(FC1), "w2", "b2")
GATED = linear(product(activation(FC1), UP), "w2", "b2")
GATE_FIRST = linear(product(activation(half(FC1, 0)), half(FC1, 1)), "w2", "b2")
GATE_LAST = linear(product(activation(half(FC1, 1)), half(FC1, 0)), "w2", "b2")


def operands(found: Found) -> MlpOperands:
    """Operands of a plain MLP or of one gated by two linears."""
    bound = found.bound
    return MlpOperands(
        x=bound["x"],
        w1=Part(bound["w1"]),
        b1=_part(bound["b1"]),
        wu=_part(bound.get("wu")),
        bu=_part(bound.get("bu")),
        w2=Part(bound["w2"]),
        b2=bound["b2"],
        activation=bound["activation"],
    )


def halved(gate: int) -> Callable[[Found], MlpOperands]:
    """Operands of a gated MLP whose two branches are halves of one linear; `gate` is the activated half."""

    def build(found: Found) -> MlpOperands:
        bound = found.bound
        width = shape(bound["w1"])[0] // 2

        def rows(node: fx.Node | None, index: int) -> Part | None:
            return None if node is None else Part(node, 0, index * width, (index + 1) * width)

        w1, wu = rows(bound["w1"], gate), rows(bound["w1"], 1 - gate)
        b1, bu = rows(bound["b1"], gate), rows(bound["b1"], 1 - gate)
        assert w1 is not None
        return MlpOperands(bound["x"], w1, b1, wu, bu, Part(bound["w2"]), bound["b2"], bound["activation"])

    return build


def judged(form: str, build: Callable[[Found], MlpOperands]) -> Callable[[Found], Accepted | Refused]:
    def judge(found: Found) -> Accepted | Refused:
        name = form.format(**{k: v for k, v in found.bound.items() if isinstance(v, str)})
        reason = mlp_refusal(found)
        return Refused(name, reason) if reason else Accepted(name, build(found))

    return judge


def mlp_refusal(found: Found) -> str | None:
    """What all MLP forms need: a token dimension, 2-D weights, one dtype, nothing inside used elsewhere."""
    bound = found.bound
    if bound.get("dim", -1) not in (-1, rank(bound["x"]) - 1):
        return f"divided or joined along dimension {bound['dim']}, not the last"
    if rank(bound["x"]) < 3:
        return f"input of rank {rank(bound['x'])} is a conditioning vector; [batch, ..., tokens, width] is supported"
    if strip(bound["x"]).op == "placeholder":
        return f"embeds the graph input {strip(bound['x'])}: no block of the stack"
    for name in ("w1", "wu", "w2"):
        weight = bound.get(name)
        if weight is not None and rank(weight) != 2:
            return f"weight {weight} has rank {rank(weight)}, a matrix is supported"
    dtypes = {bound[n].meta["val"].dtype for n in ("x", "w1", "wu", "w2") if bound.get(n) is not None}
    if len(dtypes) > 1 or not all(d.is_floating_point for d in dtypes):
        return f"mixed or integer dtypes {sorted(map(str, dtypes))}"
    return open_end(found)


def _part(node: fx.Node | None) -> Part | None:
    return None if node is None else Part(node)


class Mlp(nn.Module):
    """A minimal block for examples: a norm, then `act` between two linears; `leak` also returns the hidden values."""

    def __init__(self, act: Callable[[torch.Tensor], torch.Tensor], out: int = 32, leak: bool = False) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(out, 16)
        self.act, self.leak = act, leak

    def forward(self, x: torch.Tensor) -> Any:
        hidden = self.act(self.fc1(self.norm(x)))
        return (self.fc2(hidden), hidden) if self.leak else self.fc2(hidden)


class _GatedMlp(nn.Module):
    """`join` takes the two linears and what they read."""

    def __init__(self, join: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.gate, self.up, self.down = (nn.Linear(16, 16, bias=False) for _ in range(3))
        self.join = join

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.join(self.gate, self.up, self.norm(x)))


class _Written(Mlp):
    """Writes to the input of the first linear before the second one runs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        hidden = F.gelu(self.fc1(x))
        x.mul_(2)
        return self.fc2(hidden) + x


class _Unnormed(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class _Pooled(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.mean(1))


def _x() -> tuple[torch.Tensor]:
    return (torch.randn(2, 24, 16),)


def plain_examples() -> Sequence[Example]:
    acts = {
        "gelu": F.gelu,
        "gelu-tanh": lambda x: F.gelu(x, approximate="tanh"),
        "silu": F.silu,
        "relu": F.relu,
        "relu squared": lambda x: F.relu(x) ** 2,
        "dropout in eval": lambda x: F.dropout(F.gelu(x), 0.1, training=False),
    }
    return [Example(name, lambda act=act: (Mlp(act), _x())) for name, act in acts.items()]


def plain_near_misses() -> Sequence[Example]:
    return [
        Example("hidden is returned", lambda: (Mlp(F.gelu, leak=True), _x()), "also used by"),
        Example("dropout in training", lambda: (Mlp(lambda x: F.dropout(F.gelu(x), 0.5)), _x())),
        Example("hidden is written to", lambda: (Mlp(lambda x: F.gelu(x).mul_(2)), _x())),
        Example("input is written to", lambda: (_Written(F.gelu), _x()), "writes in place"),
        Example("softmax between", lambda: (Mlp(lambda x: x.softmax(-1)), _x())),
        Example("unknown scale", lambda: (Mlp(lambda x: F.gelu(x) * 1.5), _x()), "saw 1.5"),
        Example("cubed", lambda: (Mlp(lambda x: F.relu(x) ** 3), _x()), "wanted exponent 2, saw 3"),
        Example("graph input", lambda: (_Unnormed(F.gelu), _x()), "embeds the graph input"),
        Example("one row", lambda: (_Pooled(F.gelu), _x()), "conditioning vector"),
    ]


def gated_examples() -> Sequence[Example]:
    joins: dict[str, Callable[..., torch.Tensor]] = {
        "swiglu": lambda gate, up, x: F.silu(gate(x)) * up(x),
        "gate on the right": lambda gate, up, x: up(x) * F.silu(gate(x)),
        "geglu": lambda gate, up, x: F.gelu(gate(x)) * up(x),
    }
    return [Example(name, lambda join=join: (_GatedMlp(join), _x())) for name, join in joins.items()]


def gated_near_misses() -> Sequence[Example]:
    joins: dict[str, tuple[Callable[..., torch.Tensor], str]] = {
        "branches of two inputs": (lambda gate, up, x: F.silu(gate(x)) * up(x.flip(1)), "the same x as before"),
        "both activated": (lambda gate, up, x: F.silu(gate(x)) * F.silu(up(x)), "saw aten.silu.default"),
    }
    return [Example(name, lambda join=join: (_GatedMlp(join), _x()), why) for name, (join, why) in joins.items()]


def _halves(join: Callable[..., torch.Tensor], dim: int = -1) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: join(*x.chunk(2, dim=dim))


def _first(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return F.gelu(a) * b


def _last(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a * F.gelu(b)


def halves_near_misses(join: Callable[..., torch.Tensor]) -> Sequence[Example]:
    x = torch.randn(1, 4, 6, 16)
    return [
        Example("divided over tokens", lambda: (Mlp(_halves(join, 1)), _x()), "along dimension 1"),
        Example("divided over a grid", lambda: (Mlp(_halves(join, 2)), (x,)), "along dimension 2"),
        Example("one half twice", lambda: (Mlp(_halves(lambda a, b: join(a, a) + b), 16), _x())),
        Example("three parts", lambda: (Mlp(lambda x: join(*x[..., :30].chunk(3, -1)[:2]), 10), _x())),
    ]


MLP = Pattern("mlp", "mlp", PLAIN, judged("{activation}", operands), plain_examples, plain_near_misses, begins=3)
GATED_MLP = Pattern(
    "gated mlp", "mlp", GATED, judged("gated {activation}", operands), gated_examples, gated_near_misses, begins=4
)
GATE_FIRST_MLP = Pattern(
    "gated mlp, gate in the first half",
    "mlp",
    GATE_FIRST,
    judged("chunked gated {activation}", halved(0)),
    lambda: [Example("gate first", lambda: (Mlp(_halves(_first), out=16), _x()))],
    lambda: halves_near_misses(_first),
    begins=4,
)
GATE_LAST_MLP = Pattern(
    "gated mlp, gate in the second half",
    "mlp",
    GATE_LAST,
    judged("chunked gated {activation}", halved(1)),
    lambda: [
        Example("gate last", lambda: (Mlp(_halves(_last), out=16), _x())),
        Example("tokens in a grid", lambda: (Mlp(_halves(_last, 3), out=16), (torch.randn(1, 4, 6, 16),))),
    ],
    lambda: halves_near_misses(_last),
    begins=4,
)
