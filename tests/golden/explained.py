"""A model with sites of each kind, weights used twice and, in `odd`, a near miss of each kind."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, TEXT = 32, 2, 16


class Attention(nn.Module):
    """Self attention of x [B, N, 32], or cross attention to context [B, T, 16]; `attend` takes [B, 2, *, 16]."""

    def __init__(self, context: int = WIDTH) -> None:
        super().__init__()
        self.q, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k, self.v = nn.Linear(context, WIDTH), nn.Linear(context, WIDTH)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        source = x if context is None else context
        projected = self.q(x), self.k(source), self.v(source)
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in projected)
        return self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class CausalAttention(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class DropoutAttention(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.1)


class WindowedAttention(Attention):
    """A mask over queries and keys."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        place = torch.arange(q.shape[2])
        return F.scaled_dot_product_attention(q, k, v, (place[:, None] - place).abs() < 8)


class LearntScaleAttention(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * self.scale).softmax(-1) @ v


class SoftmaxOverQueries(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * 0.25).softmax(-2) @ v


class ReturnedWeights(Attention):
    """Attention weights leave the attention."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.mT * 0.25).softmax(-1)
        return weights @ v + weights.amax(-1, keepdim=True)


class SwigluMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(WIDTH, 2 * WIDTH, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class DropoutMlp(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.dropout(F.gelu(self.fc1(x)), 0.1, training=True))


class LeakingMlp(Mlp):
    """Hidden values are used beside the second linear."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.fc1(x))
        return self.fc2(hidden) + hidden.mean(-1, keepdim=True)


class WrittenMlp(Mlp):
    """A part of the input is written to between the two linears."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        hidden = F.gelu(self.fc1(x))
        x[:, 1:].mul_(2)
        return self.fc2(hidden) + x


class TiedMlp(nn.Module):
    """One weight for both linears."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x, self.weight)), self.weight)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(WIDTH) for _ in range(3))
        self.attention, self.cross, self.mlp = Attention(), Attention(TEXT), SwigluMlp()

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        x = x + self.cross(self.norm2(x), text)
        return x + self.mlp(self.norm3(x))


class Explained(nn.Module):
    """latents [B, 4, h, w], timestep [B], text [B, T, 16] -> [B, (h/2)*(w/2), 32]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.time = nn.Conv2d(4, WIDTH, 2, 2), nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.tied, self.shared = TiedMlp(), Mlp()
        self.odd = nn.ModuleDict(
            {
                "causal": CausalAttention(),
                "dropout": DropoutAttention(),
                "windowed": WindowedAttention(),
                "learnt_scale": LearntScaleAttention(),
                "over_queries": SoftmaxOverQueries(),
                "returned_weights": ReturnedWeights(),
                "dropout_mlp": DropoutMlp(),
                "leaking_mlp": LeakingMlp(),
                "written_mlp": WrittenMlp(),
            }
        )

    def forward(self, latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        x = self.embed(latents).flatten(2).mT
        angles = timestep[:, None] * torch.exp(-torch.arange(WIDTH // 2) / 2)
        x = x + self.time(torch.cat([angles.sin(), angles.cos()], -1))[:, None]
        for block in self.blocks:
            x = block(x, text)
        for layer in (self.tied, self.shared, self.shared, *self.odd.values()):
            x = x + layer(F.layer_norm(x, (WIDTH,)))
        return x
