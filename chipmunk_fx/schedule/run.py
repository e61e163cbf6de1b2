"""What a call of the model shows of itself, and what is known of the generation under way."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace

# Latents of two calls that follow each other lie near each other: their relative distance is 0.35 after the first of
# four steps of a flow model, 0.7 after the first of two, 0 between branches. Independent noise has sqrt(2) = 1.41. With
# 64 values or more in a sample, chance does not carry either across 1. (Samplers that draw new noise at every one of
# very few steps do cross it.)
UNRELATED = 1.0
# Of an image joined to the latents, beside noise that is an eighth of them or more; an image for nothing, or for another.
_BESIDE, _ANOTHER = 7 / 8, 0.5


@dataclass(frozen=True)
class Observation:
    """What one call shows: its inputs on the host.

    timestep: one number a sample of the batch, or None where the graph has no such input. text: anything equal for
    equal text content and different otherwise, None without text. shape: of the latents. latents: some values of the
    latents (64 or more, spread over the tensor), None where they are not known. rest: reads what else there is (masks, flags),
    as text is told, only where that is needed.
    """

    timestep: tuple[float, ...] | None = None
    text: Hashable | None = None
    shape: Hashable = None
    latents: tuple[float, ...] | None = None
    rest: Callable[[], Hashable] | None = None


@dataclass
class Run:
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
    before: dict[Hashable, tuple[float, ...]] = field(default_factory=dict)  # and those of the step before
    rests: dict[Hashable, Callable[[], Hashable]] = field(default_factory=dict)  # and what else, in the step under way
    by_rest: bool = False  # whether that belongs to the text, since it tells branches apart
    apart: tuple[int, ...] = ()  # the values of the latents that do: of an image that stands beside the noise
    torn: str | None = None  # why the rest of the generation is undecidable
    complete: bool = True  # every step so far had a call of each branch, where their number is given
    by_place: bool = False  # branches are told by that alone, since texts move from step to step
    renewed: tuple[int, ...] = ()  # steps after the first that had a text of their own
    surprised: bool = False  # a call was not what was expected

    def copy(self) -> Run:
        own = {
            name: copy.copy(getattr(self, name)) for name in ("shapes", "keys", "round", "samples", "before", "rests")
        }
        return replace(self, **own)

    def is_over(self, text: Hashable, branches: int | None) -> bool:
        """Whether the step under way has had all of its calls, if the next one has this text."""
        earlier = self.round[text]
        if branches is None:
            return earlier > 0
        return self.round.total() >= branches or (text is not None and (text, earlier) not in self.keys)

    def next_timestep(self, branches: int | None) -> None:
        self.complete &= branches is None or self.round.total() >= branches
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
        self.before = dict(self.samples)
        self.round.clear()
        self.rests.clear()

    def differs(self, seen: Observation) -> bool:
        """Whether all that tells the call from one of this step is what else it shows: branches share their latents, the calls
        of a solver do not."""
        if seen.rest is None or not self._comes_again(seen):
            return False
        earlier = self.rests.get(seen.text)
        alike = seen.latents is not None and seen.latents == self.samples.get(seen.text)
        return alike and earlier is not None and earlier() != seen.rest()

    def _comes_again(self, seen: Observation) -> bool:
        """Whether the step under way has had a call with this text at this timestep."""
        return self.round[seen.text] > 0 and collapsed(seen.timestep or ()) == self.timestep

    def tell_by_rest(self) -> None:
        """From now on, what else a call shows belongs to its text; so for the calls that were."""
        self.by_rest = True
        self._rename({text: (text, read()) for text, read in self.rests.items()})

    def _rename(self, known: Mapping[Hashable, Hashable]) -> None:
        self.keys = {(known.get(text, text), place): number for (text, place), number in self.keys.items()}
        self.round = Counter({known.get(text, text): calls for text, calls in self.round.items()})
        self.samples = {known.get(text, text): sample for text, sample in self.samples.items()}
        self.rests = {known.get(text, text): read for text, read in self.rests.items()}

    def stands_beside(self, seen: Observation) -> tuple[int, ...]:
        """The values of the latents in which the call differs from the last one with its text in this step, if those are of an
        image that stands beside the noise: branches share the noise, a solver's calls at most the image.

        What is noise has changed since the step before; in the first step another image is told by being no little moved.
        """
        earlier, now = self.samples.get(seen.text), seen.latents
        if self.apart or not self._comes_again(seen) or not earlier or not now or len(earlier) != len(now):
            return ()
        apart = tuple(i for i, (a, b) in enumerate(zip(earlier, now, strict=True)) if a != b)
        if not apart or len(apart) > _BESIDE * len(now):
            return ()
        if before := self.before.get(seen.text):
            noise = {i for i, (a, b) in enumerate(zip(before, earlier, strict=False)) if a != b}
            return apart if noise.isdisjoint(apart) else ()
        moved = _distance(*(tuple(sample[i] for i in apart) for sample in (earlier, now)))
        return apart if self.opening and moved > _ANOTHER else ()

    def tell_by_latents(self, apart: tuple[int, ...]) -> None:
        """From now on, these values belong to a call's text; so for the calls that were."""
        self.apart = apart
        self._rename({text: (text, tuple(sample[i] for i in apart)) for text, sample in self.samples.items()})

    def tell_by_place(self, branches: int) -> None:
        """From now on, calls of a step are its branches in turn."""
        self.by_place = True
        self.keys = {(None, place): place for place in range(branches)}
        self.round = Counter({None: self.round.total()})

    def related(self, seen: Observation) -> bool | None:
        """Whether the latents go on from the last call, or from the last one with this text; None where not known."""
        if seen.latents is None or self.latents is None:
            return None
        earlier = (self.latents, self.samples.get(seen.text, self.latents))
        now, *before = (_without(self.apart, sample) for sample in (seen.latents, *earlier))
        return not all(_distance(now, sample) > UNRELATED for sample in before)

    def remember(self, seen: Observation) -> None:
        self.calls += 1
        self.latents = seen.latents
        if seen.latents is not None:
            self.samples[seen.text] = seen.latents
        if seen.rest is not None and not self.by_rest:
            self.rests[seen.text] = seen.rest


def _without(apart: tuple[int, ...], sample: tuple[float, ...]) -> tuple[float, ...]:
    beside = set(apart)
    return tuple(value for i, value in enumerate(sample) if i not in beside) if beside else sample


def _distance(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """||a - b|| / max(||a||, ||b||); samples of different size belong to different generations."""
    if len(a) != len(b):
        return math.inf
    size = max(math.hypot(*a), math.hypot(*b))
    return math.dist(a, b) / size if size else 0.0


def collapsed(timestep: tuple[float, ...]) -> tuple[float, ...]:
    """One number where all samples of the batch share it: a scalar and its expansion are the same timestep."""
    return timestep[:1] if len(set(timestep)) == 1 else timestep
