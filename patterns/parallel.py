"""One output projection over cat([attention, act(linear(x))]): FLUX's single blocks, ViT-22B's parallel layers.

linear(cat([a, h]), W, b) = linear(a, W[:, :A], b) + h W[:, A:]^T, so that the MLP half can be rewritten by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from chipmunk_fx.graph.language import Among, Call, Expression, Found, Var, Where
from chipmunk_fx.graph.pattern import Accepted, Beside, Example, Part, Pattern, Refused
from chipmunk_fx.graph.walk import rank, shape
from chipmunk_fx.patterns.linears import second_linear
from chipmunk_fx.patterns.mlp import GATED_HIDDEN, PLAIN_HIDDEN, form_of, mlp_refusal, operands

aten = torch.ops.aten


def joined(hidden: Expression) -> Where:
    parts = Among(hidden, "index", "others")
    return second_linear(Call((aten.cat.default,), {"tensors": parts, "dim": Var("dim")}))


def judge(found: Found) -> Accepted | Refused:
    bound = found.bound
    form = f"parallel {form_of(found)}"
    others, index, total = bound["others"], bound["index"], shape(bound["w2"])[1]
    if not others:
        return Refused(form, "nothing beside the hidden values is concatenated")
    if 0 < index < len(others):
        return Refused(form, f"the hidden values stand between other parts ({index} of {len(others) + 1})")
    if reason := mlp_refusal(found):
        return Refused(form, reason)
    if any(rank(part) != rank(bound["x"]) for part in others):
        return Refused(form, "parts of different rank are concatenated")
    whole = operands(found)
    width = shape(bound["w1"])[0] if whole.w1.dim is None else whole.w1.stop - whole.w1.start
    mlp, rest = ((0, width), (width, total)) if index == 0 else ((total - width, total), (0, total - width))
    beside = Beside(tuple(others), Part(bound["w2"], 1, *rest), whole.b2)
    return Accepted(form, replace(whole, w2=Part(bound["w2"], 1, *mlp), b2=None, beside=beside))


class _OneLinear(nn.Module):
    """q, k, v (here one branch, 32 columns) and a gated MLP (32) from one linear, and one linear over both results."""

    def __init__(self, join: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.norm, self.first, self.out, self.join = nn.LayerNorm(16), nn.Linear(16, 64), nn.Linear(48, 16), join

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        side, hidden = self.first(self.norm(x)).split([32, 32], dim=-1)
        a, b = hidden.chunk(2, dim=-1)
        return self.out(self.join(side.sin(), a, b))


class _Parallel(nn.Module):
    """`join` concatenates the hidden values [B, N, 32] and a side branch [B, N, 32]; `out` takes `width` of them."""

    def __init__(self, join: Callable[..., torch.Tensor], width: int = 64) -> None:
        super().__init__()
        self.norm, self.join = nn.LayerNorm(16), join
        self.fc1, self.side, self.out = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(width, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        return self.out(self.join(F.gelu(self.fc1(x), approximate="tanh"), self.side(x).sin()))


def _x() -> tuple[torch.Tensor]:
    return (torch.randn(2, 24, 16),)


def examples() -> Sequence[Example]:
    return [
        Example("hidden last", lambda: (_Parallel(lambda hidden, side: torch.cat([side, hidden], 2)), _x())),
        Example("hidden first", lambda: (_Parallel(lambda hidden, side: torch.cat([hidden, side], -1)), _x())),
        Example(
            "two branches",
            lambda: (_Parallel(lambda hidden, side: torch.cat([side.cos(), side, hidden], -1), 96), _x()),
        ),
    ]


def near_misses() -> Sequence[Example]:
    def leaking(hidden: torch.Tensor, side: torch.Tensor) -> torch.Tensor:
        return torch.cat([side + hidden, hidden], -1)

    return [
        Example(
            "hidden in the middle",
            lambda: (_Parallel(lambda hidden, side: torch.cat([side, hidden, side], -1), 96), _x()),
            "between other parts",
        ),
        Example(
            "joined over tokens",
            lambda: (_Parallel(lambda hidden, side: torch.cat([side, hidden], 1), 32), _x()),
            "along dimension 1",
        ),
        Example(
            "joined over a grid",
            lambda: (
                _Parallel(lambda hidden, side: torch.cat([side, hidden], 2), 32),
                (torch.randn(1, 4, 6, 16),),
            ),
            "along dimension 2",
        ),
        Example("hidden also used", lambda: (_Parallel(leaking), _x()), "also used by"),
        Example("alone", lambda: (_Parallel(lambda hidden, side: torch.cat([hidden], -1), 32), _x()), "nothing beside"),
    ]


def gated_examples() -> Sequence[Example]:
    joins: dict[str, Callable[..., torch.Tensor]] = {
        "hidden last": lambda side, a, b: torch.cat([side, F.silu(a) * b], -1),
        "hidden first": lambda side, a, b: torch.cat([a * F.silu(b), side], 2),
    }
    return [Example(name, lambda join=join: (_OneLinear(join), _x())) for name, join in joins.items()]


def gated_near_misses() -> Sequence[Example]:
    def leaking(side: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.cat([side[..., :16] + b, a, F.silu(a) * b], -1)

    return [
        Example("a branch also used", lambda: (_OneLinear(leaking), _x()), "also used by"),
        Example(
            "both activated",
            lambda: (_OneLinear(lambda side, a, b: torch.cat([side, F.silu(a) * F.silu(b)], -1)), _x()),
            "saw silu",
        ),
    ]


PARALLEL_MLP = Pattern("parallel mlp", "mlp", joined(PLAIN_HIDDEN), judge, examples, near_misses, begins=3)
PARALLEL_GATED_MLP = Pattern(
    "parallel gated mlp", "mlp", joined(GATED_HIDDEN), judge, gated_examples, gated_near_misses, begins=4
)
