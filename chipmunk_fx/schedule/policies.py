"""Which step is a refresh, which is sparse, which is skipped: pure functions of the step index.

A policy answers `phase(step, history)`, where the history is that of the branch in question. A new schedule is a class
here, whose `over` says when the settings ask for it, and an entry in POLICIES.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from chipmunk_fx.schedule.phase import Phase


@dataclass(frozen=True)
class Drift:
    """What the blocks add, at the last two computed steps of a branch: `last` and `apart` steps before it.

    change: mean |difference| over mean |value at the earlier one|.
    """

    change: float
    apart: int
    last: int


@dataclass(frozen=True)
class History:
    """What one branch has done in this generation.

    last_refresh: the step at which it last filled its caches. last_computed: the last one that left what a skipped step
    can add again. drift: what such steps have shown.
    """

    last_refresh: int | None = None
    last_computed: int | None = None
    drift: Drift | None = None

    def after(self, step: int, phase: Phase) -> History:
        """With `step`, where all that is computed can serve a skipped one."""
        refreshed = step if phase is Phase.REFRESH else self.last_refresh
        return History(refreshed, self.last_computed if phase is Phase.SKIP else step, self.drift)


class ScheduleValues(Protocol):
    """The settings a policy is made from (chipmunk_fx.config.ScheduleConfig)."""

    @property
    def refresh_every(self) -> int: ...
    @property
    def refresh_steps(self) -> tuple[int, ...] | None: ...
    @property
    def dense_steps(self) -> tuple[int, ...] | None: ...
    @property
    def skip_steps(self) -> tuple[int, ...] | None: ...
    @property
    def skip_threshold(self) -> float | None: ...


class Policy(Protocol):
    def phase(self, step: int, history: History) -> Phase: ...


@dataclass(frozen=True)
class Interval:
    """A refresh at steps 0, every, 2 * every, ..."""

    every: int

    def phase(self, step: int, history: History) -> Phase:
        # Not `step % every`: a branch that was not called at its refresh step makes up for it when it is called next.
        last = history.last_refresh
        due = last is None or step // self.every > last // self.every
        return Phase.REFRESH if due else Phase.SPARSE


@dataclass(frozen=True)
class Explicit:
    """A refresh at the listed steps, and at the first step of a branch, which has no cache to start from."""

    steps: tuple[int, ...]

    @staticmethod
    def over(policy: Policy, schedule: ScheduleValues) -> Policy:
        return policy if schedule.refresh_steps is None else Explicit(tuple(schedule.refresh_steps))

    def phase(self, step: int, history: History) -> Phase:
        last = history.last_refresh
        due = last is None or any(last < listed <= step for listed in self.steps)
        return Phase.REFRESH if due else Phase.SPARSE


@dataclass(frozen=True)
class Skipping:
    """`policy`, with the listed steps skipped once the branch has computed a step whose residual can serve again."""

    policy: Policy
    steps: tuple[int, ...]

    @staticmethod
    def over(policy: Policy, schedule: ScheduleValues) -> Policy:
        return Skipping(policy, tuple(schedule.skip_steps)) if schedule.skip_steps else policy

    def phase(self, step: int, history: History) -> Phase:
        if step in self.steps and (history.last_refresh, history.last_computed) != (None, None):
            return Phase.SKIP
        return self.policy.phase(step, history)


@dataclass(frozen=True)
class Whole:
    """`policy`, with the listed steps computed as the model was written: cheaper than refreshes, and no caches come of them."""

    policy: Policy
    steps: tuple[int, ...]

    @staticmethod
    def over(policy: Policy, schedule: ScheduleValues) -> Policy:
        return Whole(policy, tuple(schedule.dense_steps)) if schedule.dense_steps else policy

    def phase(self, step: int, history: History) -> Phase:
        return Phase.DENSE if step in self.steps else self.policy.phase(step, history)


@dataclass(frozen=True)
class Steady:
    """`policy`, skipping while what the blocks add should have moved by less than `threshold`, had it been computed.

    It is taken to go on moving as fast as between the last two computed steps.
    """

    policy: Policy
    threshold: float

    @staticmethod
    def over(policy: Policy, schedule: ScheduleValues) -> Policy:
        return policy if schedule.skip_threshold is None else Steady(policy, schedule.skip_threshold)

    def phase(self, step: int, history: History) -> Phase:
        if (drift := history.drift) is not None:
            expected = drift.change / drift.apart * (step - drift.last)
            if expected < self.threshold:
                return Phase.SKIP
        return self.policy.phase(step, history)


POLICIES = (Explicit, Whole, Steady, Skipping)  # each in place of what those before have made, or around it


def policy_from(schedule: ScheduleValues) -> Policy:
    """The policy of `schedule`: an explicit list wins over `refresh_every`."""
    policy: Policy = Interval(schedule.refresh_every)
    for kind in POLICIES:
        policy = kind.over(policy, schedule)
    return policy


def beyond(steps: int | None, listed: Iterable[int] | None) -> tuple[int, ...]:
    """The listed steps that a generation of `steps` steps never reaches; lists are literal, never rescaled."""
    return () if steps is None else tuple(index for index in listed or () if index >= steps)
