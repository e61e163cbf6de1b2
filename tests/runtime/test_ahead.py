"""Calls that are begun before the device has told which they are: the same bits, also where they are another."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import chipmunk_fx
from chipmunk_fx.graph.inputs import Roles
from chipmunk_fx.runtime import assembly, observe
from chipmunk_fx.runtime.session import Session
from chipmunk_fx.runtime.variants import Variants
from chipmunk_fx.schedule.timeline import Timeline
from chipmunk_fx.state.health import Health
from tests.runtime.models import Call, TinyDiT, calls, compiled, exactly, identical, noise, run, words

TIMES = (900.0, 700.0, 500.0, 300.0, 100.0)


class Arrival:
    """Of numbers that the CPU has had all along."""

    def synchronize(self) -> None:
        pass


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Has a CPU tell its numbers as late as a GPU does; of each call begun ahead, whether it was what it was taken for."""
    transfer, confirmed, kept = observe._transfer, Session._confirmed, []

    def transferred(
        told: observe.Observation, parts: Sequence[Tensor], times: Sequence[Tensor], which: observe.TimeInput
    ) -> observe.Sight:
        numbers = parts if told.timestep is None else [*times, *parts]
        return replace(transfer(replace(told, timestep=None), numbers, times, which), arrived=Arrival())  # pyright: ignore

    def noting(self: Session, early: Any, *rest: Any) -> Any:
        made = confirmed(self, early, *rest)
        kept.extend([made is not None] if early is not None else [])
        return made

    monkeypatch.setattr(observe, "_transfer", transferred)
    monkeypatch.setattr(Session, "_confirmed", noting)
    return kept


def alone(model: nn.Module, sequence: Sequence[Call], **options: Any) -> tuple[list[Tensor], Any]:
    """What comes of the calls where none is begun ahead."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "_ahead", lambda *_: None)
        plain = compiled(model, **options)
        return run(plain, sequence), chipmunk_fx.summary(plain).phases


def test_from_the_second_step_on_calls_are_begun_ahead(late: list[bool]):
    model, sequence = TinyDiT(2), calls(TIMES)
    want, phases = alone(model, sequence, schedule__refresh_every=3)
    ours = compiled(TinyDiT(2), schedule__refresh_every=3)
    assert identical(run(ours, sequence), want)
    assert late == [True] * 3
    assert chipmunk_fx.summary(ours).phases == phases == {0: ["refresh", "sparse", "sparse", "refresh", "sparse"]}


@pytest.mark.parametrize("options", [{}, {"schedule__branches": 2}], ids=["inferred", "given"])
def test_branches_of_guidance(late: list[bool], options: dict[str, Any]):
    sequence = calls(TIMES, [words(1), words(2)])
    want, phases = alone(TinyDiT(), sequence, **options)
    ours = compiled(TinyDiT(), **options)
    assert identical(run(ours, sequence), want) and chipmunk_fx.summary(ours).phases == phases
    assert late == [True] * 7  # at the second step the first branch is not known to come again


class Flagged(TinyDiT):
    def forward(self, latents: Tensor, timestep: Tensor, text: Any = None, drop: bool = False) -> Tensor:
        return super().forward(latents, timestep, 0 * text if drop else text)


@torch.no_grad()
def test_guidance_by_a_flag(late: list[bool]):
    sequence: Any = [(*call, drop) for call in calls(TIMES) for drop in (False, True)]
    want, phases = alone(Flagged(), sequence)
    ours = compiled(Flagged())
    assert identical(run(ours, sequence), want)
    assert chipmunk_fx.summary(ours).phases == phases == {branch: ["refresh"] + ["sparse"] * 4 for branch in (0, 1)}
    assert late == [True] * 7


def test_guidance_that_pauses_and_comes_back(late: list[bool]):
    both = calls(TIMES * 2, [words(1), words(2)])
    both = [(latents, time - 1000 * (i // 10), text) for i, (latents, time, text) in enumerate(both)]
    sequence = [call for i, call in enumerate(both) if i % 2 == 0 or i // 2 not in (3, 4, 5)]
    want, phases = alone(TinyDiT(), sequence)
    ours = compiled(TinyDiT())
    assert identical(run(ours, sequence), want) and chipmunk_fx.summary(ours).phases == phases
    assert all(late) and len(late) == len(sequence) - 3


def test_three_calls_of_one_text_a_step(late: list[bool]):
    sequence = [call for call in calls(TIMES) for _ in range(3)]
    want, phases = alone(TinyDiT(), sequence, schedule__branches=3)
    ours = compiled(TinyDiT(), schedule__branches=3)
    assert identical(run(ours, sequence), want) and chipmunk_fx.summary(ours).phases == phases
    assert all(late) and len(late) == 11


def test_timesteps_that_come_twice(late: list[bool]):
    sequence = calls((900, 700, 700, 500, 500, 300, 300))
    want, phases = alone(TinyDiT(), sequence)
    ours = compiled(TinyDiT())
    assert identical(run(ours, sequence), want) and chipmunk_fx.summary(ours).phases == phases
    assert all(late) and len(late) == 5


@pytest.mark.parametrize("cut", [2, 3, 4])
def test_a_generation_that_was_cut_short(late: list[bool], cut: int):
    first, second = calls(TIMES)[:cut], calls(TIMES, seed=5)
    want, _ = alone(TinyDiT(), second)
    ours = compiled(TinyDiT())
    run(ours, first)
    late.clear()
    assert identical(run(ours, second), want)
    assert late == [False] + [True] * (cut - 2)  # and no step that the one cut short did not have
    assert chipmunk_fx.summary(ours).phases == {0: ["refresh"] + ["sparse"] * 4}
    assert not chipmunk_fx.summary(ours).fallbacks


def test_no_call_is_begun_ahead_that_no_generation_had(late: list[bool]):
    ours = compiled(TinyDiT())
    run(ours, calls(TIMES))
    for seed, taken in enumerate((False, True, True)):  # the end of the first is not known before the second begins
        late.clear()
        run(ours, calls(TIMES, seed=seed))
        assert late == ([True] * 3 if taken else [False, True, True, True])
    bounded = compiled(TinyDiT(), schedule__steps=5)
    for seed in range(2):
        late.clear()
        run(bounded, calls(TIMES, seed=seed))
        assert late == [True] * 3


def test_a_timestep_on_the_host_tells_at_once(monkeypatch: pytest.MonkeyPatch):
    transfer, begun = observe._transfer, []
    monkeypatch.setattr(observe, "_transfer", lambda *given: replace(transfer(*given), arrived=Arrival()))
    confirmed = Session._confirmed
    monkeypatch.setattr(
        Session,
        "_confirmed",
        lambda self, early, *rest: begun.append(early is not None) or confirmed(self, early, *rest),
    )
    ours = compiled(TinyDiT())
    run(ours, calls(TIMES))
    run(ours, calls(TIMES, seed=5))
    assert begun == [False, False, True, True, True] * 2


def test_a_call_of_other_sizes_or_another_text_begins_as_ever(late: list[bool]):
    ours = compiled(TinyDiT())
    run(ours, calls(TIMES[:3]))
    late.clear()
    for sequence in (calls(TIMES, side=24), calls(TIMES, [words(7)], seed=3)):
        assert identical(run(ours, sequence), alone(TinyDiT(), sequence)[0])
    assert all(late)


def test_what_another_call_was_taken_for_is_made_anew(late: list[bool]):
    """Two texts a step, then twice the first at one timestep: a step of a solver where the other branch was expected."""
    sequence = calls(TIMES[:3], [words(1), words(2)])
    latents, _, text = sequence[0]
    other = words(2)
    more = [(latents, torch.tensor([250.0]), text), (latents, torch.tensor([250.0]), other)]
    taken = [*sequence, *more, *calls((100.0,), [words(1), words(2)])]
    expecting = Session._ahead

    def wrongly(self: Session, graph: Any, track: Any, sight: Any, *rest: Any) -> Any:
        """The next step of the branch that was called last."""
        made = expecting(self, graph, track, sight, *rest)
        return made if made is None or self.calls != 7 else replace(made, position=replace(made.position, step=9))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "_ahead", wrongly)
        ours = exactly(TinyDiT())
        got = run(ours, taken)
    dense = run(TinyDiT(), taken)
    torch.testing.assert_close(got, dense, atol=1e-4, rtol=1e-4)
    assert late.count(False) == 1 and late[-1] is False  # and nothing was expected of the rest
    phases = chipmunk_fx.summary(ours).phases
    assert phases == {0: ["refresh", "sparse", "sparse", "refresh", "sparse"], 1: ["refresh"] + ["sparse"] * 4}


class Sent(Health):
    """What the host sees is a copy, as of a GPU's flag."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.seen = self.flag.clone()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_damage_is_found_before_a_call_is_over(late: list[bool], bad: float, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(assembly, "Health", Sent)
    sequence = calls(TIMES)
    broken = list(sequence)
    broken[2] = (torch.full_like(sequence[2][0], bad), *sequence[2][1:])
    want, phases = alone(TinyDiT(), broken)
    ours = compiled(TinyDiT())
    got = run(ours, broken)
    assert identical([got[i] for i in (0, 1, 3, 4)], [want[i] for i in (0, 1, 3, 4)])
    assert chipmunk_fx.summary(ours).phases == phases
    assert [fallback.step for fallback in chipmunk_fx.summary(ours).fallbacks] == [3]


def test_damage_of_a_call_that_was_another_is_forgotten(late: list[bool], monkeypatch: pytest.MonkeyPatch):
    """The first branch's fourth call has no numbers, and is taken for one of the second branch."""
    monkeypatch.setattr(assembly, "Health", Sent)
    sequence = calls(TIMES * 2, [words(1), words(2)])
    sequence = [(x, torch.tensor([900.0 - 100 * (i // 2)]), text) for i, (x, _, text) in enumerate(sequence)]
    sequence[6] = (torch.full_like(sequence[6][0], torch.nan), *sequence[6][1:])
    expecting, seen = Timeline.expect, []

    def wrongly(self: Timeline, *told: Any) -> Any:
        seen.append(expecting(self, *told))
        return replace(seen[-1], branch=1) if len(seen) == 7 else seen[-1]

    monkeypatch.setattr(Timeline, "expect", wrongly)
    ours = compiled(TinyDiT(), schedule__refresh_every=20)
    run(ours, sequence)
    assert late.count(False) == 1
    assert [(fallback.step, fallback.branch) for fallback in chipmunk_fx.summary(ours).fallbacks] == [(4, 0)]
    assert chipmunk_fx.summary(ours).phases[1] == ["refresh", "sparse", "sparse", "refresh", *["sparse"] * 6]


def test_a_graph_that_fails_ahead_runs_dense(late: list[bool], monkeypatch: pytest.MonkeyPatch):
    sequence = calls(TIMES)
    ours = compiled(TinyDiT())
    run(ours, sequence[:3])

    def failing(*_: Any) -> Any:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(Variants, "get", lambda *_: failing)
    got = run(ours, sequence[3:4])
    monkeypatch.undo()
    assert torch.equal(got[0], TinyDiT()(*sequence[3]))
    assert "no such kernel" in chipmunk_fx.summary(ours).fallbacks[0].reason


def test_skipped_steps_are_begun_ahead_too(late: list[bool]):
    sequence = calls((900, 800, 700, 600, 500, 400))
    options: dict[str, Any] = {"schedule__skip_steps": [2, 3, 5]}
    want, phases = alone(TinyDiT(2), sequence, **options)
    ours = compiled(TinyDiT(2), **options)
    assert identical(run(ours, sequence), want)
    assert late == [True] * 4
    assert chipmunk_fx.summary(ours).phases == phases and phases[0].count("skip") == 3


class Noisy(TinyDiT):
    """Adds noise of the global generator."""

    def forward(self, latents: Tensor, timestep: Tensor, text: Any = None) -> Tensor:
        return super().forward(latents + 0.01 * torch.randn_like(latents), timestep, text)


class Dropping(TinyDiT):
    """Would drop values, were it trained."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.eval()

    def forward(self, latents: Tensor, timestep: Tensor, text: Any = None) -> Tensor:
        return self.dropout(super().forward(latents, timestep, text))


def test_a_model_that_draws_random_numbers_is_never_called_twice(late: list[bool]):
    run(compiled(Noisy()), calls(TIMES))
    assert not late
    run(compiled(Dropping()), calls(TIMES))
    assert late == [True] * 3


def test_numbers_arrive_in_one_piece():
    sight = observe.Observer().observe(Roles(0, 1, (), ()), [torch.tensor([900.0]), noise()])
    assert sight.arrived is None and sight.told.timestep == (900.0,) and sight.told.latents is None
    assert sight.whole().latents is not None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a device that works beside the host")
@pytest.mark.parametrize(
    "options", [{}, {"lowering": "inductor", "inductor__mode": "reduce-overhead"}], ids=["", "graphs"]
)
def test_a_gpu_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]):
    make, confirmed, busy, kept = Session._make, Session._confirmed, [], []

    def making(self: Session, *rest: Any) -> Any:
        busy.append(not slept.query())
        return make(self, *rest)

    def noting(self: Session, early: Any, *rest: Any) -> Any:
        made = confirmed(self, early, *rest)
        kept.append(None if early is None else made is not None)
        return made

    text = words().cuda()  # one tensor, whose content is read once
    first, second = ([(x.cuda(), t.cuda(), text) for x, t, _ in calls(TIMES, seed=seed)] for seed in (1, 2))
    want = [alone(TinyDiT(2).cuda(), sequence, **options)[0] for sequence in (first[:4], second)]
    monkeypatch.setattr(Session, "_make", making)
    monkeypatch.setattr(Session, "_confirmed", noting)
    ours = compiled(TinyDiT(2).cuda(), **options)
    got, slept = [], torch.cuda.Event()
    for call in [*first[:4], *second]:
        torch.cuda.synchronize()
        torch.cuda._sleep(100_000_000)
        slept.record()
        got += run(ours, [call])
    assert identical(got, [*want[0], *want[1]])
    assert kept == [None, None, True, True, False, None, True, True, None]
    assert busy == [False, False, True, True, True, False, False, True, True, False]
