"""Which phase a call gets, seen through the public names, and that what follows is right."""

import pytest
import torch
from torch import nn

import chipmunk_fx
from tests.runtime.models import TinyDiT, assert_same, calls, compiled, exactly, identical, noise, run, words

TIMES = (900, 700, 500, 300, 100)


def phases(model) -> dict[int, list[str]]:
    return chipmunk_fx.summary(model).phases


def test_a_plain_loop():
    model = compiled(TinyDiT(), schedule__refresh_every=3)
    for _ in range(2):
        run(model, calls(TIMES))
        assert phases(model) == {0: ["refresh", "sparse", "sparse", "refresh", "sparse"]}


def test_listed_refresh_steps():
    model = compiled(TinyDiT(), schedule__refresh_steps=[0, 1, 3])
    run(model, calls(TIMES))
    assert phases(model) == {0: ["refresh", "refresh", "sparse", "refresh", "sparse"]}


def test_every_phase_is_right():
    model = TinyDiT(depth=2)
    ours = exactly(model, schedule__refresh_every=3)
    assert_same(run(ours, calls(TIMES)), run(model, calls(TIMES)))
    assert phases(ours) == {0: ["refresh", "sparse", "sparse", "refresh", "sparse"]}


def test_sparse_steps_differ_from_dense_and_a_refresh_does_not():
    model = TinyDiT()
    ours = compiled(model, schedule__refresh_every=3)
    errors = [
        (a - b).abs().max().item() for a, b in zip(run(ours, calls(TIMES)), run(model, calls(TIMES)), strict=True)
    ]
    assert [error > 1e-4 for error in errors] == [False, True, True, False, True]


def test_timesteps_that_rise():
    model = TinyDiT()
    ours = exactly(model)
    for _ in range(2):
        assert_same(run(ours, calls(TIMES[::-1])), run(model, calls(TIMES[::-1])))
    assert phases(ours) == {0: ["refresh"] + ["sparse"] * 4}


def test_a_second_order_solver_has_a_step_for_every_call():
    model = compiled(TinyDiT(), schedule__refresh_every=3)
    run(model, calls((900, 700, 700, 500, 500)))
    assert phases(model) == {0: ["refresh", "sparse", "sparse", "refresh", "sparse"]}


def test_two_calls_a_step_have_caches_of_their_own():
    model = TinyDiT()
    ours = exactly(model)
    steps = calls(TIMES, [words(1), words(2)])
    assert_same(run(ours, steps), run(model, steps))
    assert phases(ours) == {0: ["refresh"] + ["sparse"] * 4, 1: ["refresh"] + ["sparse"] * 4}
    one = exactly(TinyDiT())
    run(one, calls(TIMES, [words(1)]))
    weights = 4 * 128 * 32  # of the second linear, by neuron: both branches read the same
    assert chipmunk_fx.summary(ours).cache_bytes == 2 * chipmunk_fx.summary(one).cache_bytes - weights


def test_branches_do_not_touch_each_other():
    model = TinyDiT()
    ours, alone = compiled(model), compiled(TinyDiT())
    both = run(ours, calls(TIMES, [words(1), words(2)]))
    assert identical(both[::2], run(alone, calls(TIMES, [words(1)])))
    chipmunk_fx.reset(alone)
    assert identical(both[1::2], run(alone, calls(TIMES, [words(2)])))


def test_the_same_text_in_another_tensor_is_the_same_branch():
    model = compiled(TinyDiT())
    run(model, [(latents, time, text.clone()) for latents, time, text in calls(TIMES)])
    assert phases(model) == {0: ["refresh"] + ["sparse"] * 4}


def test_a_text_written_over_is_another_branch():
    model = compiled(TinyDiT())
    text = words(1)
    steps = calls(TIMES, [text])
    run(model, steps[:2])
    text.copy_(words(2))
    run(model, steps[1:3])
    assert phases(model) == {0: ["refresh", "sparse"], 1: ["refresh", "sparse"]}


def test_guidance_that_begins_late_refreshes_when_it_does():
    model = TinyDiT()
    ours = exactly(model)
    steps = calls(TIMES[:2], [words(1)]) + calls(TIMES[2:], [words(1), words(2)])
    assert_same(run(ours, steps), run(model, steps))
    assert phases(ours) == {0: ["refresh"] + ["sparse"] * 4, 1: ["refresh", "sparse", "sparse"]}


def test_a_late_start_is_a_start():
    model = TinyDiT()
    ours = exactly(model)
    for seed, times in enumerate(((300, 100), TIMES[2:], TIMES)):
        steps = calls(times, seed=seed)
        assert_same(run(ours, steps), run(model, steps))
        assert phases(ours) == {0: ["refresh"] + ["sparse"] * (len(times) - 1)}


def test_a_batch_of_two():
    model = TinyDiT()
    ours = exactly(model)
    steps = calls(TIMES, batch=2)
    assert_same(run(ours, steps), run(model, steps))
    assert phases(ours) == {0: ["refresh"] + ["sparse"] * 4}


def test_a_batch_at_two_timesteps():
    model = TinyDiT()
    ours = exactly(model)
    steps = [(x, torch.tensor([time[0], time[0] / 2]), text) for x, time, text in calls(TIMES, batch=2)]
    assert_same(run(ours, steps), run(model, steps))
    assert phases(ours) == {0: ["refresh"] + ["sparse"] * 4}


def test_without_text_a_repeated_timestep_is_undecidable_unless_told():
    model = TinyDiT()
    steps = [call[:2] for call in calls((900, 700, 700, 500))]
    ours = exactly(model)
    assert_same(run(ours, steps), run(model, steps))
    assert phases(ours)[0][:2] == ["refresh", "sparse"] and "dense" in sum(phases(ours).values(), [])
    assert "schedule.branches" in chipmunk_fx.summary(ours).fallbacks[0].reason
    told = exactly(model, schedule__branches=1)
    assert_same(run(told, steps), run(model, steps))
    assert phases(told) == {0: ["refresh", "sparse", "sparse", "sparse"]} and not chipmunk_fx.summary(told).fallbacks


def test_strict_raises_where_a_call_is_undecidable():
    model = compiled(TinyDiT(), strict=True)
    steps = [call[:2] for call in calls((900, 700, 700))]
    run(model, steps[:2])
    with pytest.raises(chipmunk_fx.FallbackError, match="schedule.branches"):
        run(model, steps[2:])


class Labelled(TinyDiT):
    """Fails half-way for a label that it does not know, after the first block has run."""

    def __init__(self) -> None:
        super().__init__(depth=2)
        self.labels = nn.Embedding(3, 32)

    def forward(self, latents, timestep, text):
        label = text[0, 0, :1].long()
        b, _, h, w = latents.shape
        x = self.embed(latents).flatten(2).transpose(1, 2)
        x = x + self.time((timestep[:, None] * torch.arange(1, 33)).sin())[:, None]
        x = self.blocks[1](self.blocks[0](x) + self.labels(label))
        return self.out(x).reshape(b, -1, h, w)


def test_after_an_exception_half_way_nothing_stale_is_used():
    model = Labelled()
    ours = exactly(model)
    steps = calls(TIMES, [torch.zeros(1, 8, 16)])
    bad = (steps[2][0], steps[2][1], torch.full((1, 8, 16), 5.0))
    run(ours, steps[:2])
    with pytest.raises(IndexError):
        run(ours, [bad])
    again = steps[3:]
    assert_same(run(ours, again), run(model, again))
    assert_same(run(ours, steps), run(model, steps))
    assert phases(ours) == {0: ["refresh"] + ["sparse"] * 4}


def test_an_exception_in_the_branch_itself_makes_its_next_call_a_refresh():
    model = Labelled()
    ours = exactly(model, schedule__branches=1)
    good, bad = torch.zeros(1, 8, 16), torch.full((1, 8, 16), 5.0)
    steps = calls(TIMES, [good])
    run(ours, steps[:2])
    with pytest.raises(IndexError):
        run(ours, [(*steps[2][:2], bad)])
    assert_same(run(ours, steps[3:]), run(model, steps[3:]))
    assert phases(ours) == {0: ["refresh", "sparse", "refresh", "sparse"]}


def test_reset_begins_a_generation_at_the_next_call():
    model = compiled(TinyDiT())
    run(model, calls(TIMES[:3]))
    chipmunk_fx.reset(model)
    run(model, calls(TIMES[3:]))
    assert phases(model) == {0: ["refresh", "sparse"]}


def test_a_first_timestep_that_comes_again_with_other_noise_is_a_new_picture():
    model = compiled(TinyDiT())
    for seed in range(3):
        run(model, calls((900,), seed=seed))
        assert phases(model) == {0: ["refresh"]}


def test_skipped_steps_are_scheduled_once_there_is_a_residual():
    model = TinyDiT()
    ours = exactly(model, schedule__skip_steps=[0, 2])
    assert len(run(ours, calls(TIMES))) == 5
    assert phases(ours)[0][:2] == ["refresh", "sparse"]


def test_models_without_a_timestep_are_dense_until_steps_and_branches_are_given():
    block = TinyDiT().blocks[0]
    steps = [(noise(seed).flatten(2).mT @ torch.ones(4, 32),) for seed in range(3)]
    ours = exactly(block)
    assert_same(run(ours, steps), run(block, steps))
    assert phases(ours) == {0: ["dense"] * 3}
    assert "schedule.steps" in chipmunk_fx.summary(ours).fallbacks[0].reason
    told = exactly(block, schedule__steps=3, schedule__branches=1)
    for _ in range(2):
        assert_same(run(told, steps), run(block, steps))
        assert phases(told) == {0: ["refresh", "sparse", "sparse"]}
    with chipmunk_fx.generation(ours, key="a"):
        assert_same(run(ours, steps), run(block, steps))
    assert phases(ours) == {0: ["refresh", "sparse", "sparse"]}
