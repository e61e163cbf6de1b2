"""Timesteps that are Python numbers, numpy's, or tensors without dimensions: each call has its place as with a tensor [B]."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import chipmunk_fx
from tests.runtime.models import SPARSE, WIDTH, TinyDiT, assert_same, calls, exactly, noise, run, words

TIMES = (900, 700, 500, 300, 100, 0)
PHASES = ["refresh", "sparse", "sparse", "refresh", "sparse", "sparse"]


class Numbered(TinyDiT):
    """As models do it that are called by hand: whatever the timestep is, it becomes a tensor [B]."""

    def forward(self, latents: Tensor, timestep: Any, text: Any = None) -> Tensor:
        given = timestep if isinstance(timestep, Tensor) else torch.full((1,), timestep, dtype=torch.float32)
        return super().forward(latents, given.reshape(-1).expand(latents.shape[0]), text)


class Keywords(Numbered):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(*args, **kwargs)


def numbered(times: Sequence[float], kind: Callable[[float], Any], **rest: Any) -> list[tuple[Tensor, Any, Tensor]]:
    return [(latents, kind(time[0].item()), text) for latents, time, text in calls(times, **rest)]


KINDS = {
    "int": (int, 2),  # the first value, all others
    "float": (float, 2),
    "numpy float": (np.float32, 1),
    "numpy int": (lambda time: np.int64(int(time)), 1),
    "tensor": (torch.tensor, 1),
    "tensor of an int": (lambda time: torch.tensor(int(time)), 1),
}


@pytest.mark.parametrize("name", KINDS)
def test_steps_and_generations_are_told_from_a_number(name: str):
    kind, graphs = KINDS[name]
    model = Numbered()
    ours = exactly(model, schedule__refresh_every=3)
    counters.clear()
    for seed in range(2):
        inputs = numbered(TIMES, kind, seed=seed)
        assert_same(run(ours, inputs), run(model, inputs))
        assert chipmunk_fx.summary(ours).phases == {0: PHASES} and not chipmunk_fx.summary(ours).fallbacks
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("kind", [int, float])
def test_a_generation_that_was_left_leaves_nothing_to_the_next(kind: Callable[[float], Any]):
    """The first value is a constant of its graph, which a later generation begins with again."""
    model = Numbered()
    ours = exactly(model, schedule__refresh_every=10, schedule__steps=6, schedule__branches=1)
    run(ours, numbered(TIMES[:3], kind))
    inputs = numbered(TIMES[:2], kind, seed=1)
    assert_same(run(ours, inputs), run(model, inputs))
    assert chipmunk_fx.summary(ours).phases == {0: ["refresh", "sparse"]}


@pytest.mark.parametrize("kind", [int, float])
def test_branches_are_told_by_text(kind: Callable[[float], Any]):
    model = Numbered()
    ours = exactly(model, schedule__refresh_every=3)
    inputs = numbered(TIMES[:3], kind, texts=[words(1), words(2)])
    assert_same(run(ours, inputs), run(model, inputs))
    assert chipmunk_fx.summary(ours).phases == {0: PHASES[:3], 1: PHASES[:3]}


class Raw(TinyDiT):
    """A flow model whose time, a Python number between 0 and 1, goes to a linear without a sinusoid."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(1, WIDTH)

    def forward(self, latents: Tensor, t: float) -> Tensor:
        x = self.embed(latents).flatten(2).transpose(1, 2)
        x = x + self.time(torch.full((1, 1), t))[:, None]
        return self.out(self.blocks[0](x))


def test_a_number_may_go_to_a_linear_as_it_is():
    model = Raw()
    ours = exactly(model, schedule__refresh_every=3)
    for seed in range(2):
        inputs = [(noise(seed) * (1 - t), t) for t in (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)]
        assert_same(run(ours, inputs), run(model, inputs))
        assert chipmunk_fx.summary(ours).phases == {0: PHASES} and not chipmunk_fx.summary(ours).fallbacks


def test_a_graph_for_each_number():
    model = Numbered()
    torch._dynamo.reset()
    ours = torch.compile(model, backend="chipmunk", dynamic=False, options=SPARSE | {"schedule.refresh_every": 3})
    run(ours, numbered(TIMES, int))
    assert chipmunk_fx.summary(ours).phases == {0: PHASES}


@pytest.mark.full
@pytest.mark.parametrize(("kind", "graphs"), [(int, 2), (float, 3)])
def test_with_inductor(kind: Callable[[float], Any], graphs: int):
    """Inductor has Dynamo begin again where it cannot make a tensor of a float: then each value has a graph."""
    model = Numbered()
    ours = exactly(model, schedule__refresh_every=3, lowering="inductor")
    counters.clear()
    inputs = numbered(TIMES[:3], kind)
    assert_same(run(ours, inputs), run(model, inputs))
    assert chipmunk_fx.summary(ours).phases == {0: PHASES[:3]} and not chipmunk_fx.summary(ours).fallbacks
    assert counters["stats"]["unique_graphs"] == graphs


def test_a_number_among_keywords():
    model = Keywords()
    ours = exactly(model, schedule__refresh_every=3)
    with torch.no_grad():
        for latents, time, text in numbered(TIMES, int):
            assert_same([ours(latents, timestep=time, text=text)], [model(latents, timestep=time, text=text)])
    assert chipmunk_fx.summary(ours).phases == {0: PHASES}


def test_what_a_number_costs_is_said(caplog: pytest.LogCaptureFixture):
    torch._dynamo.reset()  # which else remembers that the number has changed
    report = chipmunk_fx.explain(Numbered(), noise(), 900, words())
    assert report.timestep == "timestep"
    assert "as a tensor it needs one graph" in str(report)
    assert "as a tensor" not in str(chipmunk_fx.explain(Numbered(), noise(), torch.tensor(900), words()))
    with caplog.at_level(logging.WARNING, "chipmunk_fx"):
        run(exactly(Numbered()), numbered(TIMES, int))
    assert sum("the timestep, timestep, is a Python number" in message for message in caplog.messages) == 1


def test_a_size_is_no_time():
    """`t` is a number of frames; the time is another input."""

    class Framed(TinyDiT):
        def forward(self, latents: Tensor, timestep: Tensor, t: int) -> Tensor:
            return super().forward(latents, timestep) * t

    assert chipmunk_fx.explain(Framed(), noise(), torch.tensor([900.0]), 4).timestep == "timestep"
    block = TinyDiT().blocks[0]
    assert chipmunk_fx.explain(block, torch.randn(1, 48, 32)).timestep is None
