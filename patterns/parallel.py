"""One output projection over cat([attention, act(linear(x))]): FLUX's single blocks, ViT-22B's parallel layers.

linear(cat([a, h]), W, b) = linear(a, W[:, :A], b) + h W[:, A:]^T, so that the MLP half can be rewritten by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from chipmunk_fx.graph.language import Among, Call, Found, Var
from chipmunk_fx.graph.pattern import Accepted, Beside, Example, MlpOperands, Part, Pattern, Refused
from chipmunk_fx.graph.walk import rank, shape
from chipmunk_fx.patterns.activations import activation
from chipmunk_fx.patterns.mlp import linear, mlp_refusal

aten = torch.ops.aten

FUSED = linear(
    Call(
        (aten.cat.default,),
        {
            "tensors": Among(activation(linear(Var("x"), "w1", "b1")), "index", "others"),
            "dim": Var("dim"),
        },
    ),
    "w2",
    "b2",
)


def judge(found: Found) -> Accepted | Refused:
    bound = found.bound
    form = f"parallel {bound['activation']}"
    others, index, total = bound["others"], bound["index"], shape(bound["w2"])[1]
    if not others:
        return Refused(form, "nothing beside the hidden values is concatenated")
    if 0 < index < len(others):
        return Refused(form, f"the hidden values stand between other parts ({index} of {len(others) + 1})")
    if reason := mlp_refusal(found):
        return Refused(form, reason)
    if any(rank(part) != rank(bound["x"]) for part in others):
        return Refused(form, "parts of different rank are concatenated")
    hidden = shape(bound["w1"])[0]
    start = 0 if index == 0 else total - hidden
    rest = (hidden, total) if index == 0 else (0, total - hidden)
    beside = Beside(tuple(others), Part(bound["w2"], 1, *rest), bound["b2"])
    b1 = None if bound["b1"] is None else Part(bound["b1"])
    w2 = Part(bound["w2"], 1, start, start + hidden)
    return Accepted(
        form, MlpOperands(bound["x"], Part(bound["w1"]), b1, None, None, w2, None, bound["activation"], beside)
    )


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


PARALLEL_MLP = Pattern("parallel mlp", "mlp", FUSED, judge, examples, near_misses, begins=3)
