"""Attention written out: softmax(scale * q k^T) v through matmul, bmm, baddbmm or einsum, softmax in any precision.

The softmax may be written out, too: exponentials over their sum, before the product with v or after it.

Each product is read as an einsum; which letters stand for heads, rows, keys and widths follows from the two together. A
scale on q or k stays with it; one on the scores becomes the op's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import fx, nn

from chipmunk_fx.graph.calls import dtype
from chipmunk_fx.graph.language import Call, Each, Expression, Found, Literal, OneOf, Var, Where
from chipmunk_fx.graph.masks import is_nothing, padding_refusal, unfolded
from chipmunk_fx.graph.pattern import Accepted, AttentionOperands, Example, Laid, Pattern, Refused, open_end
from chipmunk_fx.graph.walk import rank
from chipmunk_fx.patterns.activations import cast
from chipmunk_fx.patterns.attention import SelfAttention, attention_kind, operand_shapes
from chipmunk_fx.patterns.exponentials import OVER, TOTAL, exponentials, is_divided, shifted
from chipmunk_fx.patterns.layouts import equation, layout_of

aten = torch.ops.aten

_EMPTY = (aten.empty.memory_format, aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default)


def products(name: str, first: Expression, second: Expression) -> dict[str, Expression]:
    """first times second; the equation of an einsum is bound to "{name} equation"."""
    return {
        "matmul": Call((aten.matmul.default,), {"self": first, "other": second}),
        "bmm": Call((aten.bmm.default,), {"self": first, "mat2": second}),
        "einsum": Call((aten.einsum.default,), {"equation": Var(f"{name} equation"), "tensors": Each((first, second))}),
    }


def scores(q: Expression, k: Expression) -> OneOf:
    """q k^T, scaled in the same op or after it, or not."""
    added = {"self": Var("added"), "batch1": q, "batch2": k, "beta": Var("beta"), "alpha": Var("alpha")}
    plain = OneOf("scores by", {**products("scores", q, k), "baddbmm": Call((aten.baddbmm.default,), added)})
    scaled = {"self": cast("unscaled", plain), "other": Var("factor")}
    return OneOf(
        "scaling",
        {
            "times": Call((aten.mul.Tensor, aten.mul.Scalar, aten.mul_.Tensor, aten.mul_.Scalar), scaled),
            "over": Call((aten.div.Tensor, aten.div.Scalar, aten.div_.Tensor, aten.div_.Scalar), scaled),
            "none": plain,
        },
    )


def masked(scores: Expression) -> OneOf:
    """Scores with a mask of numbers added, or filled where a boolean one says so, or as they are."""
    low = Literal(lambda value: isinstance(value, (int, float)) and value <= -9e3, "a value that hides scores (-inf)")
    sums, fills = (aten.add.Tensor, aten.add_.Tensor), (aten.masked_fill.Scalar, aten.masked_fill_.Scalar)
    return OneOf(
        "masking",
        {
            "added": Call(sums, {"self": scores, "other": Var("mask")}, commutes=("self", "other")),
            "filled": Call(fills, {"self": scores, "mask": Var("mask"), "value": low}),
            "chosen": Call((aten.where.ScalarOther,), {"condition": Var("mask"), "self": scores, "other": low}),
            "none": scores,
        },
    )


def weights(scores: Expression) -> OneOf:
    """softmax over the last dimension; casts, and dropouts that drop nothing, may stand before and after."""
    last = Literal(lambda value: value in (-1, 2, 3), "softmax over the last dimension (keys)")
    softmax = {"self": shifted(scores), "dim": last, "dtype": Var("softmax dtype")}
    over_sum = Call(OVER, {"self": exponentials(scores), "other": TOTAL})
    return cast("weights", OneOf("softmax by", {"op": Call((aten.softmax.int,), softmax), "sum": over_sum}))


def _expression() -> OneOf:
    shown = masked(scores(Var("q"), Var("k")))
    later = {name: mix for name, mix in products("mix", exponentials(shown), Var("v")).items() if name != "einsum"}
    divided = Call(OVER, {"self": OneOf("mix by", later), "other": TOTAL})
    whole = products("mix", weights(shown), Var("v"))
    return OneOf("mix by", {**whole, "divided": Where(is_divided, "a division by a sum", divided)})


EXPRESSION = _expression()


def judge(found: Found) -> Accepted | Refused:
    bound = found.bound
    ranks = [rank(bound[name]) for name in "qkv"]
    softmax = next(n for n in found.nodes if n.target in (aten.softmax.int, aten.sum.dim_IntList))
    if len(set(ranks)) > 1 or ranks[0] not in (3, 4) or bound_dim(softmax) != ranks[0] - 1:
        return Refused("explicit", f"operands of rank {', '.join(map(str, ranks))}; {_SUPPORTED}")
    equations = equation(bound, "scores", ranks[0]), equation(bound, "mix", ranks[0])
    layout = layout_of(*equations)
    if layout is None:
        return Refused("explicit", f"{equations[0]} then {equations[1]} is no attention")
    q, k, v = (Laid(bound[name], dims) for name, dims in zip("qkv", (layout.q, layout.k, layout.v), strict=True))
    form, reason = attention_kind(q.node, k.node)
    scale, problem = _scale(found)
    if (mask := bound.get("mask")) is not None and bound["masking"] == "added" and not _is_number(mask):
        problem = f"{mask} is added to the scores"
    reason = reason or problem or operand_shapes(q, k, v) or _mixed(q, k, v) or _rounding(found) or open_end(found)
    if reason:
        return Refused(form, reason)
    mask = None if bound["masking"] == "added" and mask and is_nothing(mask) else mask
    hides, mask = bound["masking"] == "filled", mask and unfolded(mask)
    operands = AttentionOperands(q, k, v, scale, layout.out, mask, hides)
    return Accepted(form, operands, mask and padding_refusal(mask, found.nodes[0]))


def _mixed(*operands: Laid) -> str | None:
    dtypes = {str(dtype(o.node)) for o in operands}
    return f"mixed dtypes {sorted(dtypes)} (autocast casts them inside the products)" if len(dtypes) > 1 else None


_SUPPORTED = "[batch, heads, tokens, width] and [heads, tokens, width] are supported"


def bound_dim(softmax: fx.Node) -> int:
    """Of a softmax or a sum."""
    given = softmax.args[1]
    (dim,) = given if isinstance(given, (list, tuple)) else [given]
    assert isinstance(dim, int)
    return dim % rank(softmax.all_input_nodes[0])


def _scale(found: Found) -> tuple[float, str | None]:
    bound = found.bound
    scale = 1.0
    if bound["scores by"] == "baddbmm":
        if bound["beta"] != 0 and bound["added"].target not in (_EMPTY[1:]):
            return scale, f"{bound['added']} is added to the scores"
        scale = float(bound["alpha"])
    if bound["scaling"] == "none":
        return scale, None
    factor = bound["factor"]
    if not isinstance(factor, (int, float)):
        return scale, "scale is computed in the graph, not a constant"
    return scale * (float(factor) if bound["scaling"] == "times" else 1.0 / float(factor)), None


def _is_number(mask: object) -> bool:
    """Whether a mask is a tensor of floating-point numbers: a boolean one would add 1."""
    return isinstance(mask, fx.Node) and (kind := dtype(mask)) is not None and kind.is_floating_point


def _rounding(found: Found) -> str | None:
    given = dtype(found.bound["q"])
    assert given is not None
    for node in found.nodes:
        if (made := dtype(node)) is not None and torch.promote_types(made, given) != made:
            return f"{node} rounds to {made} between the products"
    made = dtype(found.nodes[0])
    return None if made == given else f"autocast makes {made} of {given}"


class _Module(nn.Module):
    """torch.nn.MultiheadAttention, asked for its weights; they are returned where `leak`."""

    def __init__(self, leak: bool = False) -> None:
        super().__init__()
        self.inner, self.leak = nn.MultiheadAttention(16, 2, batch_first=True).eval(), leak

    def forward(self, x: torch.Tensor) -> object:
        out, shares = self.inner(x, x, x, need_weights=True)
        return (out, shares) if self.leak else out


def _matmul(scale: float | torch.Tensor, dim: int = -1):
    return lambda q, k, v: ((q @ k.transpose(-2, -1)) * scale).softmax(dim=dim) @ v


def _folded(attend):
    """`attend` over operands [batch * heads, tokens, width]."""

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attend(*(t.reshape(-1, *t.shape[-2:]) for t in (q, k, v))).view(*q.shape)

    return call


def _baddbmm(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    nothing = torch.empty(*q.shape[:2], k.shape[1])
    return torch.bmm(torch.baddbmm(nothing, q, k.mT, beta=0, alpha=0.4).softmax(-1), v)


def _einsum(scores: str, mix: str, laid=lambda t: t):
    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        shares = (torch.einsum(scores, laid(q), laid(k)) / 8**0.5).softmax(-1)
        return laid(torch.einsum(mix, shares, laid(v)))

    return call


def _half(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.softmax(q @ k.mT * 8**-0.5, -1, dtype=torch.float32).to(torch.bfloat16).to(q.dtype) @ v


def _over_sum(shift=None, total=lambda e: e.sum(-1, keepdim=True)):
    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        s = q @ k.mT * 0.3
        e = torch.exp(s - shift(s) if shift else s)
        return (e / total(e)) @ v

    return call


def _exp_in_place(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    s = q @ k.mT * 0.3
    e = s.sub_(s.amax(-1, keepdim=True)).exp_()
    return e.div_(e.sum(-1, keepdim=True)) @ v


def _divided_after(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    s = (q @ k.mT * 0.3).double()
    e = torch.exp(s - s.max(dim=-1, keepdim=True)[0]).to(q.dtype)
    return (e @ v) / e.sum(-1, keepdim=True)


def _x() -> tuple[torch.Tensor]:
    return (torch.randn(2, 24, 16),)


def examples() -> Sequence[Example]:
    calls = {
        "scale after": _matmul(0.5),
        "scale before": lambda q, k, v: ((q * 0.5) @ k.mT).softmax(-1) @ v,
        "scale on both": lambda q, k, v: ((q * 0.6) @ (k * 0.6).transpose(-1, -2)).softmax(-1) @ v,
        "division": lambda q, k, v: (q @ k.mT / 2).softmax(3) @ v,
        "softmax in higher precision": lambda q, k, v: (q @ k.mT).double().mul(0.3).softmax(-1).to(q.dtype) @ v,
        "softmax to a dtype": lambda q, k, v: F.softmax(q @ k.mT, -1, dtype=torch.float64).type_as(v) @ v,
        "dropout of nothing": lambda q, k, v: F.dropout((q @ k.mT).softmax(-1), 0.1, training=False) @ v,
        "bmm": _folded(lambda q, k, v: torch.bmm(torch.bmm(q, k.mT).mul(0.3).softmax(-1), v)),
        "heads in the batch": _folded(_matmul(0.3)),
        "baddbmm": _folded(_baddbmm),
        "einsum": _einsum("bhnd,bhmd->bhnm", "bhnm,bhmd->bhnd"),
        "einsum, heads last": _einsum("bnhd, bmhd -> bhnm", "bhnm, bmhd -> bnhd", lambda t: t.transpose(1, 2)),
        "einsum, other letters": _einsum("bhid,bhjd->bhij", "bhqk,bhkc->bhqc"),
        "einsum, heads in the batch": _folded(_einsum("bid,bjd->bij", "bij,bjd->bid")),
        "einsum with dots": _einsum("...id,...jd->...ij", "...ij,...jd->...id"),
        "einsum, then matmul": lambda q, k, v: torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1) @ v,
    }
    hidden = torch.arange(24) > 16
    calls |= {
        "exp over sum": lambda q, k, v: ((e := (q @ k.mT * 0.3).exp()) / e.sum(3, keepdim=True)) @ v,
        "exp over sum, less the maximum": _over_sum(lambda s: s.max(-1, keepdim=True).values),
        "exp over sum, less the maximum of a constant": _over_sum(lambda s: s.detach().amax(-1, keepdim=True)),
        "exp over sum, spread": _over_sum(lambda s: s.amax(-1, True), lambda e: e.sum(-1)[..., None]),
        "exp over sum, in place": _exp_in_place,
        "exp, divided after": lambda q, k, v: ((e := (q @ k.mT * 0.3).exp()) @ v) / e.sum(-1, keepdim=True),
        "exp in higher precision, divided after": _divided_after,
        "exp in higher precision, sum too": lambda q, k, v: (
            (e := (q @ k.mT).double().exp()).to(q.dtype) @ v / e.sum(-1, keepdim=True).to(q.dtype)
        ),
        "exp over sum, einsum": lambda q, k, v: torch.einsum(
            "bhnm,bhmd->bhnd", (e := torch.einsum("bhnd,bhmd->bhnm", q, k).exp()) / e.sum(-1, keepdim=True), v
        ),
        "softmax less the maximum": lambda q, k, v: ((s := q @ k.mT * 0.3) - s.amax(-1, keepdim=True)).softmax(-1) @ v,
        "softmax less the maximum of all": lambda q, k, v: (
            ((s := (q @ k.mT).double()) - s.max()).softmax(-1).to(q.dtype) @ v
        ),
        "exp over sum, less the maximum of all": _over_sum(lambda s: s.amax()),
        "padding filled in place": lambda q, k, v: (
            (q @ k.mT).masked_fill_(hidden[None, None, None].expand(2, 1, 1, 24), -1e9).softmax(-1) @ v
        ),
        "padding chosen": lambda q, k, v: (
            torch.where(~hidden[None, None, None].expand(2, 1, 1, 24), q @ k.mT, -torch.inf).softmax(-1) @ v
        ),
        "zeros added": lambda q, k, v: (q @ k.mT + torch.zeros(24, 24)).softmax(-1) @ v,
        "zeros added in place": lambda q, k, v: (q @ k.mT).add_(q.new_zeros(2, 1, 24, 24)).softmax(-1) @ v,
        "scaled in place": lambda q, k, v: (q @ k.mT).mul_(0.3).softmax(-1) @ v,
    }
    return [
        *(Example(name, lambda call=call: (SelfAttention(call), _x())) for name, call in calls.items()),
        Example("nn.MultiheadAttention", lambda: (_Module(), _x())),
    ]


def near_misses() -> Sequence[Example]:
    def leaking(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        shares = (q @ k.mT).softmax(dim=-1)
        return shares @ v + shares.sum(-1, keepdim=True)

    def written(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        shares = (q @ k.mT).softmax(-1)
        q[..., 1:].mul_(2)
        return shares @ v + q

    def told(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        e = (q @ k.mT).exp()
        return (e / e.sum(-1, keepdim=True)) @ v + e.mean(-1, keepdim=True)

    last = "over the last dimension"
    calls = {
        "sum over rows": (_over_sum(total=lambda e: e.sum(-2, keepdim=True)), last),
        "sum over heads": (_over_sum(total=lambda e: e.sum(1, keepdim=True)), last),
        "maximum over rows": (_over_sum(lambda s: s.amax(-2, keepdim=True)), last),
        "sum of others": (_over_sum(total=lambda e: e.flip(-1).cos().sum(-1, keepdim=True)), "the same exponentials"),
        "sum and a little": (_over_sum(total=lambda e: e.sum(-1, keepdim=True) + 1e-3), "saw add 0.001"),
        "maximum of others": (_over_sum(lambda s: s.sin().amax(-1, keepdim=True)), "the same unshifted"),
        "softmax less a maximum over rows": (
            lambda q, k, v: ((s := q @ k.mT) - s.amax(-2, keepdim=True)).softmax(-1) @ v,
            last,
        ),
        "softmax less a maximum of others": (
            lambda q, k, v: ((s := q @ k.mT) - s.cos().amax(-1, keepdim=True)).softmax(-1) @ v,
            "the same unshifted",
        ),
        "exponentials also used": (told, "also used by"),
        "divided after by rows": (
            lambda q, k, v: ((e := (q @ k.mT).exp()) @ v) / e.sum(-2, keepdim=True).mT,
            None,
        ),
        "softmax over rows": (_matmul(1.0, dim=-2), "softmax over the last dimension"),
        "softmax over heads": (_matmul(1.0, dim=1), "softmax over the last dimension"),
        "scale is a tensor": (_matmul(torch.tensor(0.3)), "scale is computed in the graph"),
        "scale of the input": (lambda q, k, v: (q @ k.mT * q.mean()).softmax(-1) @ v, "scale is computed in the graph"),
        "a number added": (lambda q, k, v: (q @ k.mT + 1).softmax(-1) @ v, "1 is added to the scores"),
        "zeros added that were written to": (
            lambda q, k, v: (q @ k.mT + torch.zeros(24, 24).masked_fill_(q[0, 0, :, :1] > 0, -1.0)).softmax(-1) @ v,
            "writes in place",
        ),
        "booleans added": (
            lambda q, k, v: (q @ k.mT + (torch.arange(24) < 9)).softmax(-1) @ v,
            "is added to the scores",
        ),
        "filled with zeros": (
            lambda q, k, v: (q @ k.mT).masked_fill(torch.ones(24, 24).tril() > 0, 0.0).softmax(-1) @ v,
            "a value that hides scores",
        ),
        "dropout in training": (lambda q, k, v: F.dropout((q @ k.mT).softmax(-1), 0.5) @ v, "dropout"),
        "weights also used": (leaking, "also used by"),
        "operand is written to": (written, "writes in place"),
        "rounded": (_half, "rounds to torch.bfloat16"),
        "softmax over queries": (_einsum("bhnd,bhmd->bhmn", "bhmn,bhmd->bhnd"), "is no attention"),
        "sum over keys": (_einsum("bhnd,bhmd->bhnm", "bhnm,bhmd->bhmd"), "is no attention"),
        "scores added": (
            _folded(lambda q, k, v: torch.baddbmm(torch.ones(1, 24, 24).triu(), q, k.mT).softmax(-1) @ v),
            "is added to the scores",
        ),
        "one head without a batch": (
            lambda q, k, v: _matmul(1.0)(q[0, 0], k[0, 0], v[0, 0])[None, None],
            "operands of rank 2",
        ),
    }
    return [
        *(Example(name, lambda call=call: (SelfAttention(call), _x()), why) for name, (call, why) in calls.items()),
        Example("cross", lambda: (SelfAttention(_matmul(1.0), 16), (*_x(), *_x())), "cross attention"),
        Example("weights are returned", lambda: (_Module(leak=True), _x()), "also used by"),
    ]


SOFTMAX = Pattern("softmax", "attention", EXPRESSION, judge, examples, near_misses)
