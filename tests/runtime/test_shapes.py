"""Other shapes, dtypes and modes in one process."""

from typing import Any

import pytest
import torch

import chipmunk_fx
from chipmunk_fx.graph.geometry import Layout
from chipmunk_fx.runtime import registry
from tests.runtime.models import (
    EXACT,
    TinyDiT,
    assert_same,
    calls,
    chipmunk,
    compiled,
    exactly,
    identical,
    run,
    words,
)

TIMES = (900, 700, 500)
PHASES = {0: ["refresh", "sparse", "sparse"]}


def test_another_resolution_and_back():
    model = TinyDiT()
    ours = exactly(model)
    for side in (16, 24, 32, 16, 20):
        steps = calls(TIMES, side=side)
        assert_same(run(ours, steps), run(model, steps))
        assert chipmunk_fx.summary(ours).phases == PHASES


def test_another_resolution_is_sparse_too():
    ours = compiled(TinyDiT())
    for side in (16, 24, 32):
        run(ours, calls(TIMES, side=side))
        assert chipmunk_fx.summary(ours).phases == PHASES
        assert len(chipmunk_fx.summary(ours).sites) == 2
        assert all(site.density < 0.5 for site in chipmunk_fx.summary(ours).sites)


def test_a_grid_that_was_given_is_for_sequences_of_its_length(caplog: pytest.LogCaptureFixture):
    """Another resolution, or a longer text, goes on with the grid that the graph shows."""
    model = TinyDiT()
    ours = exactly(model, tokens__grid=(1, 8, 8), tokens__text=("first", 8))
    for side, count in ((16, 8), (24, 8), (16, 5), (16, 8)):
        steps = calls(TIMES, [words(count=count)], side=side)
        assert_same(run(ours, steps), run(model, steps))
        assert chipmunk_fx.summary(ours).phases == PHASES
    assert "tokens.grid is for other sizes" in caplog.text


@pytest.mark.parametrize(("side", "count"), [(24, 8), (16, 5), (24, 5)])
def test_where_a_grid_that_was_given_does_not_fit_the_layout_is_that_of_the_graph(side: int, count: int):
    """The count of text tokens that was given with it would explain no length."""
    plain = compiled(TinyDiT())
    given = compiled(TinyDiT(), tokens__grid=(1, 8, 8), tokens__text=("first", 8))
    run(given, calls(TIMES[:1]))
    chipmunk_fx.reset(given)
    for ours in (plain, given):
        run(ours, calls(TIMES[:1], [words(count=count)], side=side))
    want = Layout(((1, side // 2, side // 2),), "first", count)
    assert layouts(plain) == layouts(given) == {want}


def layouts(model: Any) -> set[Layout | None]:
    """By which the rows of the generation under way are ordered."""
    (session,) = registry.sessions(model)
    return {layout for *_, layout, _ in session.tracks[None].tables}


def test_a_resolution_that_changes_within_a_generation_begins_another():
    model = TinyDiT()
    ours = exactly(model)
    for steps in (calls((900, 700)), calls((500, 300), side=24), calls((100,), side=16)):
        assert_same(run(ours, steps), run(model, steps))
    assert chipmunk_fx.summary(ours).phases == {0: ["refresh"]}


def test_another_batch_size():
    model = TinyDiT()
    ours = exactly(model)
    for batch in (1, 2, 3, 1):
        steps = calls(TIMES, batch=batch)
        assert_same(run(ours, steps), run(model, steps))
        assert chipmunk_fx.summary(ours).phases == PHASES


def test_branches_with_texts_of_other_lengths():
    model = TinyDiT()
    ours = exactly(model)
    steps = calls(TIMES, [words(1, 8), words(2, 5)])
    for _ in range(2):
        assert_same(run(ours, steps), run(model, steps))
        assert chipmunk_fx.summary(ours).phases == {0: PHASES[0], 1: PHASES[0]}


@pytest.mark.parametrize("dynamic", [True, False])
def test_dynamic_keeps_its_meaning(dynamic: bool):
    model = TinyDiT()
    torch._dynamo.reset()
    ours = chipmunk(model, dynamic=dynamic, options=EXACT)
    for count in (8, 5):
        steps = calls(TIMES, [words(count, count)])
        assert_same(run(ours, steps), run(model, steps))
        assert chipmunk_fx.summary(ours).phases == PHASES


@pytest.mark.parametrize("lowering", ["eager", pytest.param("inductor", marks=pytest.mark.full)])
def test_one_dynamic_recompile_and_then_none(lowering: str):
    model = TinyDiT()
    ours = exactly(model, lowering=lowering)
    torch._dynamo.utils.counters.clear()
    graphs = []
    shapes = [
        (16, 8, 1),
        (16, 5, 1),
        (16, 11, 1),
        (16, 6, 1),
        (24, 8, 1),
        (32, 7, 1),
        (20, 8, 1),
        (16, 8, 2),
        (24, 9, 3),
    ]
    for side, count, batch in shapes:
        steps = calls(TIMES, [words(1, count, batch)], side=side, batch=batch)
        assert_same(run(ours, steps), run(model, steps))
        assert chipmunk_fx.summary(ours).phases == PHASES
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs == [1, 2, 2, 2, 3, 3, 3, 4, 4]  # one for each that changes: text, resolution, batch


def test_caches_of_the_old_shape_are_freed():
    ours = compiled(TinyDiT(depth=2))
    alone = []
    for side in (16, 24, 32):
        fresh = compiled(TinyDiT(depth=2))
        run(fresh, calls(TIMES, [words(1), words(2)], side=side))
        alone.append(chipmunk_fx.summary(fresh).cache_bytes)
    for side, size in ((16, alone[0]), (32, alone[2]), (24, alone[1]), (16, alone[0])):
        run(ours, calls(TIMES, [words(1), words(2)], side=side))
        assert chipmunk_fx.summary(ours).cache_bytes == size
        (session,) = registry.sessions(ours)
        assert session.account().total == size


def test_bfloat16():
    model = TinyDiT()
    low = TinyDiT().bfloat16()
    steps = calls(TIMES)
    cast = [(latents.bfloat16(), time, text.bfloat16()) for latents, time, text in steps]
    exact, dense, ours = run(model, steps), run(low, cast), run(exactly(low), cast)
    assert all(result.dtype is torch.bfloat16 for result in ours)
    for a, b, c in zip(ours, dense, exact, strict=True):
        assert (a.float() - c).norm() <= 2 * (b.float() - c).norm() + 1e-6


def test_another_dtype_between_generations():
    model = TinyDiT()
    ours = exactly(model)
    run(ours, calls(TIMES))
    model.double()
    steps = [(latents.double(), time, text.double()) for latents, time, text in calls(TIMES)]
    assert_same(run(ours, steps), run(model, steps))
    assert chipmunk_fx.summary(ours).phases == PHASES


def test_under_autocast():
    model = TinyDiT()
    ours = exactly(model)
    steps = calls(TIMES)
    with torch.autocast("cpu", torch.bfloat16):
        for a, b in zip(run(ours, steps), run(model, steps), strict=True):
            assert a.dtype == b.dtype == torch.bfloat16
            torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)
    assert chipmunk_fx.summary(ours).phases == PHASES


def test_inference_mode_and_no_grad_may_be_mixed():
    model = TinyDiT()
    ours = exactly(model)
    steps = calls((900, 700, 500, 300))
    results = []
    for index, call in enumerate(steps):
        with torch.inference_mode() if index % 2 == 0 else torch.no_grad():
            results.append(ours(*call))
    assert_same([result.clone() for result in results], run(model, steps))
    assert chipmunk_fx.summary(ours).phases == {0: ["refresh", "sparse", "sparse", "sparse"]}


def test_tables_made_in_inference_mode_serve_outside_it():
    """They are remembered from generation to generation."""
    ours = compiled(TinyDiT())
    with torch.inference_mode():
        run(ours, calls((900,), side=20))
    (session,) = registry.sessions(ours)
    (tables, *others) = session.tracks[None].tables.values()
    assert not any(kept.is_inference() for made in (tables, *others) for kept in (made.order, made.always))


def test_tables_serve_the_next_generation_of_the_same_size():
    """To send them to the device again, the host would wait for it; of sizes that come no more, nothing is kept."""
    ours, kept = compiled(TinyDiT()), []
    for side in (20, 20, 12, 12, 20):
        run(ours, calls(TIMES, side=side))
        (session,) = registry.sessions(ours)
        kept.append(set(map(id, session.tracks[None].tables.values())))
        chipmunk_fx.reset(ours)
    assert kept[0] == kept[1] and kept[2] == kept[3] and not kept[1] & kept[2]
    track = session.tracks[None]
    assert len(track.tables) == len(kept[4]) and not set(track.tables) & set(track.earlier)


def test_inputs_made_in_inference_mode():
    model = TinyDiT()
    ours = exactly(model)
    with torch.inference_mode():
        steps = calls(TIMES)
        results = [ours(*call) for call in steps]
        assert_same(results, [model(*call) for call in steps])
    assert chipmunk_fx.summary(ours).phases == PHASES


def test_the_global_generator_is_not_consumed_and_results_repeat():
    model = TinyDiT()
    ours = compiled(model, attention__random_density=0.1)
    torch.manual_seed(1)
    first = run(ours, calls(TIMES))
    drawn = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), drawn)
    assert identical(run(ours, calls(TIMES)), first)
    other = compiled(TinyDiT(), attention__random_density=0.1, seed=1)
    assert not identical(run(other, calls(TIMES)), first)
