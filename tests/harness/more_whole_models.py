"""Whole transformers in ways that are common outside of libraries: other blocks, other times, other calls of blocks.

All take x [2, 4, 32, 32], t [2] and y [2], and have 256 image tokens.
"""

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.harness.hand_models import FusedAttention, GeluMlp, SoftmaxAttention, SwigluMlp
from tests.harness.more_models import DEPTH, ReluSquaredMlp, Unlisted

WIDTH, HEADS, TOKENS = 32, 2, 256


def waves(t: Tensor) -> Tensor:
    angles = torch.outer(t.float(), torch.exp(-math.log(10000) * torch.arange(32) / 32))
    return torch.concat([angles.cos(), angles.sin()], dim=-1)


class Frame(nn.Module):
    """Patches in, patches out; what is between is `run`."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(4, WIDTH, 2, 2)
        self.position = nn.Parameter(torch.randn(1, TOKENS, WIDTH) * 0.02)
        self.time = nn.Sequential(nn.Linear(64, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.label = nn.Embedding(10, WIDTH)
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 16)

    def condition(self, t: Tensor) -> Tensor:
        return self.time(waves(t))

    def run(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2) + self.position
        x = self.out(self.norm(self.run(x, self.condition(t)[:, None], self.label(y)[:, None])))
        return x.reshape(-1, 16, 16, 2, 2, 4).permute(0, 5, 1, 3, 2, 4).reshape(-1, 4, 32, 32)


class ParallelBlock(nn.Module):
    """Attention and MLP side by side on one norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention, self.mlp = nn.LayerNorm(WIDTH), FusedAttention(WIDTH, HEADS), ReluSquaredMlp(WIDTH)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        return self.dropout(x + self.attention(normed) + self.mlp(normed))


class Stack(Frame):
    """`shared`: one block three times. `saved`: each block under a checkpoint, in evaluation too. `broken`: a graph a block."""

    def __init__(self, shared: bool = False, saved: bool = False, broken: bool = False) -> None:
        super().__init__()
        self.saved, self.broken = saved, broken
        one = ParallelBlock()
        self.blocks = nn.ModuleList([one] * 3 if shared else [one, ParallelBlock()])
        self.dropout = nn.Dropout(0.1)

    def run(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        x = self.dropout(x + time + label)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.saved else block(x)
            if self.broken:
                torch._dynamo.graph_break()
        return x


class FourierTime(Stack):
    """Random frequencies, kept in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(32) * 0.1)

    def condition(self, t: Tensor) -> Tensor:
        angles = t[:, None] * self.frequencies[None] * 2 * math.pi
        return self.time(torch.cat([angles.sin(), angles.cos()], dim=-1))


class Encoder(Frame):
    """nn.TransformerEncoder, whose layers run as one fused kernel in evaluation."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 64, batch_first=True, **options)
        self.encoder = nn.TransformerEncoder(layer, DEPTH)

    def run(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        return self.encoder(x + time + label)


class TokensFirst(Frame):
    """nn.MultiheadAttention on [tokens, batch, width], the last 40 keys left out."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.MultiheadAttention(WIDTH, HEADS) for _ in range(DEPTH))
        self.mlps = nn.ModuleList(GeluMlp(WIDTH) for _ in range(DEPTH))

    def run(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        absent = (torch.arange(TOKENS) >= TOKENS - 40).expand(len(x), -1)
        x = (x + time + label).transpose(0, 1)
        for attention, mlp in zip(self.blocks, self.mlps, strict=True):
            x = x + attention(x, x, x, key_padding_mask=absent, need_weights=False)[0]
            x = x + mlp(x)
        return x.transpose(0, 1)


class LongSkips(Frame):
    """U-ViT: time and label are tokens, the second half of the blocks reads what the first half made."""

    class Block(nn.Module):
        def __init__(self, skip: bool) -> None:
            super().__init__()
            self.join = nn.Linear(2 * WIDTH, WIDTH) if skip else None
            self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
            self.attention, self.mlp = SoftmaxAttention(WIDTH, HEADS), GeluMlp(WIDTH)

        def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
            x = x if self.join is None else self.join(torch.cat([x, skip], dim=-1))
            x = x + self.attention(self.norm1(x))
            return x + self.mlp(self.norm2(x))

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = (
            nn.ModuleList([self.Block(False)]), self.Block(False), nn.ModuleList([self.Block(True)]),
        )  # fmt: skip

    def run(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        x, skips = torch.cat([time, label, x], dim=1), []
        for block in self.first:
            x = block(x)
            skips.append(x)
        x = self.middle(x)
        for block in self.last:
            x = block(x, skips.pop())
        return x[:, 2:]


class AddedInPlace(Frame):
    """What a block adds is written to the stream's own memory."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
            self.attention, self.mlp = FusedAttention(WIDTH, HEADS), GeluMlp(WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            x += self.attention(self.norm1(x))
            x += self.mlp(self.norm2(x))
            return x

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self.Block() for _ in range(DEPTH))

    def run(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        x = x + time + label
        for block in self.blocks:
            x = block(x)
        return x


class TwoStreams(Frame):
    """MM-DiT: registers beside the image, weights of their own, joined in attention."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
            self.proj = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
            self.mlp = nn.ModuleList(SwigluMlp(WIDTH) for _ in range(2))

        def forward(self, *streams: Tensor) -> list[Tensor]:
            joined = torch.cat(
                [layer(F.layer_norm(x, (WIDTH,))) for layer, x in zip(self.qkv, streams, strict=True)], 1
            )
            q, k, v = joined.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
            q, k = (F.rms_norm(part.float(), (16,)).to(v.dtype) for part in (q, k))
            out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            parts = out.split([x.shape[1] for x in streams], dim=1)
            added = [x + layer(part) for x, layer, part in zip(streams, self.proj, parts, strict=True)]
            return [x + mlp(F.layer_norm(x, (WIDTH,))) for x, mlp in zip(added, self.mlp, strict=True)]

    def __init__(self) -> None:
        super().__init__()
        self.registers = nn.Parameter(torch.randn(1, 16, WIDTH))
        self.blocks = nn.ModuleList(self.Block() for _ in range(DEPTH))

    def run(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        context = self.registers + time
        for block in self.blocks:
            context, x = block(context, x + label)
        return x


WHOLE: dict[str, Unlisted] = {
    "parallel": Unlisted(Stack),
    "one block three times": Unlisted(partial(Stack, shared=True), attention=3, mlp=3),
    "checkpoints": Unlisted(partial(Stack, saved=True)),
    "pieces": Unlisted(partial(Stack, broken=True), whole=False),
    "fourier time": Unlisted(FourierTime),
    "encoder, norm first": Unlisted(partial(Encoder, norm_first=True, activation=F.gelu)),
    "encoder, norm last": Unlisted(Encoder),
    "tokens first, padded": Unlisted(TokensFirst),
    "long skips": Unlisted(LongSkips, attention=3, mlp=3),
    "added in place": Unlisted(AddedInPlace),
    "two streams": Unlisted(TwoStreams, mlp=2 * DEPTH),
}
