"""Linears with something between that no pattern knows are named; steps of models without known attention are skipped."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import chipmunk_fx
from chipmunk_fx.graph.match import block_of, find
from chipmunk_fx.graph.region import Region, find_region
from chipmunk_fx.patterns import ALL
from tests.graph.capturing import captured, traced
from tests.runtime.models import WIDTH, Block, TinyDiT, calls, exactly, run

WIDEN, NARROW, DEPTHWISE = torch.randn(64, 16), torch.randn(16, 64), torch.randn(64, 1, 3)
X = torch.randn(2, 24, 16)


def refused(between: Callable[[Tensor], Tensor], narrow: Tensor = NARROW) -> list[str | None]:
    graph = traced(lambda x: F.linear(between(F.linear(x, WIDEN)), narrow), X)
    return [candidate.reason for candidate in find(graph, ALL)]


@pytest.mark.parametrize(
    ("between", "named"),
    [
        (lambda h: F.layer_norm(F.gelu(h), (64,)), "gelu, layer_norm"),
        (lambda h: F.gelu(F.conv1d(h.mT, DEPTHWISE, padding=1, groups=64).mT), "conv1d, gelu"),
        (lambda h: h.softmax(-1), "softmax"),
    ],
)
def test_what_is_between_two_linears_is_named(between: Callable[[Tensor], Tensor], named: str):
    (reason,) = refused(between)
    assert reason and f"stand {named};" in reason


def test_linears_in_a_row_and_known_mlps_are_not_named():
    assert refused(lambda h: h) == []
    assert refused(F.gelu) == [None]
    assert not any(
        "stand" in (reason or "") for reason in refused(lambda h: F.layer_norm(h, (64,)), torch.randn(8, 64))
    )


class LinearBlock(Block):
    """Linear attention."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        x = x + self.proj(q.relu() @ (k.relu().mT @ v) / x.shape[1])
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


def linear_dit() -> TinyDiT:
    model = TinyDiT()
    torch.manual_seed(0)
    model.blocks = nn.ModuleList(LinearBlock() for _ in range(2)).eval()
    return model


def test_blocks_without_known_attention_are_told_by_their_mlps():
    still = [calls([900])[0]] * 3
    ours = exactly(linear_dit(), schedule__skip_steps=[1, 2])
    for got, want in zip(run(ours, still), run(linear_dit(), still), strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert chipmunk_fx.summary(ours).phases == {0: ["refresh", "skip", "skip"]}
    assert chipmunk_fx.explain(linear_dit(), *calls([900])[0]).geometry == "convolution conv2d"


class Headed(TinyDiT):
    """Blocks of linear attention between a stem and a head that hold an MLP, too."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(LinearBlock() for _ in range(2))
        self.stem, self.head = (nn.Sequential(nn.LayerNorm(WIDTH), nn.Sequential(*self.mlp())) for _ in range(2))
        self.eval()

    def mlp(self) -> tuple[nn.Module, ...]:
        return nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = self.stem(self.embed(latents).flatten(2).transpose(1, 2)) + timestep[:, None, None] / 1000
        for block in self.blocks:
            x = block(x)
        return self.out(self.head(x)).transpose(1, 2).reshape_as(latents)


def test_a_stem_and_a_head_with_mlps_are_no_blocks():
    latents, timestep, _ = calls([900])[0]
    seen = captured(Headed(), latents, timestep)
    inputs = [n for n in seen.capture.module.graph.nodes if n.op == "placeholder"]
    assert seen.roles.latents is not None
    found = find_region(seen.capture, seen.candidates, inputs[seen.roles.latents])
    assert isinstance(found, Region)
    assert {block_of(node) for node in found.nodes if block_of(node)} == {"blocks.0", "blocks.1"}


def test_talking_heads_are_named():
    mix = torch.randn(2, 2, 1, 1)

    def talking(x: Tensor) -> Tensor:
        q = F.linear(x, torch.eye(16)).unflatten(-1, (2, 8)).transpose(1, 2)
        weights = F.conv2d(q @ q.mT, mix).softmax(-1)
        return (F.conv2d(weights, mix) @ q).transpose(1, 2).flatten(2)

    assert any("go to aten.conv2d" in (c.reason or "") for c in find(traced(talking, X), ALL))
