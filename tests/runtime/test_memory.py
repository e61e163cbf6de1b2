"""The memory budget: what stays dense when caches do not fit, and that what is reported is what is held."""

import logging
import sys
from typing import Any

import pytest
import torch

import chipmunk_fx
from chipmunk_fx.config import Config
from chipmunk_fx.runtime import registry
from chipmunk_fx.runtime.footprint import cache_bytes
from chipmunk_fx.runtime.placement import limit
from chipmunk_fx.state.store import Place
from tests.runtime.models import TinyDiT, assert_same, calls, compiled, exactly, run, words

TIMES = (900, 700, 500)
PHASES = {0: ["refresh", "sparse", "sparse"]}


def held(model) -> dict[str, int]:
    """Bytes that the caches of each kind of site take in one branch."""
    run(model, calls(TIMES[:1]))
    sites = chipmunk_fx.summary(model).sites
    return {kind: sum(s.cache_bytes for s in sites if s.kind == kind) for kind in ("attention", "mlp")}


@pytest.fixture(scope="module")
def sizes() -> dict[str, int]:
    return held(exactly(TinyDiT(depth=2)))


def test_what_is_reported_is_what_is_held():
    model = compiled(TinyDiT(depth=2))
    run(model, calls(TIMES, [words(1), words(2)]))
    (session,) = registry.sessions(model)
    tensors = [
        tensor
        for caches in (session.store.shared, *(branch.caches for branch in session.tracks[None].branches.values()))
        for sites in caches.values()
        for cell in sites.values()
        for tensor in cell.tensors.values()
    ]
    summary = chipmunk_fx.summary(model)
    assert summary.cache_bytes == sum(t.untyped_storage().nbytes() for t in tensors) > 0
    assert summary.cache_bytes == sum(site.cache_bytes for site in summary.sites)


@pytest.mark.parametrize("extra", [{}, {"local_window": 0.3}, {"local_voxels": 3}, {"text_rows": "dense"}])
def test_what_is_foreseen_is_what_is_held(extra: dict[str, Any]):
    """Text, windows and cubes make lists longer, dense text rows make them fewer."""
    model = compiled(TinyDiT(), **{f"attention__{key}": value for key, value in extra.items()})
    run(model, calls(TIMES[:1]))
    (session,) = registry.sessions(model)
    plan = session.tracks[None].records[0].graph().plan
    foreseen = [cache_bytes(site, plan, session.config) for site in plan.rewritten]
    assert foreseen == [site.cache_bytes for site in chipmunk_fx.summary(model).sites]


def test_mlp_sites_give_way_first_the_last_ones_before_the_others(sizes: dict[str, int]):
    model = TinyDiT(depth=2)
    ours = exactly(model, memory__budget_gb=(sizes["attention"] + 0.6 * sizes["mlp"]) / 1e9)
    assert_same(run(ours, calls(TIMES)), run(model, calls(TIMES)))
    summary = chipmunk_fx.summary(ours)
    assert [(s.kind, s.status) for s in summary.sites] == [
        ("attention", "rewritten"),
        ("mlp", "rewritten"),
        ("attention", "rewritten"),
        ("mlp", "dense"),
    ]
    assert "memory.budget_gb" in summary.sites[3].reason and summary.sites[3].phases == {0: ["dense"] * 3}
    assert summary.cache_bytes <= sizes["attention"] + 0.6 * sizes["mlp"]


def test_then_attention_sites(sizes: dict[str, int]):
    model = TinyDiT(depth=2)
    ours = exactly(model, memory__budget_gb=0.6 * sizes["attention"] / 1e9)
    assert_same(run(ours, calls(TIMES)), run(model, calls(TIMES)))
    statuses = [(s.kind, s.status) for s in chipmunk_fx.summary(ours).sites if s.status == "rewritten"]
    assert statuses == [("attention", "rewritten")]


def test_then_everything_with_one_warning(caplog: pytest.LogCaptureFixture):
    model = TinyDiT()
    ours = exactly(model, memory__budget_gb=1e-9)
    with caplog.at_level(logging.WARNING, logger="chipmunk_fx"):
        assert_same(run(ours, calls(TIMES)), run(model, calls(TIMES)))
    (warning,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert "memory.budget_gb" in warning.message and "nothing is rewritten" in warning.message


def test_sites_give_way_to_a_branch_that_does_not_fit(sizes: dict[str, int], caplog: pytest.LogCaptureFixture):
    """Two branches cannot be foreseen without schedule.branches."""
    model = TinyDiT(depth=2)
    budget = 1.5 * sum(sizes.values()) / 1e9
    steps = calls(TIMES, [words(1), words(2)])
    ours = exactly(model, memory__budget_gb=budget)
    with caplog.at_level(logging.WARNING, logger="chipmunk_fx"):
        assert_same(run(ours, steps), run(model, steps))
    summary = chipmunk_fx.summary(ours)
    assert summary.phases == {0: PHASES[0], 1: PHASES[0]}
    assert [(s.kind, s.status) for s in summary.sites if s.status == "dense"] == [("mlp", "dense")]
    assert "memory budget" in summary.sites[3].reason
    assert [(f.step, f.branch, "memory.budget_gb" in f.reason) for f in summary.fallbacks] == [(0, 1, True)]
    assert 0.6 * budget * 1e9 < summary.cache_bytes <= budget * 1e9
    assert sum("memory.budget_gb" in r.message for r in caplog.records) == 1
    told = exactly(model, memory__budget_gb=budget, schedule__branches=2)
    assert_same(run(told, steps), run(model, steps))
    assert chipmunk_fx.summary(told).phases == {0: PHASES[0], 1: PHASES[0]}
    assert chipmunk_fx.summary(told).cache_bytes <= budget * 1e9


def test_generations_that_take_each_others_caches_say_so(sizes: dict[str, int]):
    ours = compiled(TinyDiT(depth=2), memory__budget_gb=1.5 * sum(sizes.values()) / 1e9)
    pictures = {key: calls(TIMES, seed=seed) for seed, key in enumerate("ab")}
    for turn in range(len(TIMES)):
        for key, steps in pictures.items():
            with chipmunk_fx.generation(ours, key=key):
                run(ours, steps[turn : turn + 1])
    for key in pictures:
        summary = chipmunk_fx.summary(ours, key=key)
        assert set(summary.phases[0]) == {"refresh"}
        assert [(f.step, "another generation" in f.reason) for f in summary.fallbacks] == [(1, True), (2, True)]


def test_a_generation_that_finds_room_again_is_sparse_again(sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch):
    ours, steps = compiled(TinyDiT(depth=2)), calls(TIMES, [words(1), words(2)])
    run(ours, steps[:1])
    (session,) = registry.sessions(ours)
    with monkeypatch.context() as short:
        short.setattr(session, "limit", lambda place: int(1.3 * sum(sizes.values())))
        chipmunk_fx.reset(ours)
        run(ours, steps)
    assert "dense" in {site.status for site in chipmunk_fx.summary(ours).sites}
    chipmunk_fx.reset(ours)
    run(ours, steps)
    assert {site.status for site in chipmunk_fx.summary(ours).sites} == {"rewritten"}


def test_a_budget_may_be_larger_than_any_memory():
    assert limit(Config.from_options({"memory.budget_gb": 1e300}), Place(torch.device("cpu"))) == sys.maxsize


def test_strict_raises_over_the_budget(sizes: dict[str, int]):
    ours = exactly(TinyDiT(depth=2), memory__budget_gb=1.5 * sum(sizes.values()) / 1e9, strict=True)
    with pytest.raises(chipmunk_fx.FallbackError, match="memory.budget_gb"):
        run(ours, calls(TIMES, [words(1), words(2)]))


def test_a_second_resolution_over_the_budget_is_dense_and_right(sizes: dict[str, int]):
    model = TinyDiT(depth=2)
    ours = exactly(model, memory__budget_gb=1.2 * sum(sizes.values()) / 1e9)
    for side in (16, 32, 16, 24):
        steps = calls(TIMES, side=side)
        assert_same(run(ours, steps), run(model, steps))
        assert chipmunk_fx.summary(ours).cache_bytes <= 1.2 * sum(sizes.values())


def test_sites_that_gave_way_to_a_larger_picture_come_back(sizes: dict[str, int]):
    model = TinyDiT(depth=2)
    ours = exactly(model, memory__budget_gb=1.2 * sum(sizes.values()) / 1e9)
    for side, dense in ((16, 0), (12, 0), (24, 1), (16, 0)):  # the second size makes the graph dynamic
        steps = calls(TIMES, side=side)
        assert_same(run(ours, steps), run(model, steps))
        summary = chipmunk_fx.summary(ours)
        assert summary.phases == PHASES and summary.cache_bytes <= 1.2 * sum(sizes.values())
        assert [site.status for site in summary.sites if site.kind == "mlp"].count("dense") == dense
        assert {site.status for site in summary.sites if site.kind == "attention"} == {"rewritten"}


def test_a_budget_counts_all_blocks_of_a_model(sizes: dict[str, int]):
    """Blocks that are compiled one by one share the budget of their model's settings."""
    model = TinyDiT(depth=4)
    torch._dynamo.reset()
    budget = 1.3 * sum(sizes.values()) / 2  # of one block
    options = {
        "lowering": "eager",
        "gate": "off",
        "attention.group_rows": 16,
        "mlp.group_rows": 16,
        "attention.dense_layers": 0,
        "mlp.dense_layers": 0,
        "schedule.steps": 3,
        "schedule.branches": 1,
        "memory.budget_gb": budget / 1e9,
    }
    for block in model.blocks:
        block.compile(backend="chipmunk", options=options)
    run(model, calls(TIMES))
    assert chipmunk_fx.summary(model).cache_bytes <= budget
