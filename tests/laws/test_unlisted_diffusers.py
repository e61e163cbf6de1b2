"""Classes of diffusers that are not in the zoo: what is in them is found, density 1 is dense, and steps are skipped."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import chipmunk_fx
from tests.harness.diffusers_models import transformer
from tests.harness.laws import PHASES, SCHEDULE_LENGTH, STEPS, compiled, outputs
from tests.harness.more_diffusers import LISTED, Inputs
from tests.harness.newer_diffusers import NEWER
from tests.harness.newest_diffusers import NEWEST
from tests.harness.tolerance import assert_near

ALL = LISTED | NEWER | NEWEST
SHORT = ("Cosmos3OmniTransformer",)
EVERYTHING = {"attention__random_density": 0.0, "mlp__random_density": 0.0}


def some(names: Iterable[str]) -> list[Any]:
    return [name if name in SHORT else pytest.param(name, marks=pytest.mark.full) for name in names]


def built(name: str) -> tuple[nn.Module, Inputs]:
    torch.manual_seed(0)
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    return transformer(name, **ALL[name].config).eval(), ALL[name].inputs(draw)


def moving(name: str, inputs: Inputs, drift: float) -> list[Inputs]:
    latents, timestep = ALL[name].names
    listed = isinstance(inputs[latents], list)  # of one picture each
    value = inputs[latents][0] if listed else inputs[latents]
    draw, steps = torch.Generator().manual_seed(1), []
    for step in range(STEPS):
        time = ALL[name].horizon * (SCHEDULE_LENGTH - (step if drift else 0)) / SCHEDULE_LENGTH
        moved = {latents: [value] if listed else value, timestep: torch.full_like(inputs[timestep], time)}
        steps.append(inputs | moved)
        value = value + drift * torch.randn(value.shape, generator=draw)
    return steps


@pytest.mark.parametrize("name", some(ALL))
def test_what_is_in_a_class_is_found(name: str):
    torch._dynamo.reset()
    model, inputs = built(name)
    report, known = chipmunk_fx.explain(model, **inputs), ALL[name]
    assert (report.count("attention"), report.count("mlp")) == (known.attention, known.mlp), str(report)
    assert report.timestep == known.names[1]


@pytest.mark.parametrize("name", some(ALL))
def test_density_one_is_dense(name: str):
    (model, inputs), known = built(name), ALL[name]
    steps = moving(name, inputs, 0.3)
    ours = compiled(model, "eager", 1.0, **EVERYTHING)
    assert_near(outputs(ours, steps), outputs(model, steps))
    rewritten = [site for site in chipmunk_fx.summary(ours).sites if site.status == "rewritten"]
    assert len(rewritten) == known.attention + known.mlp - known.dense
    assert all(site.phases == {0: PHASES} for site in rewritten)


@pytest.mark.parametrize("name", some(ALL))
def test_standing_still(name: str):
    model, inputs = built(name)
    steps = moving(name, inputs, 0.0)
    ours = compiled(model, "eager", 0.2)
    assert_near(outputs(ours, steps), outputs(model, steps))
    shares = [site.density for site in chipmunk_fx.summary(ours).sites if "sparse" in site.phases[0]]
    assert min(shares) < 0.5


@pytest.mark.parametrize("name", some([*NEWEST, "LTX2VideoTransformer3DModel"]))
def test_steps_that_stand_still_are_skipped(name: str):
    model, inputs = built(name)
    steps = moving(name, inputs, 0.0)
    ours = compiled(model, "eager", 1.0, **EVERYTHING, schedule__skip_steps=[1, 2])
    assert_near(outputs(ours, steps), outputs(model, steps))
    assert chipmunk_fx.summary(ours).phases == {0: ["refresh", "skip", "skip", "refresh", "sparse"]}
