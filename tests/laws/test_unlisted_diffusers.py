"""Classes of diffusers that are not in the zoo: what is in them is found, and density 1 is dense."""

from functools import partial

import pytest
import torch
from torch import nn

import chipmunk_fx
from tests.harness.diffusers_models import transformer
from tests.harness.laws import PHASES, SCHEDULE_LENGTH, STEPS, compiled, outputs
from tests.harness.more_diffusers import LISTED, Inputs
from tests.harness.tolerance import assert_near

pytestmark = pytest.mark.full
EVERYTHING = {"attention__random_density": 0.0, "mlp__random_density": 0.0}


def built(name: str) -> tuple[nn.Module, Inputs]:
    torch.manual_seed(0)
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    return transformer(name, **LISTED[name].config).eval(), LISTED[name].inputs(draw)


def moving(name: str, inputs: Inputs, drift: float) -> list[Inputs]:
    draw, steps, latents = torch.Generator().manual_seed(1), [], inputs["hidden_states"]
    for step in range(STEPS):
        time = LISTED[name].horizon * (SCHEDULE_LENGTH - (step if drift else 0)) / SCHEDULE_LENGTH
        steps.append(inputs | {"hidden_states": latents, "timestep": torch.full_like(inputs["timestep"], time)})
        latents = latents + drift * torch.randn(latents.shape, generator=draw)
    return steps


@pytest.mark.parametrize("name", LISTED)
def test_what_is_in_a_class_is_found(name: str):
    torch._dynamo.reset()
    model, inputs = built(name)
    report, known = chipmunk_fx.explain(model, **inputs), LISTED[name]
    assert (report.count("attention"), report.count("mlp")) == (known.attention, known.mlp), str(report)
    assert report.timestep == "timestep"


@pytest.mark.parametrize("name", LISTED)
def test_density_one_is_dense(name: str):
    model, inputs = built(name)
    steps = moving(name, inputs, 0.3)
    ours = compiled(model, "eager", 1.0, **EVERYTHING)
    assert_near(outputs(ours, steps), outputs(model, steps))
    rewritten = [site for site in chipmunk_fx.summary(ours).sites if site.status == "rewritten"]
    assert len(rewritten) == LISTED[name].attention + LISTED[name].mlp
    assert all(site.phases == {0: PHASES} for site in rewritten)


@pytest.mark.parametrize("name", LISTED)
def test_standing_still(name: str):
    model, inputs = built(name)
    steps = moving(name, inputs, 0.0)
    ours = compiled(model, "eager", 0.2)
    assert_near(outputs(ours, steps), outputs(model, steps))
    shares = [site.density for site in chipmunk_fx.summary(ours).sites if "sparse" in site.phases[0]]
    assert min(shares) < 0.5
