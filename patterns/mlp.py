"""linear -> pointwise -> linear, the feed-forward block of most transformers, plain and gated.

Plain: act(x W1^T + b1) W2^T + b2. Gated (SwiGLU, GEGLU; Shazeer 2020): act(x Wg^T) * (x Wu^T). The first product may be
part of a wider linear, of which the rest goes elsewhere: both branches of a gate, or q, k, v and the MLP in one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from chipmunk_fx.graph.calls import dtype
from chipmunk_fx.graph.language import Call, Expression, Found, Range, Var
from chipmunk_fx.graph.pattern import Accepted, Example, MlpOperands, Part, Pattern, Refused, open_end
from chipmunk_fx.graph.walk import rank
from chipmunk_fx.patterns.activations import activation, cast
from chipmunk_fx.patterns.divided import beside, divided_refusal, kept, rows
from chipmunk_fx.patterns.linears import first_linear, linear_refusal, second_linear
from chipmunk_fx.patterns.modules import (
    Addmm,
    Attending,
    Contracted,
    Folded,
    GatedMlp,
    Hyper,
    LowRank,
    Matmul,
    MixedMlp,
    Mlp,
    OneLinearMlp,
    Picked,
    Pooled,
    Quantised,
    Sliced,
    Unnormed,
    Untransposed,
    Written,
    halves,
    tokens,
    weight_normed,
)
from chipmunk_fx.patterns.streams import stream_refusal

aten = torch.ops.aten


def product(a: Expression, b: Expression) -> Call:
    return Call((aten.mul.Tensor,), {"self": a, "other": b}, commutes=("self", "other"))


GATE = Range("gate", first_linear(Var("x"), "w1", "b1"))
UP = Range("up", first_linear(Var("x"), "wu", "bu"))
PLAIN_HIDDEN = activation(GATE)
GATED_HIDDEN = cast("product", product(activation(GATE), cast("up branch", UP)))
PLAIN = second_linear(PLAIN_HIDDEN)
GATED = second_linear(GATED_HIDDEN)


def judge(found: Found) -> Accepted | Refused:
    form = form_of(found)
    reason = mlp_refusal(found)
    return Refused(form, reason) if reason else Accepted(form, operands(found))


def form_of(found: Found) -> str:
    """`gelu`, `gated silu` (two linears), `chunked gated silu` (one), `fused gelu` (a linear that makes more)."""
    bound = found.bound
    gated = ["gated"] if "wu" in bound else []
    divided = [] if bound["gate"] is None else ["chunked" if gated else "fused"]
    return " ".join([*divided, *gated, bound["activation"]])


def operands(found: Found) -> MlpOperands:
    """Operands of a match that `mlp_refusal` lets pass, the second linear taken whole."""
    bound = found.bound
    gate, up = bound["gate"], bound.get("up")
    w1 = rows(bound["w1"], gate)
    assert w1 is not None
    return MlpOperands(
        x=bound["x"],
        w1=w1,
        b1=rows(bound.get("b1"), gate),
        wu=rows(bound.get("wu"), up),
        bu=rows(bound.get("bu"), up),
        w2=Part(bound["w2"]),
        b2=bound.get("b2"),
        activation=bound["activation"],
        kept=kept(found),
    )


def mlp_refusal(found: Found) -> str | None:
    """What all MLP forms need: tokens, plain weights, one dtype, branches side by side, nothing inside used elsewhere."""
    bound = found.bound
    reason = stream_refusal(bound["x"]) if "x" in bound else None  # what is foreign binds no input
    reason = reason or linear_refusal(found)
    if reason is None and bound.get("dim", -1) not in (-1, rank(bound["x"]) - 1):
        reason = f"joined along dimension {bound['dim']}, not the last"
    return reason or dtype_refusal(found) or divided_refusal(found) or open_end(found, beside(found))


def dtype_refusal(found: Found) -> str | None:
    """Why the products of a match are not all computed in the input's dtype."""
    bound = found.bound
    dtypes = {dtype(bound[n]) for n in ("x", "w1", "wu", "w2") if bound.get(n) is not None}
    given = dtype(bound["x"])
    if len(dtypes) > 1 or given is None or not given.is_floating_point:
        return f"mixed or integer dtypes {sorted(map(str, dtypes))}"
    for node in found.nodes:
        if (made := dtype(node)) is not None and torch.promote_types(made, given) != made:
            return f"{node} rounds to {made} between the linears"
    made = dtype(found.nodes[0])
    return None if made == given else f"autocast makes {made} of {given}"


def plain_examples() -> Sequence[Example]:
    acts = {
        "gelu": F.gelu,
        "gelu-tanh": lambda x: F.gelu(x, approximate="tanh"),
        "gelu-tanh written out": lambda x: 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * x**3))),
        "gelu by erf": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
        "quick gelu": lambda x: x * torch.sigmoid(1.702 * x),
        "silu": F.silu,
        "silu in place": nn.SiLU(inplace=True),
        "silu by sigmoid": lambda x: torch.sigmoid(x) * x,
        "silu in higher precision": lambda x: F.silu(x.double()).to(x.dtype),
        "relu": F.relu,
        "relu squared": lambda x: F.relu(x) ** 2,
        "square of relu": lambda x: torch.square(F.relu(x)),
        "relu by relu": lambda x: F.relu(x) * F.relu(x),
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
        "dropout of nothing": lambda x: F.dropout(F.gelu(F.dropout(x, 0.0)), 0.1, training=False),
    }
    named = [Example(name, lambda act=act: (Mlp(act), tokens())) for name, act in acts.items()]
    layouts = {
        "tokens in a grid": lambda: (Mlp(F.gelu), (torch.randn(1, 4, 6, 16),)),
        "tokens of all samples in a row": lambda: (Folded(F.gelu), tokens()),
        "tokens without a batch": lambda: (Attending(F.gelu), (torch.randn(24, 16),)),
        "no norm before": lambda: (Unnormed(F.gelu), tokens()),
        "part of a linear": lambda: (Mlp(lambda h: F.gelu(h[..., :24]), 24), tokens()),
        "matmul": lambda: (Matmul(F.gelu), tokens()),
        "addmm": lambda: (Addmm(F.gelu), tokens()),
        "einsum": lambda: (Contracted(F.gelu, lambda x, w: torch.einsum("bnc,fc->bnf", x, w)), tokens()),
        "einsum, weight first": lambda: (
            Contracted(F.gelu, lambda x, w: torch.einsum("oi,...i->...o", w, x)),
            tokens(),
        ),
        "tensordot": lambda: (Contracted(F.gelu, lambda x, w: torch.tensordot(x, w, dims=([2], [1]))), tokens()),
        "qkv and MLP in one linear": lambda: (OneLinearMlp(lambda h: h.split([48, 32], -1)), tokens()),
        "MLP first": lambda: (OneLinearMlp(lambda h: (h[..., 32:], h[..., :32])), tokens()),
        "weight norm": lambda: (weight_normed(), tokens()),
        "weight in int8": lambda: (Quantised(F.gelu), tokens()),
        "slices of a weight": lambda: (Sliced(F.gelu), tokens()),
    }
    return named + [Example(name, make) for name, make in layouts.items()]


def plain_near_misses() -> Sequence[Example]:
    acts: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str | None]] = {
        "dropout in training": (lambda x: F.dropout(F.gelu(x), 0.5), "saw gelu, dropout 0.5"),
        "hidden is scaled in place": (lambda x: F.gelu(x).mul_(2), "saw gelu, mul 2"),
        "softmax between": (lambda x: x.softmax(-1), None),
        "unknown scale": (lambda x: F.gelu(x) * 1.5, "saw gelu, mul 1.5"),
        "cubed": (lambda x: F.relu(x) ** 3, "saw relu, pow 3"),
        "cut off": (lambda x: F.gelu(x).clamp(max=3), "saw gelu, clamp 3"),
        "no activation": (lambda x: x, None),
        "rounded": (lambda x: F.gelu(x.bfloat16()).float(), "rounds to torch.bfloat16"),
        "scaled by a tensor": (lambda x: F.gelu(x) * torch.arange(32), None),
    }
    named = [Example(name, lambda act=act: (Mlp(act), tokens()), why) for name, (act, why) in acts.items()]
    whole = {
        "hidden is returned": (lambda: (Mlp(F.gelu, leak=True), tokens()), "also used by"),
        "input is written to": (lambda: (Written(F.gelu), tokens()), "writes in place"),
        "one row": (lambda: (Pooled(F.gelu), tokens()), "conditioning vector"),
        "one token": (lambda: (Mlp(F.gelu), (torch.randn(3, 1, 16),)), "one row a sample"),
        "in the middle of a linear": (
            lambda: (OneLinearMlp(lambda h: (torch.cat([h[..., :24], h[..., 56:]], -1), h[..., 24:56])), tokens()),
            "in the middle",
        ),
        "columns of another": (lambda: (OneLinearMlp(lambda h: (h[..., :48], h[..., 40:72])), tokens()), "reads too"),
        "all of a linear elsewhere": (
            lambda: (OneLinearMlp(lambda h: (h.sin()[..., :48], h[..., 48:])), tokens()),
            "also used",
        ),
        "low-rank update": (lambda: (LowRank(F.gelu), tokens()), "LoRA"),
        "weight of the input": (lambda: (Hyper(F.gelu), tokens()), "may change from step to step"),
        "untransposed": (lambda: (Untransposed(F.gelu), tokens()), "is kept as [in, out]"),
        "untransposed, with a bias": (lambda: (Untransposed(F.gelu, biased=True), tokens()), "is kept as [in, out]"),
        "untransposed, einsum": (
            lambda: (Contracted(F.gelu, lambda x, w: torch.einsum("bnc,cf->bnf", x, w), turned=True), tokens()),
            "is kept as [in, out]",
        ),
        "untransposed, tensordot": (
            lambda: (Contracted(F.gelu, lambda x, w: torch.tensordot(x, w, dims=1), turned=True), tokens()),
            "is kept as [in, out]",
        ),
        "rows picked": (lambda: (Picked(F.gelu), tokens()), "a routed expert"),
        "another precision": (lambda: (MixedMlp(F.gelu), tokens()), "mixed or integer dtypes"),
    }
    return named + [Example(name, make, why) for name, (make, why) in whole.items()]


def gated_examples() -> Sequence[Example]:
    joins: dict[str, Callable[..., torch.Tensor]] = {
        "swiglu": lambda gate, up, x: F.silu(gate(x)) * up(x),
        "gate on the right": lambda gate, up, x: up(x) * F.silu(gate(x)),
        "geglu": lambda gate, up, x: F.gelu(gate(x)) * up(x),
        "glu": lambda gate, up, x: torch.sigmoid(gate(x)) * up(x),
        "in higher precision": lambda gate, up, x: (F.silu(gate(x).double()) * up(x).double()).to(x.dtype),
        "gate in higher precision": lambda gate, up, x: F.silu(gate(x).double()).to(x.dtype) * up(x),
    }
    divisions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "gate first": halves(lambda a, b: F.gelu(a) * b),
        "gate last": halves(lambda a, b: a * F.gelu(b)),
        "split": lambda h: F.silu(h.split(16, -1)[0]) * h.split(16, -1)[1],
        "split with sizes": lambda h: F.silu(h.split([16, 16], -1)[1]) * h.split([16, 16], -1)[0],
        "slices": lambda h: F.silu(h[..., :16]) * h[..., 16:],
        "unbind": lambda h: F.silu(h.unflatten(-1, (2, 16)).unbind(-2)[0]) * h.unflatten(-1, (2, 16)).unbind(-2)[1],
        "select": lambda h: (
            F.silu(h.reshape(*h.shape[:-1], 2, 16)[..., 0, :]) * h.reshape(*h.shape[:-1], 2, 16)[..., 1, :]
        ),
    }
    grid = lambda: (Mlp(halves(lambda a, b: a * F.gelu(b), 3), 16), (torch.randn(1, 4, 6, 16),))  # noqa: E731
    return [
        *(Example(name, lambda join=join: (GatedMlp(join), tokens())) for name, join in joins.items()),
        *(Example(name, lambda act=act: (Mlp(act, 16), tokens())) for name, act in divisions.items()),
        Example("tokens in a grid", grid),
        Example(
            "qkv and gated MLP in one linear",
            lambda: (OneLinearMlp(lambda h: h.split([48, 32], -1), halved=True), tokens()),
        ),
    ]


def gated_near_misses() -> Sequence[Example]:
    joins: dict[str, tuple[Callable[..., Any], str | None]] = {
        "branches of two inputs": (lambda gate, up, x: F.silu(gate(x)) * up(x.flip(1)), "the same x as before"),
        "both activated": (lambda gate, up, x: F.silu(gate(x)) * F.silu(up(x)), "saw silu"),
        "one branch twice": (lambda gate, up, x: F.silu(gate(x)) * gate(x), "both branches read"),
        "branch also used": (lambda gate, up, x: (F.silu(gate(x)) * (h := up(x)), h), "also used by"),
        "sum of branches": (lambda gate, up, x: F.silu(gate(x)) + up(x), None),
    }
    divisions: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], int, str]] = {
        "divided over tokens": (
            halves(lambda a, b: F.gelu(a) * b, 1),
            32,
            "wanted aten.linear.default, saw <built-in function getitem>",
        ),
        "one half twice": (halves(lambda a, b: F.gelu(a) * a), 16, "both branches read"),
        "overlapping": (lambda h: F.silu(h[..., :20]) * h[..., 12:], 20, "both branches read"),
        "every other column": (lambda h: F.silu(h[..., ::2]) * h[..., 1::2], 16, "saw aten.slice.Tensor"),
        "pairs side by side": (lambda h: F.silu(_pairs(h)[..., 0]) * _pairs(h)[..., 1], 16, "saw aten.select.int"),
    }
    return [
        *(Example(name, lambda join=join: (GatedMlp(join), tokens()), why) for name, (join, why) in joins.items()),
        *(
            Example(name, lambda act=act, width=width: (Mlp(act, width), tokens()), why)
            for name, (act, width, why) in divisions.items()
        ),
    ]


def _pairs(hidden: torch.Tensor) -> torch.Tensor:
    return hidden.unflatten(-1, (16, 2))


MLP = Pattern("mlp", "mlp", PLAIN, judge, plain_examples, plain_near_misses, begins=3)
GATED_MLP = Pattern("gated mlp", "mlp", GATED, judge, gated_examples, gated_near_misses, begins=3)
