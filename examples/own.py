"""A diffusion transformer of your own: look at what is found, say what the graph does not show, choose a density.

    python examples/own.py
    python examples/own.py --steps 50 --error 0.05 --lowering inductor

The model below is written from scratch. It takes patches that were cut before, so that nothing in its graph tells the
grid they came from, nor where the text is. Weights are random: only the way to go about it carries over, not the figures.
"""

import argparse
import math
from collections.abc import Sequence
from typing import Any

import torch
from common import print_table
from torch import Tensor, nn
from torch.nn import functional as F

import chipmunk_fx

WIDTH, HEADS, DEPTH, PATCH = 64, 2, 4, 16  # PATCH: values of a patch
GRID, WORDS = (1, 32, 32), 16


class Block(nn.Module):
    """x [B, N, C], condition [B, C] -> [B, N, C]; adaptive layer norm (Peebles and Xie, arXiv 2212.09748)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.modulation = nn.Linear(WIDTH, 6 * WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(condition))[:, None].chunk(6, -1)
        qkv = self.qkv(self.norm(x) * (1 + scale1) + shift1)
        q, k, v = qkv.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # each [B, H, N, D]
        x = x + gate1 * self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        hidden = F.gelu(self.fc1(self.norm(x) * (1 + scale2) + shift2), approximate="tanh")
        return x + gate2 * self.fc2(hidden)


class DiT(nn.Module):
    """patches [B, N, PATCH], time [B] in [0, 1], text [B, WORDS, C] -> velocity [B, N, PATCH]; text tokens go first."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(PATCH, WIDTH), nn.Linear(WIDTH, PATCH)
        self.position = nn.Parameter(0.02 * torch.randn(1, math.prod(GRID), WIDTH))
        self.time = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.blocks: Any = nn.ModuleList(Block() for _ in range(DEPTH))

    def forward(self, patches: Tensor, time: Tensor, text: Tensor) -> Tensor:
        frequencies = torch.exp(-math.log(1e4) * torch.arange(WIDTH // 2, device=time.device) / (WIDTH // 2))
        angles = 1000 * time[:, None] * frequencies
        condition = self.time(torch.cat([angles.cos(), angles.sin()], -1))
        x = torch.cat([text, self.embed(patches) + self.position], 1)
        for block in self.blocks:
            x = block(x, condition)
        return self.out(x[:, text.shape[1] :])


@torch.no_grad()
def sample(model: Any, steps: int, seed: int = 0) -> Tensor:
    """Euler's method from noise at time 1 to time 0."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(1, math.prod(GRID), PATCH, generator=random)
    text = torch.randn(1, WORDS, WIDTH, generator=random)
    for step in range(steps):
        x = x - model(x, torch.full((1,), 1 - step / steps), text) / steps
    return x


def accelerated(model: nn.Module, options: dict[str, Any]) -> Any:
    torch._dynamo.reset()  # each density compiles the same class again, which Dynamo gives up after eight times
    return torch.compile(model, backend="chipmunk", options=options)


def relative(want: Tensor, got: Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="default: 20")
    parser.add_argument("--error", type=float, default=0.02, help="allowed, as a share of the norm; default: 0.02")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.05, 0.1, 0.2, 0.4], metavar="SHARE")
    parser.add_argument("--lowering", choices=("inductor", "eager"), default="eager", help="default: eager")
    given = parser.parse_args(arguments)
    torch.manual_seed(0)
    model = DiT().eval().requires_grad_(False)
    for block in model.blocks:
        block.qkv.weight.mul_(3)  # attention of a trained model is not as flat as that of fresh weights
        block.modulation.weight.mul_(3)

    # 1. What is found, and why the rest is not. gate="off": no site stays dense for being too small to pay.
    options: dict[str, Any] = {"lowering": given.lowering, "gate": "off", "schedule.refresh_every": 5}
    options |= {"attention.group_rows": 64, "mlp.enabled": False}
    inputs = torch.randn(1, math.prod(GRID), PATCH), torch.ones(1), torch.randn(1, WORDS, WIDTH)
    before = chipmunk_fx.explain(model, *inputs, config=options)
    print(f"{before}\n")

    # 2. The report ends with "grid: unknown: raster order". Say what the graph does not show.
    options |= {"tokens.grid": GRID, "tokens.text": ["first", WORDS]}
    after = chipmunk_fx.explain(model, *inputs, config=options)
    print(f"{after.count('attention', 'rewritten')} attention sites are sparse; grid: {after.geometry}\n")

    # 3. Quality: the same noise through the dense model, at every density, on more seeds than one.
    dense = [sample(model, given.steps, seed) for seed in (0, 1)]
    rows = []
    for density in given.densities:
        ours = accelerated(model, options | {"attention.density": density})
        errors = [relative(want, sample(ours, given.steps, seed)) for seed, want in enumerate(dense)]
        operations = chipmunk_fx.summary(ours).flops_ratio
        rows.append({"density": density, "error": max(errors), "operations": operations})
    shown = ("error", "operations")
    print_table([row | {name: f"{row[name]:.2%}" for name in shown} for row in rows])

    # 4. The sparsest one that is near enough.
    chosen = min((row["density"] for row in rows if row["error"] <= given.error), default=None)
    print(f"attention.density: {chosen}" if chosen else f"no density is within {given.error:g}: try larger ones")
    return {"before": before, "after": after, "rows": rows, "chosen": chosen, "summary": chipmunk_fx.summary(ours)}


if __name__ == "__main__":
    main()
