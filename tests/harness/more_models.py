"""Diffusion transformers in the manner in which people write them, none of which the compiler was built along with.

Each style is an `Unlisted`: how to make it, and what is in it by reading its source. Two samples, 256 image tokens.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.harness.hand_models import FusedAttention, GeluMlp, HandDiT

SIDE, DEPTH = 32, 2


@dataclass(frozen=True)
class Unlisted:
    """`attention`, `mlp`: sites that can be sparse, of the whole model; `reason`: what the refused ones are said to be."""

    make: Callable[[], nn.Module]
    attention: int = DEPTH
    mlp: int = DEPTH
    reason: str = ""
    whole: bool = True


class TimmAttention(FusedAttention):
    """timm's, where fused attention is off: norms of q and k, dropouts that do nothing."""

    def __init__(self, width: int, heads: int):
        super().__init__(width, heads)
        self.q_norm, self.k_norm = nn.LayerNorm(width // heads), nn.LayerNorm(width // heads)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        q, k = self.q_norm(q) * q.shape[-1] ** -0.5, self.k_norm(k)
        weights = self.drop((q @ k.transpose(-2, -1)).softmax(dim=-1))
        return self.drop(self.proj((weights @ v).transpose(1, 2).reshape(x.shape)))


class ChunkedAttention(nn.Module):
    """q, k, v by chunk, heads in the batch as einops does it, softmax in fp32."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)

    def heads_of(self, t: Tensor) -> Tensor:
        b, n, c = t.shape
        return t.reshape(b, n, self.heads, c // self.heads).permute(0, 2, 1, 3).reshape(b * self.heads, n, -1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = map(self.heads_of, self.qkv(x).chunk(3, dim=-1))
        scores = torch.einsum("b i d, b j d -> b i j", q, k) * q.shape[-1] ** -0.5
        out = torch.einsum("b i j, b j d -> b i d", scores.float().softmax(dim=-1).to(v.dtype), v)
        return self.proj(out.reshape(x.shape[0], self.heads, x.shape[1], -1).permute(0, 2, 1, 3).reshape(x.shape))


class RotaryAttention(FusedAttention):
    """Positions by complex numbers, q and k normed in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        n, d = q.shape[-2:]
        angles = torch.outer(torch.arange(n), 1.0 / 100.0 ** (torch.arange(0, d, 2) / d))
        turns = torch.polar(torch.ones_like(angles), angles)

        def turned(t: Tensor) -> Tensor:
            t = F.rms_norm(t.float(), (d,)).unflatten(-1, (-1, 2))
            return torch.view_as_real(torch.view_as_complex(t.contiguous()) * turns).flatten(-2).to(v.dtype)

        out = F.scaled_dot_product_attention(turned(q), turned(k), v)
        return self.proj(out.transpose(1, 2).reshape(x.shape))


class NormedAttention(FusedAttention):
    """Norms of q and k, which autocast computes in fp32, and not v."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        q, k = (F.layer_norm(t, t.shape[-1:]) for t in (q, k))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))


class GroupedAttention(nn.Module):
    """Four query heads on two of the keys, repeated."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (4, -1)).transpose(1, 2)
        k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.kv(x).chunk(2, dim=-1))
        k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class SeparateBiasAttention(FusedAttention):
    """BEiT's: one weight, a bias for q and v alone, joined in each call; the scale is written over q."""

    def __init__(self, width: int, heads: int):
        super().__init__(width, heads)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias).reshape(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        q = q * q.shape[-1] ** -0.5
        return self.proj(((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).reshape(x.shape))


class SampleLoopAttention(FusedAttention):
    """One attention a sample."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        each = [F.scaled_dot_product_attention(q[i : i + 1], k[i : i + 1], v[i : i + 1]) for i in range(len(q))]
        return self.proj(torch.cat(each).transpose(1, 2).reshape(x.shape))


class QueryChunkAttention(FusedAttention):
    """The rows in two halves, to save memory."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        each = [(part * 0.25 @ k.mT).softmax(-1) @ v for part in q.chunk(2, dim=2)]
        return self.proj(torch.cat(each, dim=2).transpose(1, 2).reshape(x.shape))


class SinkAttention(FusedAttention):
    """A learned score a head takes part in the softmax and adds nothing."""

    def __init__(self, width: int, heads: int):
        super().__init__(width, heads)
        self.sinks = nn.Parameter(torch.ones(heads))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        scores = q @ k.mT * q.shape[-1] ** -0.5
        sinks = self.sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
        return self.proj((weights @ v).transpose(1, 2).reshape(x.shape))


class MaskedAttention(FusedAttention):
    """SDPA under a mask that `make` gives for (tokens); `explicit`: written out."""

    def __init__(self, width: int, heads: int, make: Callable[[int], Tensor | None], explicit: bool = False):
        super().__init__(width, heads)
        self.make, self.explicit = make, explicit

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        mask = self.make(x.shape[1])
        if self.explicit:
            out = (q @ k.mT * q.shape[-1] ** -0.5 + mask).softmax(-1) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(out.transpose(1, 2).reshape(x.shape))


class WindowAttention(FusedAttention):
    """Swin's: windows of 8 x 8 tokens are samples of their own."""

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        side = math.isqrt(n)
        windows = x.view(b, side // 8, 8, side // 8, 8, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 64, c)
        q, k, v = self.split(windows)
        out = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(windows.shape))
        return out.view(b, side // 8, side // 8, 8, 8, c).permute(0, 1, 3, 2, 4, 5).reshape(b, n, c)


class CosineAttention(FusedAttention):
    """Swin v2's: the temperature is learnt."""

    def __init__(self, width: int, heads: int):
        super().__init__(width, heads)
        self.temperature = nn.Parameter(torch.full((heads, 1, 1), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * self.temperature.clamp(max=4.6).exp()
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape))


class WeightsAttention(nn.Module):
    """nn.MultiheadAttention with its defaults: weights are asked for and thrown away; tokens first."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.inner = nn.MultiheadAttention(width, heads)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        out, _ = self.inner(x, x, x)
        return out.transpose(0, 1)


class ConvolutionAttention(nn.Module):
    """Latent diffusion's: q, k, v by 1x1 convolutions over [B, C, tokens]."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.q, self.k, self.v, self.proj = (nn.Conv1d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        q, k, v = self.q(x), self.k(x), self.v(x)
        weights = torch.bmm(q.permute(0, 2, 1), k) * q.shape[1] ** -0.5
        return self.proj(torch.bmm(v, weights.softmax(dim=2).permute(0, 2, 1))).transpose(1, 2)


class ReluSquaredMlp(GeluMlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(x)).square())


class GegluMlp(nn.Sequential):
    """One linear for both branches in a module of its own, dropout between."""

    class Geglu(nn.Module):
        def __init__(self, width: int):
            super().__init__()
            self.proj = nn.Linear(width, 8 * width)

        def forward(self, x: Tensor) -> Tensor:
            x, gate = self.proj(x).chunk(2, dim=-1)
            return x * F.gelu(gate)

    def __init__(self, width: int):
        super().__init__(self.Geglu(width), nn.Dropout(0.1), nn.Linear(4 * width, width), nn.Dropout(0.1))


class NormedMlp(GeluMlp):
    """A norm of the hidden values."""

    def __init__(self, width: int):
        super().__init__(width)
        self.norm = nn.LayerNorm(4 * width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.norm(F.gelu(self.fc1(x))))


class ExpertsMlp(nn.Module):
    """Three experts that all tokens pass, mixed by a router."""

    def __init__(self, width: int):
        super().__init__()
        self.router, self.experts = nn.Linear(width, 3), nn.ModuleList(GeluMlp(width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        shares = self.router(x).softmax(-1)
        return sum(shares[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts))


class RoutedMlp(ExpertsMlp):
    """Each token passes the one expert that it is routed to."""

    def forward(self, x: Tensor) -> Tensor:
        flat, out = x.flatten(0, 1), torch.zeros_like(x.flatten(0, 1))
        chosen = self.router(flat).argmax(-1)
        for i, expert in enumerate(self.experts):
            rows = torch.where(chosen == i)[0]
            out.index_add_(0, rows, expert(flat[rows]))
        return out.view_as(x)


class QuantisedLinear(nn.Module):
    """int8 weights with a scale a row, made wide again in each call."""

    def __init__(self, width: int, out: int):
        super().__init__()
        plain = nn.Linear(width, out)
        scale = plain.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (plain.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = nn.Parameter(plain.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


class QuantisedMlp(GeluMlp):
    def __init__(self, width: int):
        super().__init__(width)
        self.fc1, self.fc2 = QuantisedLinear(width, 4 * width), QuantisedLinear(4 * width, width)


def dit(
    attention: Callable[[int, int], nn.Module] = FusedAttention, mlp: Callable[[int], nn.Module] = GeluMlp
) -> Callable[[], nn.Module]:
    return lambda: HandDiT(attention, mlp, SIDE, DEPTH)


def masked(make: Callable[[int], Tensor | None], explicit: bool = False) -> Callable[[], nn.Module]:
    return dit(partial(MaskedAttention, make=make, explicit=explicit))


def padding(n: int) -> Tensor:
    return torch.arange(n)[None, None, None] < n - 40


def causal(n: int) -> Tensor:
    return torch.ones(n, n).tril().bool()


def band(n: int) -> Tensor:
    places = torch.arange(n)
    return (places[:, None] - places).abs() <= 32


def written_padding(n: int) -> Tensor:
    """The keys that are left out are written into a mask of its own, by way of a part of it."""
    mask = torch.zeros(1, 1, 1, n)
    mask[..., n - 40 :] = -torch.inf
    return mask


def added(mask: Callable[[int], Tensor]) -> Callable[[int], Tensor]:
    return lambda n: torch.zeros(()).masked_fill(~mask(n), -torch.inf)


ATTENTIONS: dict[str, Unlisted] = {
    "timm": Unlisted(dit(TimmAttention)),
    "chunked, heads in the batch": Unlisted(dit(ChunkedAttention, GegluMlp)),
    "complex rotary": Unlisted(dit(RotaryAttention)),
    "normed": Unlisted(dit(NormedAttention)),
    "grouped heads repeated": Unlisted(dit(GroupedAttention, ReluSquaredMlp)),
    "bias of q and v": Unlisted(dit(SeparateBiasAttention)),
    "one attention a sample": Unlisted(dit(SampleLoopAttention), attention=2 * DEPTH),
    "rows in halves": Unlisted(dit(QueryChunkAttention), attention=2 * DEPTH),
    "sinks": Unlisted(dit(SinkAttention), attention=0, reason="go to aten.slice.Tensor"),
    "padding": Unlisted(masked(padding)),
    "padding added": Unlisted(masked(added(padding))),
    "padding added, written out": Unlisted(masked(added(padding), explicit=True)),
    "padding written": Unlisted(masked(written_padding)),
    "causal mask": Unlisted(masked(causal), reason="differs from row to row"),
    "band": Unlisted(masked(band), reason="differs from row to row"),
    "band added, written out": Unlisted(masked(added(band), explicit=True), reason="differs from row to row"),
    "windows": Unlisted(dit(WindowAttention)),
    "cosine": Unlisted(dit(CosineAttention), attention=0, reason="scale is computed"),
    "weights thrown away": Unlisted(dit(WeightsAttention)),
    "convolutions": Unlisted(dit(ConvolutionAttention), attention=0, reason="weights first"),
}
MLPS: dict[str, Unlisted] = {
    "geglu": Unlisted(dit(mlp=GegluMlp)),
    "normed hidden": Unlisted(dit(mlp=NormedMlp), mlp=0),
    "experts mixed": Unlisted(dit(mlp=ExpertsMlp), mlp=3 * DEPTH),
    "experts routed": Unlisted(dit(mlp=RoutedMlp), mlp=0, reason="routed expert", whole=False),
    "int8": Unlisted(dit(mlp=QuantisedMlp)),
}
