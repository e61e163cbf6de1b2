"""Blocks compiled one by one, and models whose graph breaks."""

import logging
from typing import Any

import pytest
import torch

import chipmunk_fx
from chipmunk_fx.errors import FallbackError
from tests.runtime.models import EXACT, SPARSE, TinyDiT, assert_same, calls, chipmunk, identical, run, words

TIMES = (900, 700, 500)
PHASES = {0: ["refresh", "sparse", "sparse"]}
TOLD = {"schedule.steps": 3, "schedule.branches": 1}


def blockwise(model: TinyDiT, options: dict[str, Any]) -> TinyDiT:
    """Every block compiled in place, as diffusers' compile_repeated_blocks does."""
    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(backend="chipmunk", fullgraph=True, options=options)
    return model


class Broken(TinyDiT):
    """The graph breaks between the blocks."""

    def forward(self, latents, timestep, text):
        b, _, h, w = latents.shape
        x = self.embed(latents).flatten(2).transpose(1, 2)
        x = x + self.time((timestep[:, None] * torch.arange(1, 33)).sin())[:, None]
        x = self.blocks[0](x)
        torch._dynamo.graph_break()
        return self.out(self.blocks[1](x)).reshape(b, -1, h, w)


class Tables(Broken):
    """Makes a table when it is needed first, behind the timestep, which Dynamo does not trace."""

    table = None

    def forward(self, latents, timestep, text):
        b, _, h, w = latents.shape
        x = self.embed(latents).flatten(2).transpose(1, 2)
        x = x + self.time((timestep[:, None] * torch.arange(1, 33)).sin())[:, None]
        x = self.blocks[1](self.blocks[0](self.tabled(x)))
        return self.out(x).reshape(b, -1, h, w)

    def tabled(self, x):
        if self.table is None:
            torch._dynamo.graph_break()
            self.table = torch.ones(())
        return x * self.table


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, TOLD], ids=["", "counted"])
def test_a_first_call_that_cuts_the_graph_is_named(options: dict[str, Any], caplog: pytest.LogCaptureFixture):
    torch._dynamo.reset()
    ours = chipmunk(Tables(depth=2), options=SPARSE | options)
    with caplog.at_level(logging.WARNING, logger="chipmunk_fx"):
        run(ours, calls(TIMES))
    said = [record.message for record in caplog.records if "torch._dynamo.reset()" in record.message]
    if options:
        assert not said and chipmunk_fx.summary(ours).phases == PHASES
        return
    assert len(said) == 1 and "Dynamo has cut the model's graph" in said[0]
    assert chipmunk_fx.summary(ours).phases == {0: ["dense"] * 3}
    torch._dynamo.reset()
    chipmunk_fx.reset(ours)
    run(ours, calls(TIMES))
    assert chipmunk_fx.summary(ours).phases == PHASES


def test_blocks_follow_the_schedule_when_steps_and_branches_are_given():
    model = blockwise(TinyDiT(depth=3), EXACT | TOLD)
    plain = TinyDiT(depth=3)
    for seed in range(2):
        assert_same(run(model, calls(TIMES, seed=seed)), run(plain, calls(TIMES, seed=seed)))
        summary = chipmunk_fx.summary(model)
        assert summary.phases == PHASES
        assert len(summary.sites) == 6 and all(s.phases == PHASES and s.cache_bytes for s in summary.sites)


def test_blocks_have_two_branches():
    model = blockwise(TinyDiT(depth=2), EXACT | TOLD | {"schedule.branches": 2})
    steps = calls(TIMES, [words(1), words(2)])
    assert_same(run(model, steps), run(TinyDiT(depth=2), steps))
    assert chipmunk_fx.summary(model).phases == {0: PHASES[0], 1: PHASES[0]}


def test_branches_of_blocks_may_have_texts_of_other_lengths():
    model = blockwise(TinyDiT(depth=2), EXACT | TOLD | {"schedule.branches": 2})
    for seed in range(2):
        steps = calls(TIMES, [words(1), words(2, count=5)], seed)
        assert_same(run(model, steps), run(TinyDiT(depth=2), steps))
        assert chipmunk_fx.summary(model).phases == {0: PHASES[0], 1: PHASES[0]}


def test_after_a_generation_that_was_cut_short_branches_keep_their_places():
    """Where the other text has another length, it tells; only the call before it has used what was there."""
    options = EXACT | TOLD | {"schedule.branches": 2}
    model = blockwise(TinyDiT(depth=2), options)
    run(model, calls(TIMES, [words(1), words(2, count=5)])[:4])
    for seed in range(2):
        steps = calls(TIMES, [words(3), words(4, count=7)], seed)
        assert_same(run(model, steps), run(TinyDiT(depth=2), steps))
        late = {0: ["refresh", "sparse"], 1: PHASES[0]}
        assert chipmunk_fx.summary(model).phases == (late if seed == 0 else {0: PHASES[0], 1: PHASES[0]})


def test_blocks_inside_a_generation_need_no_settings():
    model = blockwise(TinyDiT(depth=2), EXACT)
    with chipmunk_fx.generation(model, key="a"):
        assert_same(run(model, calls(TIMES)), run(TinyDiT(depth=2), calls(TIMES)))
    assert chipmunk_fx.summary(model, key="a").phases == PHASES


def test_guidance_inside_a_generation_has_to_say_how_many_calls_make_a_step(caplog: pytest.LogCaptureFixture):
    """The second call brings the tokens of the first: it must not go on with its caches."""
    model, steps = blockwise(TinyDiT(depth=2), SPARSE), calls(TIMES, [words(1), words(2)])
    with chipmunk_fx.generation(model, key="a"), caplog.at_level("WARNING", logger="chipmunk_fx"):
        assert_same(run(model, steps), run(TinyDiT(depth=2), steps))
    assert chipmunk_fx.summary(model, key="a").phases == {0: ["refresh"] + ["dense"] * 5}
    assert len(caplog.records) == 1 and "schedule.branches" in caplog.records[0].message
    with chipmunk_fx.generation(model, key="b"):  # another one begins without doubt
        run(model, calls(TIMES))
    assert chipmunk_fx.summary(model, key="b").phases == PHASES


@pytest.mark.parametrize("tokens", [8, 40])
def test_the_same_where_the_block_around_each_call_has_a_key(tokens: int):
    """Of the second model that is compiled, too."""
    run(blockwise(TinyDiT(), SPARSE), calls(TIMES)[:1])
    model, steps = TinyDiT(depth=2), calls(TIMES, [words(1, tokens), words(2, tokens)])
    for block in model.blocks:
        block.compile(backend="chipmunk", fullgraph=True, options=SPARSE)
    got = []
    for call in steps:
        with chipmunk_fx.generation(model, key="a"):
            got += run(model, [call])
    assert_same(got, run(TinyDiT(depth=2), steps))
    assert chipmunk_fx.summary(model, key="a").phases == {0: ["refresh"] + ["dense"] * 5}


class References(TinyDiT):
    """An image to edit stands beside the tokens, as large as all of them and more."""

    def forward(self, latents: Any, timestep: Any, text: Any = None) -> Any:
        beside = torch.randn(1, 90, 16, generator=torch.Generator().manual_seed(5))
        return super().forward(latents, timestep * 0, torch.cat([text, beside], 1))


def test_an_image_to_edit_is_no_sign_of_guidance():
    model = blockwise(References(depth=2), EXACT)
    with chipmunk_fx.generation(model, key="a"):
        assert_same(run(model, calls(TIMES)), run(References(depth=2), calls(TIMES)))
    assert chipmunk_fx.summary(model, key="a").phases == PHASES


def test_guidance_whose_branches_the_caller_names():
    model, steps = blockwise(TinyDiT(depth=2), EXACT), calls(TIMES, [words(1), words(2)])
    got = []
    for number, call in enumerate(steps):
        with chipmunk_fx.generation(model, key="a", branch=number % 2):
            got += run(model, [call])
    assert_same(got, run(TinyDiT(depth=2), steps))
    assert chipmunk_fx.summary(model, key="a").phases == {0: PHASES[0], 1: PHASES[0]}


def test_a_strict_generation_of_guidance_raises():
    model = blockwise(TinyDiT(depth=2), SPARSE | {"strict": True})
    with chipmunk_fx.generation(model), pytest.raises(FallbackError, match="the same tokens and another text"):
        run(model, calls(TIMES, [words(1), words(2)]))


def test_blocks_are_dense_otherwise_and_say_so_once(caplog: pytest.LogCaptureFixture):
    model = blockwise(TinyDiT(depth=1), SPARSE)
    with caplog.at_level("WARNING", logger="chipmunk_fx"):
        assert_same(run(model, calls(TIMES)), run(TinyDiT(depth=1), calls(TIMES)))
    assert chipmunk_fx.summary(model).phases == {0: ["dense"] * 3}
    assert len(caplog.records) == 1 and "schedule.steps" in caplog.records[0].message


def test_many_blocks_say_so_once(caplog: pytest.LogCaptureFixture):
    model = blockwise(TinyDiT(depth=3), SPARSE)
    with caplog.at_level("WARNING", logger="chipmunk_fx"):
        run(model, calls(TIMES))
    assert len(caplog.records) == 1


def test_the_first_blocks_stay_dense():
    model = blockwise(TinyDiT(depth=4), SPARSE | TOLD | {"attention.dense_layers": 2, "mlp.dense_layers": 2})
    run(model, calls(TIMES))
    dense = {0: ["dense"] * 3}
    assert [s.phases for s in chipmunk_fx.summary(model).sites] == [dense] * 4 + [PHASES] * 4


def test_the_first_blocks_of_a_second_model_stay_dense_too():
    options = SPARSE | TOLD | {"attention.dense_layers": 1, "mlp.dense_layers": 1}
    first, second = (blockwise(TinyDiT(depth=2, seed=seed), options) for seed in range(2))
    whole = chipmunk(TinyDiT(), options=SPARSE)
    run(first, calls(TIMES))
    run(whole, calls(TIMES[:1]))
    run(second, calls(TIMES))
    for model in (first, second):
        assert [s.phases == PHASES for s in chipmunk_fx.summary(model).sites] == [False, False, True, True]


def test_local_windows_without_a_grid():
    block = TinyDiT().blocks[0]
    tokens = [torch.randn(1, 64, 32) for _ in range(3)]
    exact = chipmunk(block, options=EXACT | TOLD | {"attention.local_window": 0.2})
    windowed = chipmunk(block, options=SPARSE | TOLD | {"attention.local_window": 0.25, "attention.density": 0.01})
    with torch.no_grad():
        assert_same([exact(x) for x in tokens], [block(x) for x in tokens])
        [windowed(x) for x in tokens]
    # 16 rows and 8 on either side, 1 column by mass and 1 at random, in tiles of 16: 48 in a list. The first and the last
    # group have rows on one side only, and lists of 40
    assert chipmunk_fx.summary(windowed).sites[0].density == (48 + 40) / 2 / 64


def test_two_models_of_blocks_share_graphs_but_no_state():
    first, second = TinyDiT(depth=2, seed=1), TinyDiT(depth=2, seed=2)
    alone = []
    for model in (first, second):
        alone.append(run(blockwise(model, SPARSE | TOLD), calls(TIMES)))
        chipmunk_fx.reset(model)
    mixed = [[], []]
    for call in calls(TIMES):
        mixed[0] += run(first, [call])
        mixed[1] += run(second, [call])
    assert identical(mixed[0], alone[0]) and identical(mixed[1], alone[1])


def test_the_work_of_blocks_is_added_up():
    model = blockwise(TinyDiT(depth=2), SPARSE | TOLD)
    run(model, calls(TIMES))
    summary = chipmunk_fx.summary(model)
    assert 0.4 < summary.flops_ratio < 1
    assert summary.cache_bytes == sum(s.cache_bytes for s in summary.sites)


def test_a_model_whose_graph_breaks_is_right():
    model = Broken(depth=2)
    torch._dynamo.reset()
    ours = chipmunk(model, options=EXACT)
    assert_same(run(ours, calls(TIMES)), run(model, calls(TIMES)))
    assert {"refresh", "dense"} <= {p for s in chipmunk_fx.summary(ours).sites for p in s.phases[0]}
    told = chipmunk(model, options=EXACT | TOLD)
    assert_same(run(told, calls(TIMES)), run(model, calls(TIMES)))
    assert [s.phases for s in chipmunk_fx.summary(told).sites] == [PHASES] * 4


def test_a_model_whose_graph_breaks_in_a_generation():
    model = Broken(depth=2)
    torch._dynamo.reset()
    ours = chipmunk(model, options=EXACT)
    with chipmunk_fx.generation(ours, key="a"):
        assert_same(run(ours, calls(TIMES)), run(model, calls(TIMES)))
    assert [s.phases for s in chipmunk_fx.summary(ours, key="a").sites] == [PHASES] * 4
