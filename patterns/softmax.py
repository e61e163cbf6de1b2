"""Attention written out: softmax(scale * q k^T) v through matmul or einsum, softmax in any precision.

A scale before the product stays with q; one after it becomes the op's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from chipmunk_fx.graph.language import Call, Each, Expression, Found, Literal, OneOf, Var
from chipmunk_fx.graph.pattern import Accepted, AttentionOperands, Example, Laid, Pattern, Refused, open_end
from chipmunk_fx.graph.walk import rank
from chipmunk_fx.patterns.attention import SelfAttention, attention_kind, operand_shapes

aten = torch.ops.aten


def cast(name: str, inner: Expression) -> OneOf:
    """`inner`, or a cast of it: the op computes softmax in fp32 whatever the model writes."""
    anything = Literal(lambda value: not isinstance(value, fx.Node), "a constant")
    to = {"self": inner, "dtype": anything, "non_blocking": anything, "copy": anything, "memory_format": anything}
    return OneOf(name, {"as it is": inner, "cast": Call((aten.to.dtype,), to)})


def weights(scores: Expression) -> Expression:
    """softmax over the last dimension of `scores`, scaled or not, cast or not."""
    number = Var("factor")
    scaled = OneOf(
        "scaling",
        {
            "none": scores,
            "times": Call((aten.mul.Tensor, aten.mul.Scalar), {"self": scores, "other": number}),
            "over": Call((aten.div.Tensor, aten.div.Scalar), {"self": scores, "other": number}),
        },
    )
    last = Literal(lambda value: value in (-1, 3), "softmax over the last dimension (keys)")
    softmax = {"self": cast("before", scaled), "dim": last, "dtype": Var("softmax_dtype")}
    return cast("after", Call((aten.softmax.int,), softmax))


MATMUL = Call(
    (aten.matmul.default,),
    {"self": weights(Call((aten.matmul.default,), {"self": Var("q"), "other": Var("kt")})), "other": Var("v")},
)


def einsum(equation: str, first: Expression, second: Expression) -> Call:
    return Call((aten.einsum.default,), {"equation": Var(equation), "tensors": Each((first, second))})


EINSUM = einsum("mix", weights(einsum("scores", Var("q"), Var("k"))), Var("v"))


def judge_matmul(found: Found) -> Accepted | Refused:
    bound = found.bound
    if any(rank(bound[name]) != 4 for name in ("q", "kt", "v")):
        return Refused("explicit", "operands are not [batch, heads, tokens, width]")
    return _judge(found, Laid(bound["q"]), Laid(bound["kt"], (0, 1, 3, 2)), Laid(bound["v"]), None)


def judge_einsum(found: Found) -> Accepted | Refused:
    bound = found.bound
    layout = einsum_layout(bound["scores"], bound["mix"])
    if layout is None:
        return Refused("explicit", f"einsum {bound['scores']} then {bound['mix']} is no attention over 4 letters")
    q, k, v, out = layout
    return _judge(found, Laid(bound["q"], q), Laid(bound["k"], k), Laid(bound["v"], v), out)


def einsum_layout(scores: str, mix: str) -> tuple[tuple[int, ...], ...] | None:
    """Permutations of q, k, v to [B,H,*,D] and of [B,H,N,D] to the result, of two einsum equations; None if they do not fit.

    >>> einsum_layout("bnhd,bmhd->bhnm", "bhnm,bmhd->bnhd")
    ((0, 2, 1, 3), (0, 2, 1, 3), (0, 2, 1, 3), (0, 2, 1, 3))
    """
    (qs, ks, ss), (ws, vs, os) = (_terms(e) for e in (scores, mix))
    if any(len(set(t)) != 4 or len(t) != 4 for t in (qs, ks, ss, ws, vs, os)):
        return None
    batch = [letter for letter in ss if letter in qs and letter in ks]
    rows = [letter for letter in ss if letter in qs and letter not in ks]
    keys = [letter for letter in ss if letter in ks and letter not in qs]
    width = [letter for letter in qs if letter in ks and letter not in ss]
    if [len(x) for x in (batch, rows, keys, width)] != [2, 1, 1, 1] or ss[-1] != keys[0]:
        return None
    # The second equation may use other letters: they are read off the weights' place by place.
    same = dict(zip(ws, ss, strict=True))
    vs, os = ([same.get(letter, letter) for letter in term] for term in (vs, os))
    features = [letter for letter in vs if letter not in (*batch, *keys)]
    if len(features) != 1 or sorted(os) != sorted([*batch, *rows, *features]) or features[0] in ss:
        return None
    wanted = [*batch, *rows, *features]
    return (
        tuple(qs.index(x) for x in (*batch, *rows, *width)),
        tuple(ks.index(x) for x in (*batch, *keys, *width)),
        tuple(vs.index(x) for x in (*batch, *keys, *features)),
        tuple(wanted.index(x) for x in os),
    )


def _terms(equation: str) -> list[str]:
    left, _, right = equation.replace(" ", "").partition("->")
    terms = [*left.split(","), right]
    return terms if len(terms) == 3 else ["", "", ""]


def _judge(found: Found, q: Laid, k: Laid, v: Laid, out: tuple[int, ...] | None) -> Accepted | Refused:
    form, reason = attention_kind(q.node, k.node)
    scale, problem = _scale(found)
    reason = reason or problem or operand_shapes(q, k, v) or open_end(found)
    return Refused(form, reason) if reason else Accepted(form, AttentionOperands(q, k, v, scale, out))


def _scale(found: Found) -> tuple[float, str | None]:
    kind, factor = found.bound["scaling"], found.bound.get("factor")
    if kind == "none":
        return 1.0, None
    if not isinstance(factor, (int, float)):
        return 1.0, "scale is computed in the graph, not a constant"
    return (float(factor) if kind == "times" else 1.0 / float(factor)), None


def _matmul(scale: float, after: bool = True, dim: int = -1):
    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = (q @ k.transpose(-2, -1)) * scale if after else (q * scale) @ k.transpose(-2, -1)
        return scores.softmax(dim=dim) @ v

    return call


def _einsum_call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = torch.einsum("bhnd,bhmd->bhnm", q, k) / 8**0.5
    return torch.einsum("bhnm,bhmd->bnhd", scores.softmax(-1), v).transpose(1, 2)


def _upcast(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = ((q @ k.transpose(-2, -1)) * 8**-0.5).double()
    return scores.softmax(dim=-1).to(q.dtype) @ v


def _leaking(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    shares = (q @ k.transpose(-2, -1)).softmax(dim=-1)
    return shares @ v + shares.sum(-1, keepdim=True)


def _x() -> tuple[torch.Tensor]:
    return (torch.randn(1, 24, 16),)


def matmul_examples() -> Sequence[Example]:
    return [
        Example("scale after", lambda: (SelfAttention(_matmul(0.5)), _x())),
        Example("scale before", lambda: (SelfAttention(_matmul(0.5, after=False)), _x())),
        Example("softmax in higher precision", lambda: (SelfAttention(_upcast), _x())),
    ]


def matmul_near_misses() -> Sequence[Example]:
    def biased(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = q @ k.transpose(-2, -1) + torch.ones(24, 24).tril()
        return scores.softmax(dim=-1) @ v

    return [
        Example(
            "softmax over rows", lambda: (SelfAttention(_matmul(1.0, dim=-2)), _x()), "softmax over the last dimension"
        ),
        Example("mask added", lambda: (SelfAttention(biased), _x()), "aten.add.Tensor"),
        Example("weights also used", lambda: (SelfAttention(_leaking), _x()), "also used by"),
        Example("cross", lambda: (SelfAttention(_matmul(1.0), 16), (*_x(), *_x())), "cross attention"),
    ]


def einsum_examples() -> Sequence[Example]:
    return [Example("einsum", lambda: (SelfAttention(_einsum_call), _x()))]


def einsum_near_misses() -> Sequence[Example]:
    def crossed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        shares = torch.einsum("bhnd,bhmd->bhmn", q, k).softmax(-1)  # over queries, not keys
        return torch.einsum("bhmn,bhmd->bhnd", shares, v)

    return [Example("softmax over queries", lambda: (SelfAttention(crossed), _x()), "is no attention")]


SOFTMAX = Pattern("softmax, matmul", "attention", MATMUL, judge_matmul, matmul_examples, matmul_near_misses)
SOFTMAX_EINSUM = Pattern("softmax, einsum", "attention", EINSUM, judge_einsum, einsum_examples, einsum_near_misses)
