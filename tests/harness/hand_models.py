"""A DiT written by hand, in the four spellings of attention that are seen outside diffusers."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Draw = Callable[..., Tensor]
Made = tuple[nn.Module, dict[str, Any]]


class FusedAttention(nn.Module):
    """One linear for q, k and v, split by reshape and permute, then SDPA."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        b, n, c = x.shape
        return self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))


class SoftmaxAttention(FusedAttention):
    """Scores, softmax and the product with v spelled out; the scale is on q."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        weights = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(x.shape))


class EinsumAttention(nn.Module):
    """Heads are a letter of an einsum; the scale is on the scores."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(width, 2 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q = self.q(x).view(b, n, self.heads, -1)
        k, v = (part.view(b, n, self.heads, -1) for part in self.kv(x).chunk(2, dim=-1))
        scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * (c // self.heads) ** -0.5
        return self.proj(torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v).reshape(b, n, c))


class ModuleAttention(nn.Module):
    """torch.nn.MultiheadAttention."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.inner = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x, need_weights=False)[0]


class GeluMlp(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SwigluMlp(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.gate = nn.Linear(width, 4 * width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Block(nn.Module):
    def __init__(self, width: int, attention: nn.Module, mlp: nn.Module):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attention, self.mlp = attention, mlp
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attention(modulate(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class HandDiT(nn.Module):
    """Class-conditional image DiT with adaptive layer norm (Peebles and Xie, arXiv 2212.09748).

    x [B, 4, side, side] latents, t [B] timesteps in [0, 1000], y [B] class labels; returns [B, 4, side, side].
    """

    def __init__(
        self, attention: Callable[[int, int], nn.Module], mlp: Callable[[int], nn.Module], side: int, depth: int = 3
    ):
        super().__init__()
        width, heads, patch, channels = 32, 2, 2, 4
        self.patch, self.channels = patch, channels
        self.embed = nn.Conv2d(channels, width, patch, patch)
        self.position = nn.Parameter(torch.randn(1, (side // patch) ** 2, width) * 0.02)
        self.time = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(10, width)
        self.blocks = nn.ModuleList(Block(width, attention(width, heads), mlp(width)) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.out = nn.Linear(width, patch * patch * channels)

    def embed_time(self, t: Tensor) -> Tensor:
        frequencies = torch.exp(-math.log(10000) * torch.arange(32, device=t.device) / 32)
        angles = t[:, None].float() * frequencies[None]
        return self.time(torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.out.weight.dtype))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = self.embed(x)
        b, _, h, w = x.shape
        x = x.flatten(2).transpose(1, 2) + self.position
        condition = self.embed_time(t) + self.label(y)
        for block in self.blocks:
            x = block(x, condition)
        shift, scale = self.modulation(condition).chunk(2, dim=1)
        x = self.out(modulate(self.norm(x), shift, scale))
        x = x.reshape(b, h, w, self.patch, self.patch, self.channels).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(b, self.channels, h * self.patch, w * self.patch)


def hand(attention: Callable[[int, int], nn.Module], mlp: Callable[[int], nn.Module]) -> Callable[[Draw, bool], Made]:
    """A maker of one spelling: `draw(*shape)` gives normal numbers, `large` asks for 576 tokens in place of 16."""

    def make(draw: Draw, large: bool) -> Made:
        side = 48 if large else 8
        inputs = {"x": draw(2, 4, side, side), "t": torch.tensor([100.0, 500.0]), "y": torch.tensor([1, 3])}
        return HandDiT(attention, mlp, side), inputs

    return make
