"""Which parts of what a call is conditioned on tell branches apart: those that come again, not those that move with time.

A time embedding or the number of the step, made outside of the model, is conditioning by its form, and new at every step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable

# Timesteps, each with a value never seen before, until a part is taken for a moving one. Guidance that begins late shows a
# new text at one of them, and the other text again.
PROOF = 3

Rename = Callable[[Hashable], Hashable]


class Parts:
    """Follows the texts of one model, tuples of parts. `moving`: places of those that move with time, known from generation
    to generation until one of them comes again or is all that tells two calls apart."""

    def __init__(self) -> None:
        self.moving: frozenset[int] = frozenset()
        self._refuted: set[int] = set()
        self._count = 0  # of parts
        self.begin()

    def begin(self) -> None:
        """A generation begins."""
        self._step = -1
        self._first: dict[tuple[int, Hashable], int] = {}  # the step at which a value of a part was first seen
        self._lasting: set[int] = set()  # parts of which a value came at two timesteps
        self._rounds: deque[list[Hashable]] = deque(maxlen=PROOF)  # texts of the last timesteps
        self._last: dict[Hashable, Hashable] = {}  # the last text that was told by so much of it

    def told_by(self, text: Hashable) -> Hashable:
        """The text without its moving parts."""
        if not self.moving or not isinstance(text, tuple) or len(text) != self._count:
            return text
        return tuple(None if place in self.moving else part for place, part in enumerate(text))

    def note(self, text: Hashable, moved: bool) -> Rename | None:
        """Take a call's text, the first at its timestep where `moved`. What `told_by` gave for the texts of the generation
        is to be renamed by what is returned, if anything is."""
        if not isinstance(text, tuple):
            return None
        if len(text) != self._count:  # of another graph: what is known is of other inputs
            rename = self._settle(frozenset())
            self._count = len(text)
            self._refuted.clear()
            self.begin()
        else:
            rename = None
        if moved or not self._rounds:
            self._step += 1
            self._rounds.append([])
        again = self._again(text)
        self._rounds[-1].append(text)
        if refuted := self.moving and (self.moving & again or self._alone(text)):
            self._refuted |= refuted
            rename = self._settle(self.moving - refuted)
        elif moved and not self.moving and (found := self._found(text)):
            rename = self._settle(found)
        self._last[self.told_by(text)] = text
        return rename

    def _again(self, text: tuple[Hashable, ...]) -> set[int]:
        """Places of parts that were the same at an earlier timestep; remembers them all."""
        steps = [self._first.setdefault(seen, self._step) for seen in enumerate(text)]
        again = {place for place, step in enumerate(steps) if step < self._step}
        self._lasting |= again
        return again

    def _alone(self, text: tuple[Hashable, ...]) -> frozenset[int]:
        """The moving parts where nothing else tells the text from another one at this timestep."""
        alike = (other for other in self._rounds[-1] if self.told_by(other) == self.told_by(text))
        return self.moving if any(other != text for other in alike) else frozenset()

    def _found(self, text: tuple[Hashable, ...]) -> frozenset[int]:
        """Places of moving parts, where others come again and tell apart all calls of the last timesteps."""
        if self._step < PROOF - 1 or not self._lasting:
            return frozenset()
        found = frozenset(range(len(text))) - self._lasting - self._refuted
        rest = [{_without(found, other) for other in texts} for texts in self._rounds]
        whole = all(len(some) == len(set(texts)) for some, texts in zip(rest, self._rounds, strict=True))
        return found if whole else frozenset()

    def _settle(self, moving: frozenset[int]) -> Rename | None:
        if moving == self.moving:
            return None
        last, self._last, self.moving = self._last, {}, moving
        return lambda told: self.told_by(last.get(told, told))


def _without(places: frozenset[int], text: Hashable) -> Hashable:
    assert isinstance(text, tuple)
    return tuple(part for place, part in enumerate(text) if place not in places)
