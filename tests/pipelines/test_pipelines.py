"""Four models called by diffusers' own pipelines: phases follow the schedule, and at density 1 latents stay the same."""

from collections.abc import Iterator

import pytest

import chipmunk_fx
from tests.harness.laws import LEFT_DENSE
from tests.harness.tolerance import assert_near
from tests.harness.zoo import facts
from tests.pipelines.pipelines import PIPELINES, Run
from tests.runtime.models import EXACT, SPARSE, one_thread

EVERY_THIRD = ["refresh", "sparse", "sparse", "refresh", "sparse", "sparse", "refresh", "sparse"]
LISTED = ["refresh", "refresh", "sparse", "sparse", "refresh", "sparse", "sparse", "sparse"]


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(params=list(PIPELINES))
def run(request: pytest.FixtureRequest) -> Run:
    return PIPELINES[request.param]()


def assert_scheduled(run: Run, phases: list[str]) -> None:
    """Every branch, and every rewritten site in it, went through `phases`; no call fell back to dense."""
    summary = chipmunk_fx.summary(run.model)
    expected = dict.fromkeys(range(run.branches), phases)
    assert summary.phases == expected
    assert not summary.fallbacks
    rewritten = [site for site in summary.sites if site.status == "rewritten"]
    assert all(site.phases == expected for site in rewritten)
    attention = 0 if "attention" in LEFT_DENSE.get(run.name, []) else run.attention
    assert sum(s.kind == "attention" and "refiner" not in s.name for s in rewritten) == attention
    assert sum(s.kind == "mlp" for s in rewritten) == facts(run.name)["mlp"]


def test_density_one_is_dense_in_every_generation(run: Run):
    want = [run(seed) for seed in (0, 1)]
    run.compile(EXACT | {"schedule.refresh_every": 3})
    for seed, latents in enumerate(want):
        assert_near([run(seed)], [latents])
        assert_scheduled(run, EVERY_THIRD)
    assert not want[0].equal(want[1])


def test_listed_refreshes(run: Run):
    run.compile(SPARSE | {"attention.density": 0.2, "schedule.refresh_steps": [0, 1, 4]})
    assert run().isfinite().all()
    assert_scheduled(run, LISTED)
    assert chipmunk_fx.summary(run.model).flops_ratio < 1
