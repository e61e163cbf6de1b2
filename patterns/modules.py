"""Minimal modules in which patterns occur once, for examples and near misses: [B, N, 16] in, the same out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

Act = Callable[[torch.Tensor], torch.Tensor]


def tokens() -> tuple[torch.Tensor]:
    return (torch.randn(2, 24, 16),)


def halves(join: Callable[..., torch.Tensor], dim: int = -1) -> Act:
    return lambda x: join(*x.chunk(2, dim=dim))


class Mlp(nn.Module):
    """A norm, then `act` between two linears, `out` wide where it ends; `leak` also returns the hidden values."""

    def __init__(self, act: Act, out: int = 32, leak: bool = False) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(out, 16)
        self.act, self.leak = act, leak

    def forward(self, x: torch.Tensor) -> Any:
        hidden = self.act(self.fc1(self.norm(x)))
        return (self.fc2(hidden), hidden) if self.leak else self.fc2(hidden)


class GatedMlp(nn.Module):
    """`join` takes the two linears and what they read; what it gives besides the hidden values is returned too."""

    def __init__(self, join: Callable[..., Any]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.gate, self.up, self.down = (nn.Linear(16, 16, bias=False) for _ in range(3))
        self.join = join

    def forward(self, x: torch.Tensor) -> Any:
        hidden = self.join(self.gate, self.up, self.norm(x))
        return (self.down(hidden[0]), *hidden[1:]) if isinstance(hidden, tuple) else self.down(hidden)


class OneLinearMlp(nn.Module):
    """One linear for q, k, v (48 columns) and an MLP (32); `divide` gives the two. `halved`: the MLP is gated."""

    def __init__(self, divide: Callable[[torch.Tensor], Any], halved: bool = False) -> None:
        super().__init__()
        self.norm, self.first = nn.LayerNorm(16), nn.Linear(16, 80)
        self.side, self.fc2 = nn.Linear(48, 16), nn.Linear(16 if halved else 32, 16)
        self.divide, self.halved = divide, halved

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rest, hidden = self.divide(self.first(self.norm(x)))
        hidden = halves(lambda a, b: F.silu(a) * b)(hidden) if self.halved else F.gelu(hidden)
        return self.fc2(hidden) + self.side(rest.sin())


class Written(Mlp):
    """Writes to the input of the first linear before the second one runs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        hidden = self.act(self.fc1(x))
        x[:, 1:].mul_(2)
        return self.fc2(hidden) + x


class Unnormed(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Pooled(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.mean(1))


class Folded(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.flatten(0, 1)).view_as(x)


class Attending(Mlp):
    """Tokens of one sample without a batch, that attend to each other before."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = x.sin().unflatten(-1, (2, 8)).transpose(0, 1)[None]
        attended = F.scaled_dot_product_attention(heads, heads, heads)
        return super().forward(x + attended.squeeze(0).transpose(0, 1).flatten(1))


class Matmul(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.act(self.norm(x) @ self.fc1.weight.T + self.fc1.bias)
        return torch.matmul(hidden, self.fc2.weight.t())


class Untransposed(Mlp):
    """The first weight as [16, 32], one of several; a bias where it is `biased`."""

    def __init__(self, act: Act, biased: bool = False) -> None:
        super().__init__(act)
        self.kept = nn.Parameter(torch.randn(2, 16, 32) / 4)
        self.bias = nn.Parameter(torch.randn(32)) if biased else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x) @ self.kept[1]
        return self.fc2(self.act(h if self.bias is None else h + self.bias))


class Contracted(Mlp):
    """Products as `product` writes them, of x and a weight, which is [in, out] where `turned`."""

    def __init__(
        self, act: Act, product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], turned: bool = False
    ) -> None:
        super().__init__(act)
        self.product = product
        if turned:
            for linear in (self.fc1, self.fc2):
                linear.weight = nn.Parameter(linear.weight.detach().mT.contiguous())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.act(self.product(self.norm(x), self.fc1.weight) + self.fc1.bias)
        return self.product(h, self.fc2.weight) + self.fc2.bias


class Picked(Mlp):
    """A third of all rows, those with the largest first value."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, 1)
        return super().forward(rows[rows[:, 0].topk(len(rows) // 3).indices])


class Addmm(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.act(torch.addmm(self.fc1.bias, self.norm(x).flatten(0, 1), self.fc1.weight.t()))
        return torch.mm(hidden, self.fc2.weight.t()).view_as(x)


class Sliced(Mlp):
    """Uses a part of its weights."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.act(F.linear(self.norm(x), self.fc1.weight[:24], self.fc1.bias[:24]))
        return F.linear(hidden, self.fc2.weight[:, :24], self.fc2.bias)


class Quantised(Mlp):
    """The first weight in int8 with a scale a row, made wide again where it is used."""

    def __init__(self, act: Act) -> None:
        super().__init__(act)
        weight = self.fc1.weight.detach()
        self.scale = nn.Parameter(weight.abs().amax(1, keepdim=True) / 127)
        self.narrow = nn.Parameter((weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(F.linear(self.norm(x), self.narrow.to(x.dtype) * self.scale, self.fc1.bias)))


class Hyper(Mlp):
    """The first weight depends on the input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(F.linear(self.norm(x), self.fc1.weight * x.mean(), self.fc1.bias)))


class MixedMlp(Mlp):
    """The second linear is wider than the first."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.act(self.fc1(self.norm(x)).double())
        return F.linear(hidden, self.fc2.weight.double()).to(x.dtype)


class LowRank(Mlp):
    """An update of rank 2 beside the first linear, as adapters have it before they are merged."""

    def __init__(self, act: Act) -> None:
        super().__init__(act)
        self.down, self.up = nn.Linear(16, 2, bias=False), nn.Linear(2, 32, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        return self.fc2(self.act(self.fc1(x) + self.up(self.down(x)) * 2.0))


def weight_normed() -> nn.Module:
    model = Mlp(F.gelu)
    model.fc1 = nn.utils.parametrizations.weight_norm(model.fc1)
    return model
