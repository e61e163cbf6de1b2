"""Linears with something between that no pattern knows are named; steps of models without known attention are skipped."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import chipmunk_fx
from chipmunk_fx.graph.match import find
from chipmunk_fx.patterns import ALL
from tests.graph.capturing import traced
from tests.runtime.models import Block, TinyDiT, calls, exactly, run

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


def test_talking_heads_are_named():
    mix = torch.randn(2, 2, 1, 1)

    def talking(x: Tensor) -> Tensor:
        q = F.linear(x, torch.eye(16)).unflatten(-1, (2, 8)).transpose(1, 2)
        weights = F.conv2d(q @ q.mT, mix).softmax(-1)
        return (F.conv2d(weights, mix) @ q).transpose(1, 2).flatten(2)

    assert any("go to aten.conv2d" in (c.reason or "") for c in find(traced(talking, X), ALL))
