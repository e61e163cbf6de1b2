"""Models that nothing was written for: what is in them is found, and the laws hold."""

import warnings

import pytest
import torch
from torch import Tensor, nn

import chipmunk_fx
from tests.harness.laws import PHASES, SCHEDULE_LENGTH, STEPS, compiled, outputs
from tests.harness.more_models import ATTENTIONS, MLPS, SIDE, Unlisted
from tests.harness.more_whole_models import WHOLE
from tests.harness.tolerance import assert_near
from tests.harness.zoo import Inputs

STYLES = ATTENTIONS | MLPS | WHOLE
EVERY_RUN = ["chunked, heads in the batch", "padding written", "checkpoints", "encoder, norm first"]
NAMES = [pytest.param(name, marks=[] if name in EVERY_RUN else pytest.mark.full) for name in STYLES]
EVERYTHING = {"attention__random_density": 0.0, "mlp__random_density": 0.0}


def built(style: Unlisted) -> nn.Module:
    torch.manual_seed(0)
    return style.make().eval()


def moving(drift: float) -> list[Inputs]:
    """The inputs of one generation's steps; without drift, those of the first step again and again."""
    draw = torch.Generator().manual_seed(1)
    x, steps = torch.randn(2, 4, SIDE, SIDE, generator=draw), []
    for step in range(STEPS):
        time = 1000.0 * (SCHEDULE_LENGTH - (step if drift else 0)) / SCHEDULE_LENGTH
        steps.append({"x": x, "t": torch.full((2,), time), "y": torch.tensor([1, 3])})
        x = x + drift * torch.randn(x.shape, generator=draw)
    return steps


def rewritten(model: nn.Module) -> list:
    return [site for site in chipmunk_fx.summary(model).sites if site.status == "rewritten"]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_in_a_model_is_found(name: str):
    style, inputs = STYLES[name], moving(0.3)[0]
    report = chipmunk_fx.explain(built(style), **inputs)
    assert (report.count("attention"), report.count("mlp")) == (style.attention, style.mlp), str(report)
    assert report.timestep == "t"
    assert any(style.reason in site.reason for site in report.sites), str(report)


@pytest.mark.parametrize("name", NAMES)
def test_density_one_is_dense(name: str):
    style, steps = STYLES[name], moving(0.3)
    model = built(style)
    ours = compiled(model, "eager", 1.0, style.whole, **EVERYTHING)
    assert_near(outputs(ours, steps), outputs(model, steps))
    assert rewritten(ours) and not chipmunk_fx.summary(ours).fallbacks
    assert all(site.phases == {0: PHASES} for site in rewritten(ours))


@pytest.mark.parametrize("name", NAMES)
def test_standing_still(name: str):
    style, steps = STYLES[name], moving(0.0)
    model = built(style)
    ours = compiled(model, "eager", 0.2, style.whole)
    assert_near(outputs(ours, steps), outputs(model, steps))
    assert min(site.density for site in rewritten(ours)) < 0.5
    chipmunk_fx.reset(ours)
    assert all(output.isfinite().all() for output in outputs(ours, moving(0.3)))


SKIPPED = [
    "parallel",
    "encoder, norm last",
    "padding written",
    "long skips",
    "added in place",
    "one block three times",
    "tokens first, padded",
]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == "parallel" else pytest.mark.full) for n in SKIPPED])
def test_a_skipped_step_is_dense_where_inputs_repeat(name: str):
    """Dropouts of the residual stream, which drop nothing, are on the way of what the blocks add."""
    model, steps = built(STYLES[name]), moving(0.0)[:3]
    off = {"attention__enabled": False, "mlp__enabled": False, "schedule__skip_steps": [1, 2]}
    ours = compiled(model, "eager", 1.0, True, **off)
    assert_near(outputs(ours, steps), outputs(model, steps))
    assert chipmunk_fx.summary(ours).phases == {0: ["dense", "skip", "skip"]}


def test_blocks_that_are_compiled_one_by_one():
    model, steps = built(STYLES["parallel"]), moving(0.3)
    dense = outputs(model, steps)
    for block in model.blocks:
        options = {
            "attention.density": 1.0,
            "mlp.density": 1.0,
            "attention.random_density": 0.0,
            "mlp.random_density": 0.0,
        }
        options |= {"attention.group_rows": 16, "mlp.group_rows": 16, "gate": "off", "lowering": "eager"}
        options |= {"attention.dense_layers": 0, "mlp.dense_layers": 0, "schedule.refresh_every": 3}
        block.compile(
            backend="chipmunk", fullgraph=True, options=options | {"schedule.steps": STEPS, "schedule.branches": 1}
        )
    assert_near(outputs(model, steps), dense)
    assert [site.phases for site in rewritten(model)] == [{0: PHASES}] * 4


@pytest.mark.full
@pytest.mark.parametrize("whole", [True, False])
def test_under_autocast_a_sparse_model_is_as_near_as_a_dense_one(whole: bool):
    model, steps = built(STYLES["parallel"]), moving(0.3)
    exact = outputs(model, steps)
    with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dense, ours = outputs(model, steps), outputs(compiled(model, "eager", 1.0, whole, **EVERYTHING), steps)
    assert furthest(ours, exact) <= 2 * furthest(dense, exact)


class InForward(nn.Module):
    """As original repositories do it: autocast within the model, none around its rotation and for the result."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            x = self.inner(x, t, y)
            with torch.autocast("cpu", enabled=False):
                return x.float()


@pytest.mark.parametrize("name", ["normed", pytest.param("chunked, heads in the batch", marks=pytest.mark.full)])
@pytest.mark.parametrize("lowering", ["eager", pytest.param("inductor", marks=pytest.mark.full)])
def test_autocast_in_a_model_is_as_near_as_a_dense_one(name: str, lowering: str):
    exact, steps = built(STYLES[name]), moving(0.3)
    model = InForward(exact)
    dense, want = outputs(model, steps), outputs(exact, steps)
    ours = compiled(model, lowering, 1.0, True, **EVERYTHING)
    assert furthest(outputs(ours, steps), want) <= 2 * furthest(dense, want)
    assert [site.phases for site in rewritten(ours) if site.kind == "attention"] == [{0: PHASES}] * STYLES[
        name
    ].attention


def furthest(got: list[Tensor], want: list[Tensor]) -> float:
    return max(((a.float() - b).norm() / b.norm()).item() for a, b in zip(got, want, strict=True))


def test_a_number_for_a_timestep_is_a_step_each():
    """The first call has the number for a constant, later ones for an input."""

    class Numbered(nn.Module):
        def __init__(self, inner: nn.Module):
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor, t: float, y: Tensor) -> Tensor:
            return self.inner(x, torch.tensor([t]), y)

    model = Numbered(built(STYLES["parallel"]))
    steps = [step | {"t": step["t"][0].item()} for step in moving(0.3)]
    ours = compiled(model, "eager", 1.0, **EVERYTHING)
    assert_near(outputs(ours, steps), outputs(model, steps))
    assert chipmunk_fx.summary(ours).phases == {0: PHASES}
