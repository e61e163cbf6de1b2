"""Several graphs that serve one branch in turn: each trusts what a graph with its sites has left."""

from typing import Any

import pytest
import torch
from torch import Tensor

import chipmunk_fx
from tests.runtime.models import Block, TinyDiT, assert_same, calls, compiled, exactly, identical

TIMES = (900.0, 700.0, 500.0, 300.0)


class Passing(Block):
    """Passes its input on where it is told to: another graph."""

    passes = False

    def forward(self, x: Tensor) -> Tensor:
        return x if self.passes else super().forward(x)


class Leaving(TinyDiT):
    """Leaves its second block out when asked to, as guidance by a worse model does."""

    def __init__(self) -> None:
        super().__init__(depth=3)
        self.blocks[1].__class__ = Passing

    def forward(self, latents: Tensor, timestep: Tensor, text: Any = None, leave: bool = False) -> Tensor:
        self.blocks[1].passes = leave
        return super().forward(latents, timestep, text)


@torch.no_grad()
def run(model: Any, seed: int, leaves: str) -> list[Tensor]:
    return [model(*call, leave=leave == "-") for call, leave in zip(calls(TIMES, seed=seed), leaves, strict=True)]


@pytest.mark.parametrize("leaves", ["-+++", "-+-+", "++-+", "+--+"])
def test_caches_of_the_generation_before_are_never_used(leaves: str):
    fresh = compiled(Leaving())
    want = run(fresh, 9, leaves)
    phases = chipmunk_fx.summary(fresh).phases
    ours = compiled(Leaving())
    run(ours, 1, "++++")
    run(ours, 2, "----")
    assert identical(run(ours, 9, leaves), want)
    assert chipmunk_fx.summary(ours).phases == phases
    assert_same(run(exactly(Leaving()), 9, leaves), run(Leaving(), 9, leaves))


def test_what_other_blocks_have_added_is_not_added_again():
    ours = exactly(Leaving(), schedule__skip_steps=[2, 3])
    got, dense = run(ours, 9, "++-+"), run(Leaving(), 9, "++-+")
    assert chipmunk_fx.summary(ours).phases == {0: ["refresh", "sparse", "refresh", "refresh"]}
    assert_same(got, dense)
    run(ours, 9, "++++")
    assert chipmunk_fx.summary(ours).phases == {0: ["refresh", "sparse", "skip", "skip"]}
