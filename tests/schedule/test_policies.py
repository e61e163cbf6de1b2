from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chipmunk_fx.schedule import (
    Explicit,
    History,
    Interval,
    Phase,
    Skipping,
    Steady,
    Whole,
    beyond,
    policies,
    policy_from,
)
from chipmunk_fx.schedule.policies import POLICIES, Policy, ScheduleValues


@dataclass(frozen=True)
class Values:
    refresh_every: int = 10
    refresh_steps: tuple[int, ...] | None = None
    dense_steps: tuple[int, ...] | None = None
    skip_steps: tuple[int, ...] | None = None
    skip_threshold: float | None = None


def phases(policy, steps):
    """The phases of a branch that is called at `steps`."""
    found, last = [], None
    for step in steps:
        phase = policy.phase(step, History(last))
        found.append(str(phase))
        last = step if phase is Phase.REFRESH else last
    return found


def refreshes(policy, steps):
    return [step for step, phase in zip(steps, phases(policy, steps), strict=True) if phase == "refresh"]


def test_phase_names_are_those_of_the_report():
    assert [str(phase) for phase in Phase] == ["dense", "refresh", "sparse", "skip"]


def test_interval_refreshes_at_its_multiples():
    assert refreshes(Interval(10), range(35)) == [0, 10, 20, 30]
    assert phases(Interval(1), range(3)) == ["refresh"] * 3


def test_explicit_list_is_literal():
    assert refreshes(Explicit((0, 1, 10, 40)), range(50)) == [0, 1, 10, 40]


def test_first_step_is_a_refresh_even_if_the_list_starts_later():
    assert refreshes(Explicit((5,)), range(8)) == [0, 5]
    assert refreshes(Explicit(()), range(8)) == [0]


def test_a_branch_that_missed_its_refresh_catches_up():
    assert refreshes(Interval(10), [0, 1, 9, 12, 13]) == [0, 12]
    assert refreshes(Explicit((0, 10, 40)), [0, 8, 41, 42]) == [0, 41]


def test_a_branch_that_starts_late_begins_with_a_refresh():
    assert phases(Interval(10), [13, 14]) == ["refresh", "sparse"]


def test_skip_needs_an_earlier_computed_step():
    policy = Skipping(Interval(10), (0, 1, 4))
    assert phases(policy, range(6)) == ["refresh", "skip", "sparse", "sparse", "skip", "sparse"]
    assert phases(policy, [4, 5]) == ["refresh", "sparse"]


def test_a_skipped_refresh_is_made_up_for():
    assert phases(Skipping(Interval(3), (3, 4)), range(7)) == [
        "refresh",
        "sparse",
        "sparse",
        "skip",
        "skip",
        "refresh",
        "refresh",
    ]


def test_policy_from_prefers_the_list():
    assert policy_from(Values()) == Interval(10)
    assert policy_from(Values(refresh_steps=(0, 3))) == Explicit((0, 3))
    assert policy_from(Values(skip_steps=(2,))) == Skipping(Interval(10), (2,))
    assert policy_from(Values(skip_steps=())) == Interval(10)
    assert set(POLICIES) == {Explicit, Whole, Steady, Skipping}


def test_an_entry_counts(monkeypatch: pytest.MonkeyPatch):
    class Never(Whole):
        @staticmethod
        def over(policy: Policy, schedule: ScheduleValues) -> Policy:
            return Never(policy, ())

    monkeypatch.setattr(policies, "POLICIES", (*POLICIES, Never))
    assert policy_from(Values(refresh_steps=(0, 3))) == Never(Explicit((0, 3)), ())


def test_dense_steps_come_before_and_between():
    policy = policy_from(Values(dense_steps=(0, 1, 4)))
    assert policy == Whole(Interval(10), (0, 1, 4))
    assert phases(policy, range(6)) == ["dense", "dense", "refresh", "sparse", "dense", "sparse"]
    # a refresh that falls on one is made up for; a dense step leaves what a skipped one adds again
    assert phases(Whole(Interval(2), (2,)), range(4)) == ["refresh", "sparse", "dense", "refresh"]
    skipping = policy_from(Values(dense_steps=(0,), skip_steps=(1,)))
    assert skipping.phase(1, History()) is Phase.REFRESH
    assert skipping.phase(1, History(last_computed=0)) is Phase.SKIP


def test_policies_are_values():
    assert hash(policy_from(Values(skip_steps=(2,)))) == hash(Skipping(Interval(10), (2,)))


def test_beyond_names_the_steps_never_reached():
    assert beyond(40, (0, 10, 40, 45)) == (40, 45)
    assert beyond(50, (0, 10, 40)) == ()
    assert beyond(None, (1000,)) == ()
    assert beyond(40, None) == ()


@given(
    every=st.integers(1, 12),
    listed=st.sets(st.integers(0, 60)),
    skipped=st.sets(st.integers(0, 60)),
    called=st.sets(st.integers(0, 60), min_size=1),
)
def test_sparse_never_runs_past_a_listed_refresh(every, listed, skipped, called):
    multiples = range(0, 61, every)
    for policy, due in ((Interval(every), multiples), (Explicit(tuple(sorted(listed))), sorted(listed))):
        last = None
        for step in sorted(called):
            phase = Skipping(policy, tuple(sorted(skipped))).phase(step, History(last))
            assert phase is not Phase.DENSE
            if last is None:
                assert phase is Phase.REFRESH
            elif phase is Phase.SPARSE:
                assert not any(last < index <= step for index in due)
            elif phase is Phase.SKIP:
                assert step in skipped
            last = step if phase is Phase.REFRESH else last
