"""Texts of several parts, of which some are new at every step: a time embedding or a step's number made outside the model."""

import pytest

from chipmunk_fx.schedule import Observation, Timeline

TIMES = (900, 700, 500, 300, 100)
SEEN = [(0, 0), (0, 1)], [(1, 2), (1, 3)]  # the first step opens branches, and so does the second


def positions(timeline, texts, times=TIMES):
    """(step, branch) of calls with `texts(step)` at each step, None for those that are undecided."""
    calls = [Observation((float(t),), text, (1, 4)) for step, t in enumerate(times) for text in texts(step)]
    return [(p.step, p.branch) if p.decided else None for p in map(timeline.advance, calls)]


def steps(*branches, begin=0):
    return [(step, branch) for step in range(begin, len(TIMES)) for branch in branches]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_a_part_that_is_new_at_every_step_tells_no_branches(order):
    def texts(step):
        return [tuple((words, "picture", step)[place] for place in order) for words in ("a", "b")]

    timeline = Timeline()
    assert positions(timeline, texts) == [*SEEN[0], *SEEN[1], *steps(0, 1, begin=2)]
    assert positions(timeline, texts) == steps(0, 1), "it is known from then on"


def test_of_two_branches_no_more_are_opened():
    timeline = Timeline(branches=2)
    texts = lambda step: [("a", step), ("b", step)]  # noqa: E731
    assert positions(timeline, texts) == [*SEEN[0], None, None, *steps(0, 1, begin=2)]
    assert positions(timeline, texts) == steps(0, 1)


def test_each_branch_may_have_a_moving_part_of_its_own():
    timeline = Timeline()
    positions(timeline, lambda step: [("a", step, -step), ("b", step + 100, -step - 100)])
    assert positions(timeline, lambda step: [("a", step, -step), ("b", step + 100, -step - 100)]) == steps(0, 1)


def test_a_solver_of_second_order_with_a_time_made_outside():
    timeline = Timeline()
    times = (900, 700, 700, 500, 500, 300, 300)
    texts = lambda step: [("a", times[step]), ("b", times[step])]  # noqa: E731
    positions(timeline, texts, times)
    assert positions(timeline, texts, times) == [(step, branch) for step in range(7) for branch in (0, 1)]


def test_branches_that_go_on_as_others_are_over():
    timeline = Timeline()
    calls = [Observation((float(t),), (words, t), (1, 4)) for t in TIMES for words in ("a", "b")]
    assert [timeline.advance(call).over for call in calls] == [(), (), (), (), (2, 3), *[()] * 5]


@pytest.mark.parametrize(
    "texts",
    [
        lambda step: [f"text {step}"],
        lambda step: [(f"text {step}",)],
        lambda step: [(f"text {step}", step)],
        lambda step: [("picture", f"text {step}"), ("picture", f"other {step}")],
    ],
)
def test_what_alone_tells_calls_apart_goes_on_telling(texts):
    """Too many texts are undecided, which no other call's caches can come of."""
    each = len(texts(0))
    told = positions(Timeline(), texts, range(1000, 0, -100))
    assert told[:8] == [(i // each, i) for i in range(8)] and set(told[8:]) == {None}


def test_guidance_that_begins_late_is_another_text():
    def texts(step):
        return [("picture", "b"), ("picture", "a")] if step else [("picture", "a")]

    assert positions(Timeline(), texts) == [(0, 0), *steps(1, 0, begin=1)]


def test_a_part_that_moved_tells_branches_again_where_nothing_else_does():
    timeline = Timeline()
    positions(timeline, lambda step: [("picture", step)])
    assert positions(timeline, lambda step: [("picture", "a"), ("picture", "b")]) == steps(0, 1)
    assert positions(timeline, lambda step: [("picture", step)])[2:4] == [(2, 2), (3, 3)], "and is not forgotten again"


def test_a_part_that_comes_again_does_not_move():
    timeline = Timeline()
    positions(timeline, lambda step: [("picture", step)])
    texts = lambda step: [("picture", "ab"[step % 2])]  # noqa: E731
    assert positions(timeline, texts) == [(0, 0), (1, 0), (2, 1), (3, 0), (4, 1)]


def test_texts_of_another_graph_have_other_parts():
    timeline = Timeline()
    positions(timeline, lambda step: [("a", step), ("b", step)])
    other = lambda step: [("picture", "x", "a"), ("picture", "x", "b")]  # noqa: E731
    assert positions(timeline, other) == steps(0, 1)
