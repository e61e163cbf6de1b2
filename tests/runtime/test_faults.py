"""What goes wrong while caches are made and used: the result stays right, and what is dense says why."""

import logging
from typing import Any

import pytest
import torch

import chipmunk_fx
from chipmunk_fx.runtime import registry
from chipmunk_fx.runtime.session import Session
from chipmunk_fx.schedule.phase import Phase
from chipmunk_fx.state.slots import Slot
from chipmunk_fx.state.store import Place, allocate
from tests.runtime.models import TinyDiT, assert_same, calls, compiled, exactly, run, words

TIMES = (900, 700, 500, 300)
STEPS = ["refresh", "sparse", "sparse", "sparse"]


class Refusing:
    """An allocator that has no memory for slots of one name, from one call of it on."""

    def __init__(self, name: str, after: int = 0, error: type[Exception] = torch.OutOfMemoryError) -> None:
        self.name, self.left, self.error = name, after, error

    def __call__(self, slot: Slot, place: Place) -> torch.Tensor:
        if slot.name == self.name:
            self.left -= 1
            if self.left < 0:
                raise self.error("no memory left\nin detail")
        return allocate(slot, place)


def session_of(model: Any) -> Session:
    (session,) = registry.sessions(model)
    return session


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelno == logging.WARNING]


def begun(model: TinyDiT, **options: Any) -> Any:
    """`model` compiled, with a session that holds the caches of one text."""
    ours = exactly(model, **options)
    run(ours, calls(TIMES[:1]))
    return ours


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError, MemoryError])
def test_a_site_without_memory_stays_dense_and_the_generation_ends_right(
    error: type[Exception], caplog: pytest.LogCaptureFixture
):
    model = TinyDiT(depth=2)
    ours = begun(model)
    session_of(ours).store.allocate = Refusing("hidden", after=1, error=error)
    steps = calls(TIMES, side=24)
    with caplog.at_level(logging.WARNING, logger="chipmunk_fx"):
        assert_same(run(ours, steps), run(model, steps))
    summary = chipmunk_fx.summary(ours)
    assert [s.status for s in summary.sites] == ["rewritten", "rewritten", "rewritten", "dense"]
    assert summary.phases == {0: STEPS} and summary.sites[3].phases == {0: ["dense"] * 4}
    assert "no memory left" in summary.sites[3].reason and summary.sites[3].cache_bytes == 0
    assert ["no memory left" in f.reason for f in summary.fallbacks] == [True]
    (warning,) = warnings_of(caplog)
    assert "no memory left" in warning and "in detail" not in warning
    assert summary.cache_bytes == sum(s.cache_bytes for s in summary.sites)


def test_memory_that_runs_out_for_the_second_branch():
    model = TinyDiT(depth=2)
    ours = begun(model)
    chipmunk_fx.reset(ours)
    session_of(ours).store.allocate = Refusing("rest")
    steps = calls(TIMES, [words(batch=1), words(2)])
    assert_same(run(ours, steps), run(model, steps))
    summary = chipmunk_fx.summary(ours)
    assert [s.status for s in summary.sites] == ["dense", "rewritten", "dense", "rewritten"]
    assert summary.phases == {0: STEPS, 1: STEPS} and len(summary.fallbacks) == 2


def test_without_any_memory_all_is_dense():
    model = TinyDiT()
    ours = begun(model)
    store = session_of(ours).store
    store.allocate = lambda slot, place: torch.empty(1 << 60)
    steps = calls(TIMES, side=24)
    for _ in range(2):
        assert_same(run(ours, steps), run(model, steps))
    summary = chipmunk_fx.summary(ours)
    assert summary.phases == {0: ["dense"] * 4} and {s.status for s in summary.sites} == {"dense"}


def test_memory_of_idle_generations_is_given_first():
    model = TinyDiT()
    ours = exactly(model)
    for key in "ab":
        with chipmunk_fx.generation(ours, key=key):
            run(ours, calls(TIMES[:1]))
    session = session_of(ours)

    def scarce(slot: Slot, place: Place) -> torch.Tensor:
        if sum(bool(track.branches) for track in session.tracks.values()) > 2:
            raise torch.OutOfMemoryError("full")
        return allocate(slot, place)

    session.store.allocate = scarce
    with chipmunk_fx.generation(ours, key="c"):
        assert_same(run(ours, calls(TIMES)), run(model, calls(TIMES)))
    assert chipmunk_fx.summary(ours, key="c").phases == {0: STEPS}
    assert not chipmunk_fx.summary(ours, key="c").fallbacks
    assert not session.tracks["a"].branches and session.tracks["b"].branches


def test_memory_of_other_settings_is_given_before_a_site_stays_dense():
    """Settings tried one after the other on the same weights; the first go on with caches made anew."""
    model, steps = TinyDiT(depth=2), calls(TIMES)
    first = begun(model)
    run(first, steps[1:2])
    second = begun(model, schedule__steps=4)
    old, new = registry.sessions(model)

    def scarce(slot: Slot, place: Place) -> torch.Tensor:
        if old.account().total:
            raise torch.OutOfMemoryError("full")
        return allocate(slot, place)

    new.store.allocate = scarce
    larger = calls(TIMES, side=24)
    assert_same(run(second, larger), run(model, larger))
    assert new.account().total and not old.account().total
    assert [len(t.fallbacks) for t in new.tracks.values()] == [0]
    assert_same(run(first, steps[2:]), run(model, steps[2:]))
    assert [str(record.phase) for record in old.tracks[None].records] == ["refresh", "sparse", "refresh", "sparse"]


def test_strict_raises_for_want_of_memory():
    ours = begun(TinyDiT(), strict=True)
    session_of(ours).store.allocate = Refusing("rest")
    with pytest.raises(chipmunk_fx.FallbackError, match="out of memory for the caches of blocks.0"):
        run(ours, calls(TIMES, side=24))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_caches_that_hold_no_numbers_are_made_anew(bad: float, lowering: str, caplog: pytest.LogCaptureFixture):
    """A latent that breaks one step breaks its result, as it would without us, and nothing after it."""
    model = TinyDiT()
    ours = exactly(model, lowering=lowering)
    steps = calls(TIMES)
    broken = steps[0][0].clone()
    broken[0, 0, 3, 5] = bad
    with caplog.at_level(logging.WARNING, logger="chipmunk_fx"):
        run(ours, [(broken, *steps[0][1:])])
        assert_same(run(ours, steps[1:]), run(model, steps[1:]))
    summary = chipmunk_fx.summary(ours)
    assert summary.phases == {0: ["refresh", "refresh", "sparse", "sparse"]}
    (fallback,) = summary.fallbacks
    assert (fallback.step, fallback.phase) == (1, Phase.REFRESH) and "nan or inf" in fallback.reason
    assert "1 call refresh: nan or inf" in str(summary)
    assert len(warnings_of(caplog)) == 1


def test_a_neuron_that_overflows_on_a_sparse_step_is_noticed():
    model = TinyDiT()
    ours = exactly(model)
    steps = calls(TIMES)
    run(ours, steps[:1])
    run(ours, [(steps[1][0] * float("nan"), *steps[1][1:])])
    assert_same(run(ours, steps[2:]), run(model, steps[2:]))
    assert chipmunk_fx.summary(ours).phases == {0: ["refresh", "sparse", "refresh", "sparse"]}


def test_strict_raises_for_broken_caches():
    ours = exactly(TinyDiT(), strict=True)
    steps = calls(TIMES)
    run(ours, [(steps[0][0] * float("inf"), *steps[0][1:])])
    with pytest.raises(chipmunk_fx.FallbackError, match="nan or inf"):
        run(ours, steps[1:])
    assert_same(run(ours, steps[2:]), run(TinyDiT(), steps[2:]))  # for those who go on: nothing is left of it


def failing(graph: Any, phase: Phase, error: Exception, compiling: bool) -> None:
    """Makes one variant of a graph fail, while it is built or when it is called."""
    variants = graph.variants
    build = variants._build

    def raising(*_: Any) -> Any:
        raise error

    def built(wanted: Phase | None, state: Any, renew: bool) -> Any:
        if wanted is not phase:
            return build(wanted, state, renew)
        return raising() if compiling else raising

    variants._build = built
    variants._made.pop((phase, True), None)


@pytest.mark.parametrize("compiling", [True, False])
@pytest.mark.parametrize("error", [RuntimeError("no kernel image"), torch.OutOfMemoryError("full")], ids=type)
def test_a_variant_that_fails_is_replaced_by_the_dense_one(
    error: Exception, compiling: bool, caplog: pytest.LogCaptureFixture
):
    model = TinyDiT()
    ours = begun(model)
    graph = session_of(ours).tracks[None].records[0].graph()
    failing(graph, Phase.SPARSE, error, compiling)
    steps = calls(TIMES, seed=3)
    with caplog.at_level(logging.WARNING, logger="chipmunk_fx"):
        assert_same(run(ours, steps), run(model, steps))
    summary = chipmunk_fx.summary(ours)
    assert summary.phases == {0: ["refresh", "dense", "dense", "dense"]}
    assert {str(error) in f.reason for f in summary.fallbacks} == {True} and len(summary.fallbacks) == 3
    assert len(warnings_of(caplog)) == 1
    assert (summary.cache_bytes == 0) == isinstance(error, torch.OutOfMemoryError)


def test_strict_raises_where_a_variant_fails():
    ours = begun(TinyDiT(), strict=True)
    failing(session_of(ours).tracks[None].records[0].graph(), Phase.SPARSE, RuntimeError("no kernel image"), False)
    with pytest.raises(chipmunk_fx.FallbackError, match="no kernel image"):
        run(ours, calls(TIMES, seed=3))


def test_what_fails_dense_too_is_the_models_own_failure():
    model = TinyDiT()
    ours = begun(model)
    graph = session_of(ours).tracks[None].records[0].graph()
    failing(graph, Phase.SPARSE, RuntimeError("both"), False)
    failing(graph, None, RuntimeError("the model's own"), False)  # pyright: ignore[reportArgumentType]
    chipmunk_fx.reset(ours)
    steps = calls(TIMES, seed=3)
    run(ours, steps[:1])
    with pytest.raises(RuntimeError, match="the model's own"):
        run(ours, steps[1:2])
    del graph.variants._build
    graph.variants._made.clear()
    assert_same(run(ours, steps[2:]), run(model, steps[2:]))
    assert chipmunk_fx.summary(ours).phases == {0: ["refresh", "refresh", "sparse"]}
    assert not chipmunk_fx.summary(ours).fallbacks


def test_the_next_step_after_an_interrupted_one_is_a_refresh():
    model = TinyDiT()
    ours = begun(model)
    graph = session_of(ours).tracks[None].records[0].graph()
    steps = calls(TIMES, seed=3)
    run(ours, steps[:1])
    failing(graph, Phase.SPARSE, KeyboardInterrupt(), False)  # pyright: ignore[reportArgumentType]
    with pytest.raises(KeyboardInterrupt):
        run(ours, steps[1:2])
    del graph.variants._build
    graph.variants._made.clear()
    assert_same(run(ours, steps[2:]), run(model, steps[2:]))
    assert chipmunk_fx.summary(ours).phases == {0: ["refresh", "refresh", "sparse"]}


def test_a_graph_that_writes_its_inputs_is_not_run_twice():
    class Writing(TinyDiT):
        def forward(self, latents, timestep, text=None):
            out = super().forward(latents, timestep, text)
            latents.add_(1)
            return out

    ours = compiled(Writing())
    steps = calls(TIMES)
    run(ours, [tuple(t.clone() for t in steps[0])])
    graph = session_of(ours).tracks[None].records[0].graph()
    assert graph.writes_inputs
    failing(graph, Phase.SPARSE, RuntimeError("no kernel image"), False)
    with pytest.raises(RuntimeError, match="no kernel image"):
        run(ours, [tuple(t.clone() for t in steps[1])])
    other = begun(TinyDiT())
    assert not session_of(other).tracks[None].records[0].graph().writes_inputs


def test_dynamic_graphs_go_dense_as_a_whole():
    """Guards that a graph built late would add are not enforced."""
    model = TinyDiT(depth=2)
    ours = exactly(model, lowering="inductor")
    for count in (8, 5):
        run(ours, calls(TIMES[1:2], [words(count, count)]))
        chipmunk_fx.reset(ours)
    session_of(ours).store.allocate = Refusing("rest")
    steps = calls(TIMES, [words(1, 11)])
    assert_same(run(ours, steps), run(model, steps))
    assert chipmunk_fx.summary(ours).phases == {0: ["dense"] * 4}
