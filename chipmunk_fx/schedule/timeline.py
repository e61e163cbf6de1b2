"""Which generation, step and branch a call of the model belongs to, told from its inputs alone.

A generation is one picture: a loop over timesteps. A step is one evaluation of every branch of guidance (conditional,
unconditional, ...). Where the inputs leave a doubt that could end in the use of another call's cache, the call begins
a generation or is left undecided: both cost a dense pass, neither gives a wrong picture.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field, replace

# Latents of two calls that follow each other lie near each other: their relative distance is 0.35 after the first of
# four steps of a flow model, 0.7 after the first of two, 0 between branches. Independent noise has sqrt(2) = 1.41. With
# 64 values or more in a sample, chance does not carry either across 1. (Samplers that draw new noise at every one of
# very few steps do cross it: each of their calls is a refresh.)
UNRELATED = 1.0

# Guidance calls a model two to four times a step. A text that never comes twice would open a branch, with caches of its
# own, at every call.
MOST_BRANCHES = 8

DOWN = -1


@dataclass(frozen=True)
class Observation:
    """What one call shows: its inputs on the host.

    timestep: one number a sample of the batch, or None where the graph has no such input. text: anything equal for
    equal text content and different otherwise, None without text. shape: of the latents. latents: some values of the
    latents (64 or more, spread over the tensor), None where they are not known.
    """

    timestep: tuple[float, ...] | None = None
    text: Hashable | None = None
    shape: Hashable = None
    latents: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Position:
    """Where a call lies. `step` and `branch` count from 0 within `generation`; `begins` marks the first call of one, or the
    first that shows it.

    `decided` is False where the inputs do not tell, for the `reason` given: such a call has to be dense, and its step
    and branch are a guess for the report.
    """

    generation: int
    step: int
    branch: int
    begins: bool
    decided: bool
    reason: str | None = None


class Timeline:
    """Follows the calls of one model: `advance` takes each in turn, after `reset` the next one begins a generation.

    steps, branches: the settings `schedule.steps` and `schedule.branches`, None where they are to be inferred.
    bounded: the caller marks the generations itself, so that calls without a timestep can be counted on for ever.
    """

    def __init__(self, steps: int | None = None, branches: int | None = None, bounded: bool = False) -> None:
        self._steps = steps
        self._branches = branches
        self._bounded = bounded
        self._generation = -1
        self._run: _Run | None = None
        self._direction = DOWN  # most models count their timesteps down
        self._learned = False  # a generation has confirmed the direction
        self._contradictions = 0  # generations in a row that began with a move against the direction
        self._longest = 0  # steps of a generation that is over

    def reset(self) -> None:
        self._end()
        self._contradictions = 0

    def expect(self, told: Observation, branch: int | None = None) -> Position | None:
        """Where the next call lies if it goes on with the generation; None where that is no more than a guess.

        told: what is known of the call, latents not among it, and its timestep only if need be.
        """
        run, bound = self._run, self._steps or self._longest
        if run is None or run.opening or run.surprised or run.timestep is None:
            return None
        if told.timestep is None:
            moves = run.is_over(told.text, self._branches) if branch is None else run.is_over(("branch", branch), None)
            told = replace(told, timestep=(_mean(run.timestep) + self._direction,) if moves else run.timestep)
        ahead = copy.copy(self)
        ahead._run = run.copy()
        position = ahead.advance(replace(told, latents=run.latents), branch)
        over = 0 < bound <= position.step
        return None if over or position.begins or not position.decided else position

    def surprise(self) -> None:
        """A call was not what was expected: nothing more is for the rest of its generation."""
        if self._run is not None:
            self._run.surprised = True

    def advance(self, seen: Observation, branch: int | None = None) -> Position:
        """The position of the next call. `branch` is for callers that name it: a step ends when one comes again."""
        if branch is not None:
            seen = replace(seen, text=("branch", branch))
        run = self._run
        begins = run is None or self._restarts(run, seen)
        if run is None or begins:
            self._end()
            self._generation += 1
            run = self._run = self._anew(run, seen)
            self._continues(run, seen)
        timestep = _collapsed(seen.timestep or ())
        if branch is not None:
            self._place(run, seen, timestep, None)
            reason = None
        elif seen.timestep is None:
            branch, reason = self._count(run)
        else:
            branch, reason = self._place(run, seen, timestep, self._branches)
        run.remember(seen)
        return Position(self._generation, run.step, branch, begins, reason is None, reason)

    def _end(self) -> None:
        """The generation under way is over."""
        if self._run is not None:
            self._longest, self._run = max(self._longest, self._run.step + 1), None

    def _restarts(self, run: _Run, seen: Observation) -> bool:
        """Whether the call begins a generation although `run` is under way."""
        if not self._continues(run, seen):
            self._contradictions = 0
            return True
        if seen.timestep is None or run.timestep is None:
            ended = self._steps is not None and run.calls >= self._steps * (self._branches or 1)
            return ended and not self._bounded
        timestep, related = _collapsed(seen.timestep), run.related(seen)
        if timestep == run.timestep:
            # Only here can latents decide: a generation that ended after its first step looks like a solver's second call.
            return run.opening and related is False
        return self._turns_back(run, timestep, related)

    def _continues(self, run: _Run, seen: Observation) -> bool:
        """Whether the shape is that of the calls before. Where calls are counted it is the whole sequence's, and each branch
        has its own: texts of guidance differ in length."""
        branch = None if seen.timestep is not None else seen.text or run.calls % (self._branches or 1)
        return run.shapes.setdefault(branch, seen.shape) == seen.shape

    def _anew(self, over: _Run | None, seen: Observation) -> _Run:
        """The generation that begins where `over` ends. Of counted calls, one of a later branch may be the first to have
        another shape: those before it have gone on with the generation that was over, and are counted to the new one.
        """
        if over is None or over.timestep is not None or seen.timestep is not None or seen.text is not None:
            return _Run()
        branches = self._branches or 1
        first, calls = 0, over.calls % branches
        if over.late and over.calls - over.late < branches:
            # Now an earlier branch has another shape, too: the generation before had ended within a step, and `over` had
            # begun with its first branch.
            first, calls = over.late, over.calls - over.late
        passed = [(branch, over.shapes.get((first + branch) % branches)) for branch in range(calls)]
        shapes: dict[Hashable, Hashable] = {branch: shape for branch, shape in passed if shape is not None}
        return _Run(shapes, calls=calls, late=0 if first else calls)

    def _turns_back(self, run: _Run, timestep: tuple[float, ...], related: bool | None) -> bool:
        """Whether the timestep moves against the direction of time, which is learned on the way."""
        move = _sign(_mean(timestep) - _mean(run.timestep or timestep))
        if move == 0:
            return False
        if move == self._direction:
            self._learned, self._contradictions = True, 0
            return False
        # The first move of a generation may turn the direction round: at once if none was learned and the latents go
        # on, else after so many generations in a row that began against it; never on timesteps alone once learned.
        doubts = 2 * self._learned + (related is not True)
        if run.opening and doubts < 3 and self._contradictions >= doubts:
            self._direction, self._learned, self._contradictions = move, True, 0
            return False
        self._contradictions += 1
        return True

    def _count(self, run: _Run) -> tuple[int, str | None]:
        """Branch by position where there is no timestep: needs both settings, or generations that the caller marks."""
        run.step, branch = divmod(run.calls, self._branches or 1)
        if self._bounded or (self._steps and self._branches):
            return branch, None
        return branch, (
            "the graph has no timestep input, so calls can only be counted: give schedule.steps and schedule.branches, "
            "or call inside chipmunk_fx.generation"
        )

    def _place(
        self, run: _Run, seen: Observation, timestep: tuple[float, ...], branches: int | None
    ) -> tuple[int, str | None]:
        """Branch by timestep and text; moves `run.step` on."""
        if timestep != run.timestep:
            if run.calls:  # a call without a timestep had another one: a number that the graph has for a constant
                run.next_timestep(branches)
            run.timestep = timestep
        elif branches == 1 or _repeats(run, seen, branches):
            run.next_step()
        if branches == 1:
            return 0, None
        key = (seen.text, run.round[seen.text])
        run.round[seen.text] += 1
        number = run.keys.setdefault(key, len(run.keys))
        if branches is None and seen.text is None and key[1] > 0:
            run.torn = run.torn or (
                f"timestep {_mean(timestep):g} came twice and no text input tells the next step of a solver from "
                "another branch of guidance: give schedule.branches (1 if every call is a step)"
            )
        return number, run.torn or _too_many(number, branches)


@dataclass
class _Run:
    """The generation under way."""

    shapes: dict[Hashable, Hashable] = field(default_factory=dict)
    timestep: tuple[float, ...] | None = None
    step: int = 0
    calls: int = 0
    late: int = 0  # calls before the one that showed that the generation had begun
    opening: bool = True  # only one timestep so far
    # A branch is a text and how often it came before in the same step; numbered in order of first call.
    keys: dict[tuple[Hashable, int], int] = field(default_factory=dict)
    round: Counter[Hashable] = field(default_factory=Counter)  # calls of the step under way, by text
    latents: tuple[float, ...] | None = None
    samples: dict[Hashable, tuple[float, ...]] = field(default_factory=dict)  # the last latents that came with a text
    torn: str | None = None  # why the rest of the generation is undecidable
    surprised: bool = False  # a call was not what was expected

    def copy(self) -> _Run:
        own = {name: copy.copy(getattr(self, name)) for name in ("shapes", "keys", "round", "samples")}
        return replace(self, **own)

    def is_over(self, text: Hashable, branches: int | None) -> bool:
        """Whether the step under way has had all of its calls, if the next one has this text."""
        earlier = self.round[text]
        if branches is None:
            return earlier > 0
        return self.round.total() >= branches or (text is not None and (text, earlier) not in self.keys)

    def next_timestep(self, branches: int | None) -> None:
        told_by_place = None in self.round or any(place for _, place in self.keys)
        if branches is not None and branches > 1 and told_by_place and self.round.total() < branches:
            # Whether the first or the last branch was left out cannot be seen, now or in the steps to come.
            self.torn = self.torn or (
                f"step {self.step} had {self.round.total()} of {branches} calls, and nothing tells the branches apart"
            )
        self.opening = False
        self.next_step()

    def next_step(self) -> None:
        self.step += 1
        self.round.clear()

    def related(self, seen: Observation) -> bool | None:
        """Whether the latents go on from the last call, or from the last one with this text; None where not known."""
        if seen.latents is None or self.latents is None:
            return None
        earlier = (self.latents, self.samples.get(seen.text, self.latents))
        return not all(_distance(seen.latents, sample) > UNRELATED for sample in earlier)

    def remember(self, seen: Observation) -> None:
        self.calls += 1
        self.latents = seen.latents
        if seen.latents is not None:
            self.samples[seen.text] = seen.latents


def _repeats(run: _Run, seen: Observation, branches: int | None) -> bool:
    """Whether a call at an unchanged timestep is the next step (of a second-order solver), not another branch."""
    earlier = run.round[seen.text]
    if earlier == 0:
        return False
    if branches is None:
        return seen.text is not None
    if run.round.total() >= branches:
        return True
    if (seen.text, earlier) in run.keys or seen.text is None:
        return False
    # The text returns before every branch was called. Either all branches are known by other texts and some are
    # paused, or guidance has not begun: branches share their latents, the calls of a solver do not.
    return len(run.keys) >= branches or (not run.opening and seen.latents != run.latents)


def _too_many(number: int, branches: int | None) -> str | None:
    if branches is not None and number >= branches:
        return f"more different texts in one generation than schedule.branches = {branches}"
    if number >= MOST_BRANCHES:
        return f"more than {MOST_BRANCHES} different texts in one generation: give schedule.branches"
    return None


def _distance(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """||a - b|| / max(||a||, ||b||); samples of different size belong to different generations."""
    if len(a) != len(b):
        return math.inf
    size = max(math.hypot(*a), math.hypot(*b))
    return math.dist(a, b) / size if size else 0.0


def _collapsed(timestep: tuple[float, ...]) -> tuple[float, ...]:
    """One number where all samples of the batch share it: a scalar and its expansion are the same timestep."""
    return timestep[:1] if len(set(timestep)) == 1 else timestep


def _mean(timestep: tuple[float, ...]) -> float:
    return sum(timestep) / len(timestep) if timestep else 0.0


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)
