"""Which generation, step and branch a call of the model belongs to, told from its inputs alone.

A generation is one picture: a loop over timesteps. A step is one evaluation of every branch of guidance (conditional,
unconditional, ...). Where the inputs leave a doubt that could end in the use of another call's cache, the call begins
a generation or is left undecided: both cost a dense pass, neither gives a wrong picture.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable
from dataclasses import dataclass, field, replace

from chipmunk_fx.schedule.run import Observation, Run, collapsed

# Guidance calls a model two to four times a step. A text that never comes twice would open a branch, with caches of its
# own, at every call.
MOST_BRANCHES = 8

DOWN = -1

OTHER_PICTURE = (
    "latents bear no resemblance to those of the call before, though the timestep goes on: taken for the same picture. Where "
    "pictures, tiles or windows take turns, call each inside chipmunk_fx.generation(model, key=...); after one that was broken "
    "off, call chipmunk_fx.reset(model). Where a sampler draws new noise at every step, sparse steps have little to build on"
)
ALTERNATING = (
    "latents of another shape at the timestep of the call before: calls of either shape begin a generation, and none of them is "
    "sparse. Call those of one shape inside chipmunk_fx.generation(model, key=...) of their own"
)
RESHAPED = (
    "latents of another shape while the timestep goes on: a generation begins with them, with caches of its own, and its steps "
    "count from 0 again (for schedule.dense_steps and other lists of steps). Where guidance makes the batch larger in some of "
    "the steps, call its branches one by one, or make all steps with the same batch"
)
MOVING = (
    "every step so far has had a text or condition of its own, and caches of its own for it, made anew: if that is one picture "
    "whose conditioning moves from step to step, give schedule.branches (1 without guidance)"
)
CHURNING = (
    "the timestep goes back after every step or two while the latents go on: each time a generation begins, whose first step "
    "refreshes all caches. If that is one picture, its sampler adds noise as it goes: without that (s_churn=0) steps are sparse"
)
_CHURNED = 3  # generations of two steps at most in a row, the latents of one going on from those of the one before


@dataclass(frozen=True)
class Position:
    """Where a call lies. `step` and `branch` count from 0 within `generation`; `begins` marks the first call of one, or the
    first that shows it.

    `decided` is False where the inputs do not tell, for the `reason` given: such a call has to be dense, and its step
    and branch are a guess for the report. `remark`: what the caller should hear.
    """

    generation: int
    step: int
    branch: int
    begins: bool
    decided: bool
    reason: str | None = None
    remark: str | None = field(default=None, compare=False)


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
        self._run: Run | None = None
        self._direction = DOWN  # most models count their timesteps down
        self._learned = False  # a generation has confirmed the direction
        self._contradictions = 0  # generations in a row that began with a move against the direction
        self._longest = 0  # steps of a generation that is over
        self._cut = 0  # generations in a row that were short and ended with latents that go on

    @property
    def infers(self) -> bool:
        """Whether branches are told from all that calls show; where their number is given, their places tell."""
        return self._branches is None

    def reset(self) -> None:
        self._end()
        self._contradictions = 0

    def expect(self, told: Observation, branch: int | None = None) -> Position | None:
        """Where the next call lies if it goes on with the generation; None where that is no more than a guess.

        told: what is known of the call, latents not among it, and its timestep only if need be.
        """
        run, bound = self._run, self._steps or self._longest
        if run is None or run.opening or run.surprised or run.timestep is None or run.apart:
            return None
        if told.timestep is None:
            if branch is None:
                moves = run.is_over(self._told_apart(run, told).text, self._branches)
            else:
                moves = run.is_over(("branch", branch), None)
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
            seen = replace(seen, text=("branch", branch), rest=None)
        run, plain, begins, remark = self._run, seen, True, None
        if run is not None:
            seen = self._told_apart(run, seen)
            related = run.related(seen)
            begins = self._restarts(run, seen, related)
            if begins:
                self._cut = self._cut + 1 if related and run.step < 2 else 0
            remark = CHURNING if begins and self._cut == _CHURNED else self._remark(run, seen, related, begins)
        if run is None or begins:
            seen = plain
            self._end()
            self._generation += 1
            run = self._run = self._anew(run, seen)
            self._continues(run, seen)
        timestep, renewed = collapsed(seen.timestep or ()), run.renewed
        if branch is not None:
            self._place(run, seen, timestep, None)
            reason = None
        elif seen.timestep is None:
            branch, reason = self._count(run)
        else:
            branch, reason = self._place(run, seen, timestep, self._branches)
        run.remember(seen)
        if run.renewed == (1, 2) != renewed:
            remark = MOVING
        return Position(self._generation, run.step, branch, begins, reason is None, reason, remark)

    def _told_apart(self, run: Run, seen: Observation) -> Observation:
        """With all that it shows for its text, where branches are told apart by that: guidance by an image that is joined to the
        latents, by a mask or by a flag."""
        if not self.infers:
            return replace(seen, text=None if run.by_place else seen.text, rest=None)
        if apart := run.stands_beside(seen):
            run.tell_by_latents(apart)
        if run.apart and seen.latents is not None:
            seen = replace(seen, text=(seen.text, tuple(seen.latents[i] for i in run.apart)))
        if seen.rest is None:
            return seen
        if not run.by_rest and run.differs(seen):
            run.tell_by_rest()
        return replace(seen, text=(seen.text, seen.rest())) if run.by_rest else seen

    def _end(self) -> None:
        """The generation under way is over."""
        if self._run is not None:
            self._longest, self._run = max(self._longest, self._run.step + 1), None

    def _restarts(self, run: Run, seen: Observation, related: bool | None) -> bool:
        """Whether the call begins a generation although `run` is under way, to whose latents its own are `related`."""
        if not self._continues(run, seen):
            self._contradictions = 0
            return True
        if seen.timestep is None or run.timestep is None:
            ended = self._steps is not None and run.calls >= self._steps * (self._branches or 1)
            return ended and not self._bounded
        timestep = collapsed(seen.timestep)
        if timestep == run.timestep:
            # Only here can latents decide: a generation that ended after its first step looks like a solver's second call.
            return run.opening and related is False
        return self._turns_back(run, timestep, related)

    def _continues(self, run: Run, seen: Observation) -> bool:
        """Whether the shape is that of the calls before. Where calls are counted it is the whole sequence's, and each branch
        has its own: texts of guidance differ in length."""
        branch = None if seen.timestep is not None else seen.text or run.calls % (self._branches or 1)
        return run.shapes.setdefault(branch, seen.shape) == seen.shape

    def _anew(self, over: Run | None, seen: Observation) -> Run:
        """The generation that begins where `over` ends. Of counted calls, one of a later branch may be the first to have
        another shape: those before it have gone on with the generation that was over, and are counted to the new one.
        """
        if over is None or over.timestep is not None or seen.timestep is not None or seen.text is not None:
            return Run()
        branches = self._branches or 1
        first, calls = 0, over.calls % branches
        if over.late and over.calls - over.late < branches:
            # Now an earlier branch has another shape, too: the generation before had ended within a step, and `over` had
            # begun with its first branch.
            first, calls = over.late, over.calls - over.late
        passed = [(branch, over.shapes.get((first + branch) % branches)) for branch in range(calls)]
        shapes: dict[Hashable, Hashable] = {branch: shape for branch, shape in passed if shape is not None}
        return Run(shapes, calls=calls, late=0 if first else calls)

    def _turns_back(self, run: Run, timestep: tuple[float, ...], related: bool | None) -> bool:
        """Whether the timestep moves against the direction of time, which is learned on the way."""
        moves = _moves(run.timestep or timestep, timestep)
        if not moves:
            return False
        if moves == {self._direction}:
            self._learned, self._contradictions = True, 0
            return False
        if len(moves) > 1:  # some samples of the batch are new pictures
            return True
        (move,) = moves
        # The first move of a generation may turn the direction round: at once if none was learned and the latents go
        # on, else after so many generations in a row that began against it; never on timesteps alone once learned.
        doubts = 2 * self._learned + (related is not True)
        if run.opening and doubts < 3 and self._contradictions >= doubts:
            self._direction, self._learned, self._contradictions = move, True, 0
            return False
        self._contradictions += 1
        return True

    def _remark(self, run: Run, seen: Observation, related: bool | None, begins: bool) -> str | None:
        """What is odd about a call after those of `run`."""
        if not begins:
            return OTHER_PICTURE if related is False else None
        if run.opening or not run.timestep or seen.timestep is None or seen.shape in run.shapes.values():
            return None
        moves = _moves(run.timestep, collapsed(seen.timestep))
        return ALTERNATING if not moves else RESHAPED if moves == {self._direction} else None

    def _count(self, run: Run) -> tuple[int, str | None]:
        """Branch by position where there is no timestep: needs both settings, or generations that the caller marks."""
        run.step, branch = divmod(run.calls, self._branches or 1)
        if self._bounded or (self._steps and self._branches):
            return branch, None
        return branch, (
            "the graph has no timestep input, so calls can only be counted: give schedule.steps and schedule.branches, "
            "or call inside chipmunk_fx.generation"
        )

    def _place(
        self, run: Run, seen: Observation, timestep: tuple[float, ...], branches: int | None
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
        if branches is not None and _moves_on(run, seen, branches):
            run.tell_by_place(branches)
        text = None if run.by_place else seen.text
        key = (text, run.round[text])
        run.round[text] += 1
        if run.step and key not in run.keys and run.renewed[-1:] != (run.step,):
            run.renewed = (*run.renewed, run.step)
        number = run.keys.setdefault(key, len(run.keys))
        if branches is None and seen.text is None and key[1] > 0:
            run.torn = run.torn or (
                f"timestep {_mean(timestep):g} came twice and no text input tells the next step of a solver from "
                "another branch of guidance: give schedule.branches (1 if every call is a step)"
            )
        return number, run.torn or _too_many(number, branches)


def _repeats(run: Run, seen: Observation, branches: int | None) -> bool:
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


def _moves_on(run: Run, seen: Observation, branches: int) -> bool:
    """Whether the texts of a generation, whose steps have had all of their calls so far, turn out to move from step to step."""
    known = (seen.text, run.round[seen.text]) in run.keys
    return run.complete and not (known or run.opening or run.torn or run.by_place) and len(run.keys) == branches


def _too_many(number: int, branches: int | None) -> str | None:
    if branches is not None and number >= branches:
        return f"more different texts in one generation than schedule.branches = {branches}"
    if number >= MOST_BRANCHES:
        return f"more than {MOST_BRANCHES} different texts in one generation: give schedule.branches"
    return None


def _mean(timestep: tuple[float, ...]) -> float:
    return sum(timestep) / len(timestep) if timestep else 0.0


def _moves(before: tuple[float, ...], now: tuple[float, ...]) -> set[int]:
    """The directions in which samples' timesteps go, -1 and 1; of batches that cannot be compared, their mean's."""
    size = max(len(before), len(now))
    before, now = (t * size if len(t) == 1 else t for t in (before, now))
    if len(before) != len(now):
        before, now = (_mean(before),), (_mean(now),)
    return {_sign(b - a) for a, b in zip(before, now, strict=True)} - {0}


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)
