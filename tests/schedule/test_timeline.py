"""One test a rule. `noise(seed)` stands for the latents of a generation; `drift` is what a sampler makes of them."""

import gc
import math
import random
import weakref

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chipmunk_fx.schedule import Observation, Timeline
from chipmunk_fx.schedule.timeline import ALTERNATING, CHURNING, MOVING, OTHER_PICTURE, RESHAPED

SIZE = 64


def noise(seed):
    source = random.Random(seed)
    return tuple(source.gauss(0, 1) for _ in range(SIZE))


def drift(latents, target, part):
    """The latents after `part` (0 to 1) of the way from noise to picture."""
    return tuple((1 - part) * a + part * b for a, b in zip(latents, target, strict=True))


def see(timestep: float | None, text: str | None = "prompt", latents=None, shape=(1, 16, 8, 8)):
    return Observation(None if timestep is None else (float(timestep),), text, shape, latents)


def run(timeline, calls):
    """(generation, step, branch) of each call, all of which must be decided."""
    positions = [timeline.advance(call) for call in calls]
    assert [p.reason for p in positions] == [None] * len(positions)
    assert all(p.decided for p in positions)
    return [(p.generation, p.step, p.branch) for p in positions]


def undecided(timeline, calls):
    positions = [timeline.advance(call) for call in calls]
    assert all(p.decided == (p.reason is None) for p in positions)
    return [not p.decided for p in positions]


def test_plain_loop_counts_steps_and_a_jump_back_begins_a_generation():
    timeline = Timeline()
    assert run(timeline, [see(t) for t in (900, 600, 300)]) == [(0, 0, 0), (0, 1, 0), (0, 2, 0)]
    assert run(timeline, [see(t) for t in (900, 600, 300)]) == [(1, 0, 0), (1, 1, 0), (1, 2, 0)]


def test_begins_marks_the_first_call_only():
    timeline = Timeline()
    calls = [see(900, "a"), see(900, "b"), see(600, "a"), see(900, "a")]
    assert [timeline.advance(call).begins for call in calls] == [True, False, False, True]


def test_second_order_solver_counts_the_repeated_timestep_as_a_step():
    steps = run(Timeline(), [see(t) for t in (900, 600, 600, 300, 300)])
    assert steps == [(0, step, 0) for step in range(5)]


def test_second_order_solver_with_two_calls_a_step():
    order = [(900, "a"), (900, "b")] + [(t, text) for t in (600, 600, 300, 300) for text in ("a", "b")]
    expected = [(0, step, branch) for step in range(5) for branch in (0, 1)]
    for branches in (None, 2):
        assert run(Timeline(branches=branches), [see(*call) for call in order]) == expected


def test_two_calls_a_step_are_branches_in_order_of_first_call():
    calls = [see(900, "negative"), see(900, "prompt"), see(600, "prompt"), see(600, "negative")]
    assert run(Timeline(), calls) == [(0, 0, 0), (0, 0, 1), (0, 1, 1), (0, 1, 0)]


def test_branches_are_numbered_anew_in_each_generation():
    calls = [see(900, "a"), see(900, "b"), see(600, "a"), see(600, "b"), see(900, "c"), see(900, "b")]
    assert run(Timeline(), calls)[-2:] == [(1, 0, 0), (1, 0, 1)]


def test_batch_of_two_is_one_call_a_step():
    calls = [Observation((float(t),) * 2, "both", (2, 16, 8, 8)) for t in (900, 600, 300, 900)]
    assert run(Timeline(), calls) == [(0, 0, 0), (0, 1, 0), (0, 2, 0), (1, 0, 0)]


def test_a_scalar_and_its_expansion_are_one_timestep():
    calls = [see(900, "a"), Observation((900.0, 900.0), "b", (1, 16, 8, 8))]
    assert run(Timeline(), calls) == [(0, 0, 0), (0, 0, 1)]


@pytest.mark.parametrize("done", [1, 2, 3])
def test_aborted_generation_is_not_continued(done):
    timeline, first, second = Timeline(), noise(1), noise(2)
    times = (900, 600, 300)
    run(timeline, [see(t, latents=drift(first, noise(8), i / 4)) for i, t in enumerate(times[:done])])
    again = run(timeline, [see(t, latents=drift(second, noise(9), i / 4)) for i, t in enumerate(times)])
    assert again == [(1, 0, 0), (1, 1, 0), (1, 2, 0)]


def test_generation_aborted_in_its_first_step_and_restarted_with_another_prompt():
    timeline = Timeline()
    assert run(timeline, [see(900, "a", noise(1)), see(900, "b", noise(2))]) == [(0, 0, 0), (1, 0, 0)]


def test_late_start_after_a_finished_generation():
    """Image to image begins in the middle of the schedule: above the last timestep of the generation before."""
    calls = [see(t) for t in (900, 600, 300)] + [see(t) for t in (600, 300)]
    assert run(Timeline(), calls) == [(0, 0, 0), (0, 1, 0), (0, 2, 0), (1, 0, 0), (1, 1, 0)]


def test_latents_alone_begin_no_generation_while_time_moves_on():
    calls = [see(t, latents=noise(t)) for t in (900, 600, 300)]
    assert run(Timeline(), calls) == [(0, 0, 0), (0, 1, 0), (0, 2, 0)]


def test_latents_of_each_branch_are_compared_with_their_own():
    """Models that take an image beside the latents get zeros for it in one branch."""
    image = tuple(3 * value for value in noise(5))
    with_image, without = (lambda x: (*x, *image)), (lambda x: (*x, *(0.0,) * SIZE))
    calls = []
    for i, t in enumerate((900, 700, 500)):
        x = drift(noise(1), noise(8), i / 3)
        calls += [see(t, "a", with_image(x)), see(t, "b", without(x))]
    assert run(Timeline(), calls) == [(0, step, branch) for step in range(3) for branch in (0, 1)]


def test_increasing_time_is_learned_when_the_latents_continue():
    timeline, start, end = Timeline(), noise(1), noise(2)
    loop = [see(i / 4, latents=drift(start, end, i / 4)) for i in range(4)]
    assert run(timeline, loop) == [(0, step, 0) for step in range(4)]
    assert run(timeline, loop) == [(1, step, 0) for step in range(4)]


def test_increasing_time_without_latents_costs_one_refresh_once():
    timeline = Timeline()
    loop = [see(t) for t in (0.0, 0.25, 0.5, 0.75)]
    assert run(timeline, loop) == [(0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 2, 0)]
    assert run(timeline, loop) == [(2, step, 0) for step in range(4)]


def test_a_changed_direction_is_learned_after_two_generations_that_began_against_it():
    timeline, start, end = Timeline(), noise(1), noise(2)
    down = [see(900 - 300 * i, latents=drift(start, end, i / 4)) for i in range(3)]
    up = [see(300 * i + 400, latents=drift(end, start, i / 4)) for i in range(4)]
    run(timeline, down)
    assert run(timeline, up) == [(1, 0, 0), (2, 0, 0), (2, 1, 0), (2, 2, 0)]


def test_generations_without_latents_that_stop_after_one_step_do_not_turn_time_round():
    timeline = Timeline()
    run(timeline, [see(t) for t in (900, 600, 300)])
    assert run(timeline, [see(400), see(500), see(600), see(300)]) == [(1, 0, 0), (2, 0, 0), (3, 0, 0), (3, 1, 0)]


def test_two_late_starts_of_one_picture_do_not_turn_time_round():
    timeline, x = Timeline(), noise(1)
    run(timeline, [see(t, latents=x) for t in (900, 600, 300)])
    assert run(timeline, [see(t, latents=x) for t in (500, 700, 400)]) == [(1, 0, 0), (2, 0, 0), (2, 1, 0)]


def test_another_shape_begins_a_generation():
    calls = [see(900), see(600, shape=(1, 16, 16, 8)), see(300, shape=(1, 16, 16, 8))]
    assert run(Timeline(), calls) == [(0, 0, 0), (1, 0, 0), (1, 1, 0)]


def test_one_branch_means_that_every_call_is_a_step():
    calls = [see(900, "a"), see(900, "a"), see(900, "b"), see(600, None), see(900)]
    assert run(Timeline(branches=1), calls) == [(0, 0, 0), (0, 1, 0), (0, 2, 0), (0, 3, 0), (1, 0, 0)]


def test_guidance_that_stops_half_way_keeps_the_step_count():
    calls = [see(900, "a"), see(900, "b"), see(600, "a"), see(600, "b"), see(300, "b"), see(100, "b")]
    for branches in (None, 2):
        assert run(Timeline(branches=branches), calls)[-2:] == [(0, 2, 1), (0, 3, 1)]


def test_guidance_that_starts_half_way_keeps_the_step_count():
    calls = [see(900, "a"), see(600, "a"), see(300, "b"), see(300, "a"), see(100, "b"), see(100, "a")]
    for branches in (None, 2):
        assert run(Timeline(branches=branches), calls)[2:] == [(0, 2, 1), (0, 2, 0), (0, 3, 1), (0, 3, 0)]


def test_second_order_solver_after_guidance_stopped():
    calls = [see(900, "a"), see(900, "b"), see(600, "a"), see(600, "a"), see(300, "a")]
    assert run(Timeline(branches=2), calls) == [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 2, 0), (0, 3, 0)]


def test_second_order_solver_before_guidance_starts():
    x = [drift(noise(1), noise(2), part) for part in (0, 0.2, 0.3, 0.5)]
    calls = [see(900, "a", x[0]), see(600, "a", x[1]), see(600, "a", x[2]), see(300, "a", x[3]), see(300, "b", x[3])]
    assert run(Timeline(branches=2), calls) == [(0, 0, 0), (0, 1, 0), (0, 2, 0), (0, 3, 0), (0, 3, 1)]


def test_texts_of_equal_content_are_told_apart_by_position():
    calls = [see(t, "") for t in (900, 900, 600, 600, 600, 600)]
    assert run(Timeline(branches=2), calls) == [(0, step, branch) for step in range(3) for branch in (0, 1)]


def test_three_branches_two_of_which_share_a_text():
    calls = [see(t, text) for t in (900, 600) for text in ("a", "n", "n")]
    assert run(Timeline(branches=3), calls) == [(0, step, branch) for step in range(2) for branch in range(3)]


def test_no_text_and_two_branches_go_by_position():
    calls = [see(t, None) for t in (900, 900, 600, 600, 600, 600)]
    assert run(Timeline(branches=2), calls) == [(0, step, branch) for step in range(3) for branch in (0, 1)]


def test_no_text_and_a_missing_call_leave_the_rest_of_the_generation_undecided():
    timeline = Timeline(branches=2)
    calls = [see(t, None) for t in (900, 900, 600, 300, 300)]
    assert undecided(timeline, calls) == [False, False, False, True, True]
    assert "1 of 2 calls" in (timeline.advance(see(100, None)).reason or "")
    assert run(timeline, [see(900, None), see(900, None)]) == [(1, 0, 0), (1, 0, 1)]


def test_no_text_is_one_branch_while_timesteps_do_not_repeat():
    assert run(Timeline(), [see(t, None) for t in (900, 600, 300)]) == [(0, 0, 0), (0, 1, 0), (0, 2, 0)]


def test_no_text_and_a_repeated_timestep_are_undecidable():
    timeline = Timeline()
    calls = [see(t, None) for t in (900, 600, 600, 300)]
    assert undecided(timeline, calls) == [False, False, True, True]
    position = timeline.advance(see(100, None))
    assert position.step == 3 and "schedule.branches" in (position.reason or "")
    assert run(timeline, [see(900, None), see(600, None)]) == [(1, 0, 0), (1, 1, 0)]


def test_more_texts_than_branches_are_undecidable():
    timeline = Timeline(branches=2)
    calls = [see(t, text) for t in (900, 600) for text in ("a", "b", "c")]
    assert undecided(timeline, calls) == [False, False, True] * 2
    assert timeline.advance(see(300, "a")).step == 2


def test_a_text_that_changes_at_every_call_stops_opening_branches():
    timeline = Timeline()
    assert undecided(timeline, [see(900 - i, f"text {i}") for i in range(10)]) == [False] * 8 + [True] * 2


def test_pieces_are_counted_when_steps_and_branches_are_given():
    calls = [see(None, None)] * 10
    expected = [(generation, step, branch) for generation in (0, 1) for step in range(3) for branch in (0, 1)]
    assert run(Timeline(steps=3, branches=2), calls) == expected[:10]


@pytest.mark.parametrize("given", [{}, {"steps": 3}, {"branches": 2}])
def test_pieces_are_undecided_without_both_settings(given):
    timeline = Timeline(**given)
    assert undecided(timeline, [see(None, None)] * 4) == [True] * 4
    assert "schedule.steps and schedule.branches" in (timeline.advance(see(None, None)).reason or "")


def test_pieces_in_a_marked_generation_are_counted_on():
    assert run(Timeline(bounded=True), [see(None)] * 4) == [(0, step, 0) for step in range(4)]
    assert run(Timeline(steps=2, branches=2, bounded=True), [see(None)] * 6)[-1] == (0, 2, 1)


def test_pieces_of_another_shape_begin_a_generation():
    calls = [see(None), see(None), see(None, shape=(2, 16, 8, 8))]
    assert run(Timeline(steps=9, branches=1), calls) == [(0, 0, 0), (0, 1, 0), (1, 0, 0)]


def test_each_branch_of_pieces_has_a_shape_of_its_own():
    long, short, other = (1, 24, 8), (1, 20, 8), (1, 40, 8)
    calls = [see(None, None, shape=shape) for shape in (long, short, long, short, other, short)]
    expected = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (1, 0, 0), (1, 0, 1)]
    assert run(Timeline(steps=9, branches=2), calls) == expected


A, B, C, D = ((1, 64 + words, 8) for words in (8, 5, 7, 4))


def pieces(timeline, *shapes):
    return run(timeline, [see(None, None, shape=shape) for shape in shapes])


def test_a_later_branch_of_another_shape_shows_that_a_generation_has_begun():
    """The first was cut short after two steps; of the second, only the other text has another length."""
    timeline = Timeline(steps=3, branches=2)
    assert pieces(timeline, A, B, A, B, A) == [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (0, 2, 0)]
    assert pieces(timeline, C, A, C, A, C) == [(1, 0, 1), (1, 1, 0), (1, 1, 1), (1, 2, 0), (1, 2, 1)]
    assert pieces(timeline, A, C) == [(2, 0, 0), (2, 0, 1)], "it ends where it should"


def test_the_third_of_three_branches_may_show_it():
    timeline = Timeline(steps=2, branches=3)
    assert pieces(timeline, A, A, B, A, A)[-1] == (0, 1, 1)
    assert pieces(timeline, C, A, A, C) == [(1, 0, 2), (1, 1, 0), (1, 1, 1), (1, 1, 2)]
    assert pieces(timeline, A, A, C)[-1] == (2, 0, 2)


def test_a_generation_after_one_that_was_cut_short_within_a_step():
    """Its first call looks like one of a later branch, until an earlier branch has another shape, too."""
    timeline = Timeline(steps=3, branches=2)
    pieces(timeline, A, B, A)
    assert pieces(timeline, C, D) == [(1, 0, 1), (2, 0, 1)]
    assert pieces(timeline, C, D, C, D) == [(2, 1, 0), (2, 1, 1), (2, 2, 0), (2, 2, 1)]
    assert pieces(timeline, C, D) == [(3, 0, 0), (3, 0, 1)]
    timeline = Timeline(steps=2, branches=3)
    pieces(timeline, A, A, B, A)
    assert pieces(timeline, C, C, D) == [(1, 0, 1), (1, 0, 2), (2, 0, 2)]
    assert pieces(timeline, C, C, D, C) == [(2, 1, 0), (2, 1, 1), (2, 1, 2), (3, 0, 0)]


def test_steps_do_not_end_a_generation_that_has_timesteps():
    assert run(Timeline(steps=2), [see(t) for t in (900, 600, 600, 300, 300)])[-1] == (0, 4, 0)


def test_reset_begins_a_generation_at_the_next_call():
    timeline = Timeline()
    run(timeline, [see(900), see(600)])
    timeline.reset()
    assert run(timeline, [see(300), see(100)]) == [(1, 0, 0), (1, 1, 0)]


def test_reset_before_the_first_call_changes_nothing():
    timeline = Timeline()
    timeline.reset()
    assert run(timeline, [see(900)]) == [(0, 0, 0)]


@pytest.mark.parametrize("timestep", [500, None])
def test_a_branch_that_the_caller_names_is_taken_and_ends_the_step_when_it_returns(timestep):
    timeline, calls = Timeline(bounded=True), [1, 0, 1, 0, 0, 1]
    positions = [timeline.advance(see(timestep, "same text"), branch) for branch in calls]
    assert all(position.decided for position in positions)
    assert [(p.step, p.branch) for p in positions] == [(0, 1), (0, 0), (1, 1), (1, 0), (2, 0), (2, 1)]


def test_named_branches_follow_the_timestep():
    timeline = Timeline(branches=2)
    calls = [(900, 0), (900, 1), (600, 1), (300, 0), (300, 1), (900, 0)]
    positions = [timeline.advance(see(t, None), branch) for t, branch in calls]
    assert [(p.generation, p.step) for p in positions] == [(0, 0), (0, 0), (0, 1), (0, 2), (0, 2), (1, 0)]
    assert [p.branch for p in positions] == [branch for _, branch in calls] and all(p.decided for p in positions)


def test_inputs_that_stand_still_are_steps():
    assert run(Timeline(), [see(500, latents=noise(1))] * 3) == [(0, 0, 0), (0, 1, 0), (0, 2, 0)]
    zeros = (0.0,) * SIZE
    assert run(Timeline(), [see(500, latents=zeros)] * 2) == [(0, 0, 0), (0, 1, 0)]


def flagged(timestep, flag, latents, text="prompt"):
    return Observation((float(timestep),), text, (1, 16, 8, 8), latents, rest=lambda: flag)


def test_what_else_a_call_shows_is_read_only_where_all_that_is_read_is_alike():
    def never():
        raise AssertionError

    timeline, start, end = Timeline(), noise(1), noise(2)
    loop = [drift(start, end, i / 8) for i in range(4)]
    calls = [
        Observation((t,), "prompt", None, x, never) for t, x in zip((900.0, 600.0, 600.0, 300.0), loop, strict=True)
    ]
    assert run(timeline, calls) == [(0, step, 0) for step in range(4)]


def test_branches_told_by_a_flag_alone():
    timeline, start, end = Timeline(), noise(1), noise(2)
    calls = []
    for i, t in enumerate((900, 600, 300)):
        x = drift(start, end, i / 4)
        calls += [flagged(t, False, x, "a"), flagged(t, False, x, "b"), flagged(t, True, x, "a")]
    told = [(0, step, branch) for step in range(3) for branch in range(3)]
    assert run(timeline, calls) == told
    assert run(timeline, calls) == [(1, step, branch) for _, step, branch in told]
    assert run(timeline, calls[:3] + calls[5:]) == [
        (2, 0, 0),
        (2, 0, 1),
        (2, 0, 2),
        (2, 1, 2),
        (2, 2, 0),
        (2, 2, 1),
        (2, 2, 2),
    ]


def test_a_sampler_that_adds_noise_at_every_step_is_named_once():
    """Heun's method with churn (Karras et al., arXiv 2206.00364, algorithm 2): up a little, down twice as far."""
    times = [t for sigma in (80, 40, 20, 10, 5, 2) for t in (1.2 * sigma, sigma / 2)]
    calls = [see(t, latents=drift(noise(1), noise(2), i / 16)) for i, t in enumerate(times)]
    remarks = [Timeline.advance(timeline, call).remark for timeline in (Timeline(),) for call in calls]
    assert [i for i, remark in enumerate(remarks) if remark] == [6] and remarks[6] == CHURNING
    timeline = Timeline()  # pictures of two steps
    calls = [see(t, latents=drift(noise(seed), noise(9), i / 2)) for seed in range(6) for i, t in enumerate((900, 450))]
    assert not any(timeline.advance(call).remark for call in calls)


IMAGE, NOTHING = noise(7), (0.0,) * SIZE
BESIDE = {"prompt, image": ("a", IMAGE), "image": ("", IMAGE), "neither": ("", NOTHING)}


def joined(timestep, text, image, latents):
    """An image, or nothing, is joined to the latents."""
    return see(timestep, text, latents + image)


@pytest.mark.parametrize("times", [(900, 600, 300), (900, 600, 600, 300, 300)], ids=["euler", "heun"])
@pytest.mark.parametrize("names", [["prompt, image", "image", "neither"], ["neither", "image"]])
def test_branches_told_by_an_image_joined_to_the_latents(times, names):
    calls = [joined(t, *BESIDE[name], drift(noise(1), noise(2), i / 8)) for i, t in enumerate(times) for name in names]
    told = [(0, step, branch) for step in range(len(times)) for branch in range(len(names))]
    timeline, without = Timeline(), [call for call in calls if call.latents[SIZE:] == IMAGE]
    assert run(timeline, calls) == told
    images = [branch for branch, name in enumerate(names) if "image" in name]
    first, last = calls[: len(names)], without[len(images) :]  # guidance by the image ends
    told = [(1, 0, branch) for branch in range(len(names))]
    assert run(timeline, first + last) == told + [(1, step, b) for step in range(1, len(times)) for b in images]
    assert all(timeline.expect(call) is None for call in calls)


def test_an_image_may_come_first_and_its_branch_later():
    def calls(images, step):
        x = drift(noise(1), noise(2), step / 8)
        return [see((900, 600, 300)[step], "a", image + x) for image in images]

    assert run(Timeline(), calls([IMAGE, NOTHING], 0) + calls([IMAGE, NOTHING], 1)) == [
        (0, step, branch) for step in (0, 1) for branch in (0, 1)
    ]
    late = calls([IMAGE], 0) + calls([IMAGE, NOTHING], 1) + calls([NOTHING, IMAGE], 2)
    assert run(Timeline(), late) == [(0, 0, 0), (0, 1, 0), (0, 1, 1), (0, 2, 1), (0, 2, 0)]


def test_an_image_beside_latents_that_move_is_no_branch():
    loop = [drift(noise(1), noise(2), i / 8) + IMAGE for i in range(5)]
    calls = [see(t, latents=x) for t, x in zip((900, 600, 600, 300, 300), loop, strict=True)]
    assert run(Timeline(), calls) == [(0, step, 0) for step in range(5)]
    opening = [see(900, latents=x) for x in loop[:2]]  # a solver that begins with two calls
    assert run(Timeline(), opening) == [(0, 0, 0), (0, 1, 0)]


def test_flags_that_move_leave_branches_in_their_places_where_their_number_is_given():
    calls = [
        flagged(t, (t, flag), drift(noise(1), noise(2), t / 1e4)) for t in (900, 600, 300) for flag in (False, True)
    ]
    assert run(Timeline(branches=2), calls) == [(0, step, branch) for step in range(3) for branch in (0, 1)]


def test_what_came_with_earlier_steps_is_not_held():
    timeline, kept = Timeline(), []
    for t in (900, 600, 300):
        flag = lambda: t  # noqa: B023, E731
        kept.append(weakref.ref(flag))
        timeline.advance(Observation((float(t),), f"text {t}", None, noise(1), flag))
        del flag
    gc.collect()
    assert [ref() is None for ref in kept] == [True, True, False]


def test_with_one_branch_flags_are_not_looked_at():
    calls = [flagged(900, flag, noise(1)) for flag in (False, True)]
    assert run(Timeline(branches=1), calls) == [(0, 0, 0), (0, 1, 0)]


def test_a_sample_of_a_batch_that_jumps_back_begins_a_generation():
    calls = [
        Observation(times, "prompt", None) for times in ((900.0, 400.0), (850.0, 350.0), (300.0, 800.0), (250.0, 750.0))
    ]
    assert run(Timeline(), calls) == [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0)]


def test_a_sample_of_a_batch_may_stand_still():
    calls = [Observation(times, "prompt", None) for times in ((900.0, 0.0), (600.0, 0.0), (300.0, 0.0), (0.0, 0.0))]
    assert run(Timeline(), calls) == [(0, 0, 0), (0, 1, 0), (0, 2, 0), (0, 3, 0)]


def test_latents_of_another_picture_are_marked():
    timeline, x = Timeline(), noise(1)
    marks = [
        timeline.advance(see(t, latents=y)).remark == OTHER_PICTURE
        for t, y in ((900, x), (600, x), (500, noise(2)), (400, noise(2)))
    ]
    assert marks == [False, False, True, False]
    assert not timeline.advance(see(900, latents=noise(3))).remark


def test_conditioning_that_moves_is_marked_at_the_third_step():
    remarks = [Timeline().advance(see(900, text)).remark for text in "abc"]
    timeline = Timeline()
    remarks += [timeline.advance(see(t, text)).remark for t, text in ((900, "a"), (600, "b"), (300, "c"), (200, "d"))]
    assert remarks == [None] * 3 + [None, None, MOVING, None]
    timeline, pairs = (
        Timeline(),
        [(t, text) for t, moving in ((900, "a"), (600, "b"), (300, "c")) for text in (moving, "")],
    )
    assert [timeline.advance(see(t, text)).remark for t, text in pairs] == [None] * 4 + [MOVING, None]
    timeline, one = Timeline(), Timeline(branches=1)
    assert not any(timeline.advance(see(t, text)).remark for t in (900, 600, 300) for text in "abc")
    assert not any(one.advance(see(t, text)).remark for t, text in ((900, "a"), (600, "b"), (300, "c")))


@pytest.mark.parametrize("still", [True, False])
def test_texts_that_move_leave_branches_in_their_places_where_their_number_is_given(still):
    times = (900, 600, 600, 300, 300, 100)
    calls = [see(t, "" if still and b else f"{i} {b}") for i, t in enumerate(times) for b in (0, 1)]
    timeline, told = Timeline(branches=2), [(step, branch) for step in range(len(times)) for branch in (0, 1)]
    for generation in range(2):
        assert run(timeline, calls) == [(generation, *place) for place in told]
    assert not undecided(timeline, calls[:5])[-1]
    assert undecided(timeline, [see(500, "10 0"), see(500, "10 1")]) == [True, True], "a step lacked a call"
    late = [see(900, "c0"), see(600, "c1"), see(300, "c2"), see(300, "u")]  # guidance begins after the first step
    assert undecided(Timeline(branches=2), late) == [False, False, True, True]
    assert any(undecided(Timeline(branches=2), [see(900, text) for text in "abc"])), "more texts than branches at first"


def test_shapes_that_take_turns_are_marked():
    timeline, small = Timeline(), (1, 16, 4, 4)
    shapes = [(900, None), (600, None), (600, small), (300, None), (300, small), (900, None), (900, small)]
    remarks = [timeline.advance(see(t, shape=shape)).remark for t, shape in shapes]
    assert remarks == [None, None, ALTERNATING, None, None, None, None]


def test_shapes_that_change_on_the_way_are_marked():
    """Guidance in an interval of steps, as a batch of two."""
    timeline, double = Timeline(), (2, 16, 8, 8)
    shapes = [
        (900, None),
        (800, None),
        (700, double),
        (600, double),
        (500, None),
        (900, None),
        (800, None),
        (900, double),
    ]
    remarks = [timeline.advance(see(t, shape=shape)).remark for t, shape in shapes]
    assert remarks == [None, None, RESHAPED, None, RESHAPED, None, None, None]


@st.composite
def generations(draw):
    """Calls with their true (generation, step, branch), and the branches to declare."""
    count = draw(st.integers(1, 4))
    texts = draw(st.integers(1, 3))
    rising, second_order = draw(st.booleans()), draw(st.booleans())
    calls, truth, reached = [], [], 1.0
    for generation in range(count):
        steps = draw(st.integers(2, 8))
        start = draw(st.integers(0, steps - 1)) if generation else 0  # img2img starts late
        if start / steps >= reached:  # that it begins shows only where time jumps back
            start = 0
        # A generation that makes known which way time goes is long enough to show it.
        stop = draw(st.integers(start + 1, steps)) if generation else steps
        first_guided, last_guided = sorted((draw(st.integers(start, steps)), draw(st.integers(start, steps))))
        begin, end = noise(2 * generation + 1), noise(2 * generation + 2)
        step = 0
        for index in range(start, stop):
            time = index / steps if rising else 1000 * (1 - index / steps)
            for half in range(2 if second_order and index > start else 1):
                latents = drift(begin, end, (index - start + half / 2) / (4 * steps))
                guided = first_guided <= index < last_guided
                for text in range(texts if guided else 1):
                    calls.append(see(time, f"text {text}", latents))
                    truth.append((generation, step, text))
                step += 1
        reached = (stop - 1) / steps  # share of the way that this generation went
    return calls, truth, draw(st.sampled_from([None, texts])) if texts > 1 else None


@settings(max_examples=150, deadline=None)
@given(generations())
def test_random_schedules_are_reconstructed(case):
    calls, truth, branches = case
    assert run(Timeline(branches=branches), calls) == truth


@settings(max_examples=100, deadline=None)
@given(steps=st.integers(1, 6), branches=st.integers(1, 3), count=st.integers(1, 3))
def test_random_counts_are_reconstructed(steps, branches, count):
    expected = [(g, s, b) for g in range(count) for s in range(steps) for b in range(branches)]
    assert run(Timeline(steps, branches), [see(None, None)] * len(expected)) == expected


_ANY = st.builds(
    see,
    st.one_of(st.none(), st.sampled_from([0.0, 250.0, 500.0, 1000.0])),
    st.sampled_from([None, "a", "b", "c"]),
    st.sampled_from([None, noise(1), noise(2), (math.nan,) * SIZE]),
    st.sampled_from([(1, 2), (2, 2)]),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(_ANY, max_size=30), st.sampled_from([None, 2, 5]), st.sampled_from([None, 1, 2]), st.booleans())
def test_any_calls_give_positions_in_order(calls, steps, branches, bounded):
    timeline, last = Timeline(steps, branches, bounded), None
    for call in calls:
        position = timeline.advance(call)
        if last is None or position.begins:
            assert position.begins and position.step == 0
            assert position.branch == 0 or (call.timestep is None and last is not None)
            assert position.generation == (0 if last is None else last.generation + 1)
        else:
            assert position.generation == last.generation
            assert position.step in (last.step, last.step + 1) or call.timestep is None
        assert position.decided == (position.reason is None)
        last = position


def test_a_timestep_after_a_call_without_one_is_the_next_step():
    """A number that the first graph has for a constant is an input of the next one."""
    calls = [see(None), see(980), see(960)]
    assert run(Timeline(steps=5, branches=1), calls) == [(0, 0, 0), (0, 1, 0), (0, 2, 0)]
