"""Scaled dot-product attention as one op: softmax(scale * q k^T) v.

Self and joint attention are accepted; which it is, is told by the streams that q and k were projected from, never by
lengths (text and image lengths can be equal).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import fx, nn

from chipmunk_fx.graph.capture import SDPA_CHOICE
from chipmunk_fx.graph.language import Call, Found, Var
from chipmunk_fx.graph.masks import divided, is_nothing, padding_refusal, unfolded
from chipmunk_fx.graph.pattern import Accepted, AttentionOperands, Example, Laid, Pattern, Refused
from chipmunk_fx.graph.walk import origins, roots, shape

aten = torch.ops.aten

EXPRESSION = Call(
    ops=(aten.scaled_dot_product_attention.default,),
    args={
        "query": Var("q"),
        "key": Var("k"),
        "value": Var("v"),
        "attn_mask": Var("mask"),
        "dropout_p": Var("dropout"),
        "is_causal": Var("causal"),
        "scale": Var("scale"),
        "enable_gqa": Var("grouped"),
    },
)


def judge(found: Found) -> Accepted | Refused:
    q, k, v = (found.bound[name] for name in "qkv")
    form, reason = attention_kind(q, k)
    operands = Laid(q), Laid(k), Laid(v)
    reason = reason or _unsupported(found) or operand_shapes(*operands)
    if reason:
        return Refused(form, reason)
    scale, mask = found.bound["scale"], found.bound["mask"]
    mask = None if mask is None or is_nothing(mask) else mask
    mask, rows = divided(unfolded(mask), found.nodes[0]) if mask else (None, None)
    scale = shape(q)[-1] ** -0.5 if scale is None else float(scale)
    sdpa = found.nodes[0].meta.get("custom", {}).get(SDPA_CHOICE, "")
    # PyTorch takes one dtype, that of the result: where an operand has another, autocast is on and casts it inside.
    attended = AttentionOperands(
        *operands, scale, None, mask, rows=rows, sdpa=sdpa, cast=found.nodes[0].meta["val"].dtype
    )
    return Accepted(form, attended, mask and padding_refusal(mask, found.nodes[0]))


def attention_kind(q: fx.Node, k: fx.Node) -> tuple[str, str | None]:
    """("self" | "joint" | "image queries" | "cross" | "unknown", reason to refuse)."""
    queries, keys = roots(q), roots(k)
    if not queries or not keys:
        return "unknown", f"no linear projection found behind the {'queries' if not queries else 'keys'}"
    if queries == keys:
        return ("self" if len(queries) == 1 else "joint"), None
    if queries < keys:
        return "image queries", None
    if origins(q) == origins(k):  # keys of a latent, or of fewer tokens, that the same stream was projected to
        return "self", None
    names = ", ".join(sorted(n.name for n in keys - queries))
    return "cross", f"cross attention: keys are projected from {names}, which queries are not"


def operand_shapes(q: Laid, k: Laid, v: Laid) -> str | None:
    if any(len(o.shape) != 4 for o in (q, k, v)):
        ranks = ", ".join(str(len(o.shape)) for o in (q, k, v))
        return f"operands of rank {ranks}; [batch, heads, tokens, width] is supported"
    if k.shape[1] != v.shape[1] or q.shape[1] % k.shape[1]:
        return f"{q.shape[1]} query heads on {k.shape[1]} key and {v.shape[1]} value heads are no groups"
    if q.shape[-1] != v.shape[-1]:
        return f"value width {v.shape[-1]} differs from query width {q.shape[-1]}"
    if q.shape[0] != k.shape[0]:
        return f"batch {k.shape[0]} of the keys differs from {q.shape[0]} of the queries"
    return None


def _unsupported(found: Found) -> str | None:
    bound = found.bound
    if bound["causal"]:
        return "causal attention"
    if bound["dropout"] != 0:
        return f"dropout_p={bound['dropout']} on attention weights"
    if isinstance(bound["scale"], fx.Node):
        return "scale is computed in the graph, not a constant"
    return None


class SelfAttention(nn.Module):
    """A minimal block for examples; `call` is the attention, over heads of width 8."""

    def __init__(self, call, context: int | None = None) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(context or 16, 16), nn.Linear(context or 16, 16)
        self.call, self.context = call, context

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        source = x if context is None else context
        q, k, v = (
            layer(t).unflatten(-1, (2, 8)).transpose(1, 2)
            for layer, t in ((self.q, x), (self.k, source), (self.v, source))
        )
        return self.call(q, k, v).transpose(1, 2).flatten(2)


class _Joint(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(16, 48), nn.Linear(16, 48)

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        both = torch.cat([self.text(text), self.image(image)], dim=1)
        q, k, v = both.unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class _ImageQueries(_Joint):
    """Image tokens attend to image and text; text attends to nothing."""

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        both = torch.cat([self.text(text), self.image(image)], dim=1)
        _, k, v = both.unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        q = self.image(image)[..., :16].unflatten(-1, (2, 8)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class _Registers(SelfAttention):
    """Learnt tokens among the keys, joined to the image's before the projection."""

    def __init__(self) -> None:
        super().__init__(F.scaled_dot_product_attention)
        self.registers = nn.Parameter(torch.randn(1, 4, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        both = torch.cat([self.registers.expand(len(x), -1, -1), x], dim=1)
        q, k, v = (
            layer(t).unflatten(-1, (2, 8)).transpose(1, 2) for layer, t in ((self.q, x), (self.k, both), (self.v, both))
        )
        return self.call(q, k, v).transpose(1, 2).flatten(2)


class _Latent(SelfAttention):
    """Keys and values of a normed low rank of the stream (multi-head latent attention)."""

    def __init__(self) -> None:
        super().__init__(F.scaled_dot_product_attention)
        self.down, self.norm = nn.Linear(16, 4), nn.LayerNorm(4)
        self.k, self.v = nn.Linear(4, 16), nn.Linear(4, 16)

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        latent = self.norm(self.down(x if context is None else context))
        q, k, v = (
            layer(t).unflatten(-1, (2, 8)).transpose(1, 2)
            for layer, t in ((self.q, x), (self.k, latent), (self.v, latent))
        )
        return self.call(q, k, v).transpose(1, 2).flatten(2)


class _Padded(SelfAttention):
    def __init__(self, spell: Callable[[torch.Tensor], torch.Tensor] = lambda present: present[:, None, None]) -> None:
        super().__init__(F.scaled_dot_product_attention)
        self.spell = spell

    def forward(self, x: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).unflatten(-1, (2, 8)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.call(q, k, v, self.spell(present)).transpose(1, 2).flatten(2)


class _Unprojected(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = x.unflatten(-1, (2, 8)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)


def _x(tokens: int = 24) -> torch.Tensor:
    return torch.randn(1, tokens, 16)


def examples() -> Sequence[Example]:
    sdpa = F.scaled_dot_product_attention
    paddings: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "padded keys": lambda present: present[:, None, None],
        "padded keys, copied for every head": lambda present: present[:, None, None].repeat_interleave(2, dim=1),
        "padded keys and rows": lambda present: present[:, None, None] & present[:, None, :, None],
    }
    return [
        Example("self", lambda: (SelfAttention(sdpa), (_x(),))),
        Example("scale", lambda: (SelfAttention(lambda q, k, v: sdpa(q, k, v, scale=0.5)), (_x(),))),
        Example("joint", lambda: (_Joint(), (_x(), _x(8)))),
        Example("image queries", lambda: (_ImageQueries(), (_x(), _x(8)))),
        Example("learnt tokens among the keys", lambda: (_Registers(), (_x(),))),
        Example("keys of a latent", lambda: (_Latent(), (_x(),))),
        Example(
            "grouped heads",
            lambda: (SelfAttention(lambda q, k, v: sdpa(q, k[:, :1], v[:, :1], enable_gqa=True)), (_x(),)),
        ),
        *(
            Example(name, lambda spell=spell: (_Padded(spell), (_x(), torch.arange(24).expand(1, -1) < 17)))
            for name, spell in paddings.items()
        ),
    ]


def near_misses() -> Sequence[Example]:
    sdpa = F.scaled_dot_product_attention
    return [
        Example(
            "causal",
            lambda: (SelfAttention(lambda q, k, v: sdpa(q, k, v, is_causal=True)), (_x(),)),
            "causal attention",
        ),
        Example(
            "dropout", lambda: (SelfAttention(lambda q, k, v: sdpa(q, k, v, dropout_p=0.5)), (_x(),)), "dropout_p=0.5"
        ),
        Example("cross", lambda: (SelfAttention(sdpa, 16), (_x(), _x())), "cross attention"),
        Example("keys of another's latent", lambda: (_Latent(), (_x(), _x())), "cross attention"),
        Example("no projection", lambda: (_Unprojected(), (_x(),)), "no linear projection"),
        Example(
            "heads folded into the batch",
            lambda: (SelfAttention(lambda q, k, v: sdpa(q[0], k[0], v[0]).unsqueeze(0)), (_x(),)),
            "operands of rank 3, 3, 3",
        ),
        Example(
            "value width", lambda: (SelfAttention(lambda q, k, v: sdpa(q, k, v[..., :4])), (_x(),)), "value width 4"
        ),
    ]


ATTENTION = Pattern("sdpa", "attention", EXPRESSION, judge, examples, near_misses, begins=1)
