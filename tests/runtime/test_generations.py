"""Generations and branches that the caller names."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import chipmunk_fx
from chipmunk_fx.runtime import registry
from chipmunk_fx.runtime.generations import Clock
from tests.runtime.models import (
    TinyDiT,
    Unsure,
    assert_same,
    calls,
    chipmunk,
    compiled,
    exactly,
    identical,
    run,
    words,
)

TIMES = (900, 700, 500, 300)
PHASES = {0: ["refresh", "sparse", "sparse", "sparse"]}


def within(model, key, inputs, branch=None):
    with chipmunk_fx.generation(model, key=key, branch=branch):
        return run(model, inputs)


def test_interleaved_generations_are_what_each_is_alone():
    model = compiled(TinyDiT())
    first, second = calls(TIMES, seed=1), calls(TIMES, seed=2)
    alone = [within(model, "first alone", first), within(model, "second alone", second)]
    mixed = [[], []]
    for pair in zip(first, second, strict=True):
        for index, call in enumerate(pair):
            mixed[index] += within(model, index, [call])
    assert identical(mixed[0], alone[0]) and identical(mixed[1], alone[1])
    assert not torch.equal(mixed[0][-1], mixed[1][-1])
    assert chipmunk_fx.summary(model, key=0).phases == chipmunk_fx.summary(model, key=1).phases == PHASES


def test_the_time_that_moves_tells_pictures_apart():
    """The first of the two, which is the same at all calls, would let a like picture go on with the caches of the one before."""
    model = compiled(Unsure())
    inputs = [(latents, torch.tensor([7.0]), time, text) for latents, time, text in calls(TIMES)]
    for _ in range(3):
        run(model, inputs)
    assert chipmunk_fx.summary(model).phases == PHASES
    assert any("no name tells" in note for note in chipmunk_fx.explain(Unsure(), *inputs[0]).notes)


def test_generations_with_two_branches_interleave():
    model = compiled(TinyDiT())
    texts = [words(1), words(2)]
    first, second = calls(TIMES, texts, seed=1), calls(TIMES, texts, seed=2)
    alone = [within(model, "first alone", first), within(model, "second alone", second)]
    mixed = [[], []]
    for pair in zip(first, second, strict=True):
        for index, call in enumerate(pair):
            mixed[index] += within(model, index, [call])
    assert identical(mixed[0], alone[0]) and identical(mixed[1], alone[1])


def test_a_block_without_a_key_is_a_generation_of_its_own():
    model = compiled(TinyDiT())
    for _ in range(2):
        with chipmunk_fx.generation(model):
            run(model, calls((500, 300)))
        assert chipmunk_fx.summary(model).phases == {0: ["refresh", "sparse"]}


def test_a_generation_without_a_key_is_forgotten_once_another_begins():
    model = compiled(TinyDiT())
    sizes = []
    for _ in range(3):
        with chipmunk_fx.generation(model):
            run(model, calls(TIMES[:1]))
        (session,) = registry.sessions(model)
        sizes.append(session.account().total)
        assert chipmunk_fx.summary(model).cache_bytes == session.account().total
    assert len(set(sizes)) == 1 and len(session.tracks) == 1
    with chipmunk_fx.generation(model):
        run(model, calls(TIMES[:1]))
        run(model, calls(TIMES[1:2]))
        with chipmunk_fx.generation(model):
            run(model, calls(TIMES[:1]))
        run(model, calls(TIMES[2:]))  # the outer one is still under way
        assert {len(track.records) for track in session.tracks.values()} == {4, 1}


def test_calls_outside_go_on_beside_those_inside():
    model = compiled(TinyDiT())
    outside, inside = calls(TIMES, seed=1), calls(TIMES, seed=2)
    alone = run(model, outside)
    chipmunk_fx.reset(model)
    mixed = []
    for a, b in zip(outside, inside, strict=True):
        mixed += run(model, [a])
        within(model, "inside", [b])
    assert identical(mixed, alone)
    assert chipmunk_fx.summary(model, key="inside").phases == PHASES


def test_a_summary_is_of_the_generation_that_began_last():
    model = compiled(TinyDiT())
    within(model, "a", calls(TIMES[:2]))
    within(model, "b", calls(TIMES[:1]))
    within(model, "a", calls(TIMES[2:]))
    assert chipmunk_fx.summary(model).phases == {0: ["refresh"]}
    assert chipmunk_fx.summary(model, key="a").phases == PHASES


def test_branches_that_the_caller_names():
    model = TinyDiT()
    ours = exactly(model)
    first = calls(TIMES)
    second = [(latents + 0.3, time, text) for latents, time, text in first]  # no text tells them apart
    for a, b in zip(first, second, strict=True):
        for branch, call in enumerate((a, b)):
            assert_same(within(ours, "named", [call], branch), run(model, [call]))
    assert chipmunk_fx.summary(ours, key="named").phases == {0: PHASES[0], 1: PHASES[0]}


def test_named_branches_of_a_model_without_a_timestep():
    block = TinyDiT().blocks[0]
    ours = exactly(block)
    tokens = torch.randn(1, 48, 32)
    with torch.no_grad():
        for step in range(3):
            for branch in range(2):
                with chipmunk_fx.generation(ours, key="named", branch=branch):
                    moved = tokens + 0.1 * step + branch
                    assert_same([ours(moved)], [block(moved)])
    assert chipmunk_fx.summary(ours, key="named").phases == {0: ["refresh", "sparse", "sparse"]} | {
        1: ["refresh", "sparse", "sparse"]
    }


def test_a_generation_is_left_when_its_block_raises():
    model = compiled(TinyDiT())
    with pytest.raises(ValueError), chipmunk_fx.generation(model, key="a"):
        run(model, calls(TIMES[:1]))
        raise ValueError
    run(model, calls(TIMES))
    assert chipmunk_fx.summary(model).phases == PHASES
    assert chipmunk_fx.summary(model, key="a").phases == {0: ["refresh"]}


def test_blocks_that_are_left_in_another_order_stay_with_nobody(caplog: pytest.LogCaptureFixture):
    ours = compiled(TinyDiT())

    def pictures(key: str) -> Iterator[None]:
        with chipmunk_fx.generation(ours, key=key):
            yield

    a, b = pictures("a"), pictures("b")
    next(a), next(b)
    with caplog.at_level("WARNING", logger="chipmunk_fx"):
        assert next(a, None) is next(b, None) is None
    assert [record.message for record in caplog.records if "generators take turns" in record.message]
    run(ours, calls(TIMES))
    with pytest.raises(KeyError):
        chipmunk_fx.summary(ours, key="a")


def test_a_block_may_be_left_in_another_thread():
    """As a server does that closes a generator."""
    entered = chipmunk_fx.generation(compiled(TinyDiT()))
    entered.__enter__()
    with ThreadPoolExecutor(1) as threads:
        assert not threads.submit(entered.__exit__, None, None, None).result()
    registry._SCOPES.set(())  # of this thread


def test_the_innermost_block_counts_and_only_for_its_model():
    outer, inner = TinyDiT(), TinyDiT()
    ours, theirs = (
        compiled(outer),
        chipmunk(inner, options={"lowering": "eager", "gate": "off"}),
    )
    with chipmunk_fx.generation(ours, key="a"):
        with chipmunk_fx.generation(ours, key="b"):
            run(ours, calls(TIMES[:1]))
        run(theirs, calls(TIMES[:1]))
    assert chipmunk_fx.summary(ours, key="b").phases == {0: ["refresh"]}
    for model, key in ((ours, "a"), (theirs, "a")):
        with pytest.raises(KeyError, match=f"no generation '{key}'"):
            chipmunk_fx.summary(model, key=key)


def test_reset_is_for_every_generation():
    model = compiled(TinyDiT())
    within(model, "a", calls(TIMES[:2]))
    chipmunk_fx.reset(model)
    within(model, "a", calls(TIMES[2:]))
    assert chipmunk_fx.summary(model, key="a").phases == {0: ["refresh", "sparse"]}


def test_over_the_budget_the_generation_called_longest_ago_gives_way():
    one = exactly(TinyDiT())
    within(one, 0, calls(TIMES[:1]))
    size = chipmunk_fx.summary(one, key=0).cache_bytes
    model = TinyDiT()
    ours = exactly(model, memory__budget_gb=2.5 * size / 1e9)
    for time in range(4):
        for key in range(3):
            inputs = calls(TIMES, seed=key)[time : time + 1]
            assert_same(within(ours, key, inputs), run(model, inputs))
    sizes = [chipmunk_fx.summary(ours, key=key).cache_bytes for key in range(3)]
    assert sizes == [0, size, size]
    phases = chipmunk_fx.summary(ours, key=2).phases
    assert phases == {0: ["refresh"] * 4}  # three of them never fit, so each finds its caches gone
    for time in range(2):
        for key in (1, 2):
            inputs = calls((200, 100), seed=key)[time : time + 1]
            assert_same(within(ours, key, inputs), run(model, inputs))
    assert chipmunk_fx.summary(ours, key=2).phases == {0: ["refresh"] * 4 + ["sparse"] * 2}


def test_a_clock_writes_what_has_changed_and_no_more():
    clock = Clock.on(torch.device("cpu"))
    versions = [clock.tensor._version]
    for step, renew in ((0, True), (1, True), (1, True), (1, False), (7, True)):
        with torch.inference_mode():
            clock.tell(step, renew)
        assert clock.tensor.tolist() == [step, renew]
        versions.append(clock.tensor._version)
    assert [after - before for before, after in zip(versions, versions[1:], strict=False)] == [1, 1, 0, 1, 2]


class Interrupted:
    """What is to be filled when the user presses Ctrl-C."""

    def fill_(self, value: int) -> None:
        raise KeyboardInterrupt


@pytest.mark.parametrize("at", [0, 1])
def test_a_clock_that_was_interrupted_relies_on_nothing(at: int):
    clock = Clock.on(torch.device("cpu"))
    clock.tell(1, False)
    places = clock.places
    clock.places = (*places[:at], Interrupted(), *places[at + 1 :])  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(KeyboardInterrupt):
        clock.tell(2, True)
    clock.places = places
    for step, renew in ((1, False), (2, True)):
        clock.tell(step, renew)
        assert clock.tensor.tolist() == [step, renew]


@pytest.mark.parametrize("offload", ["none", "all"])
def test_a_refresh_is_told_whether_there_has_been_one_before(offload: str):
    """And that it stores weights where these pass through buffers that other sites use, too."""
    model = compiled(TinyDiT(2), schedule__refresh_every=2, mlp__list_lifetime=3, memory__offload=offload)
    told = []
    for _ in range(2):
        for call in calls(TIMES + (100,)):
            run(model, [call])
            told.append(registry.sessions(model)[0].tracks[None].clock.told)  # pyright: ignore[reportOptionalMemberAccess]
        chipmunk_fx.reset(model)
    again = int(offload == "all")
    assert told == [(0, 1), (1, 1), (2, again), (3, 1), (4, again)] * 2
