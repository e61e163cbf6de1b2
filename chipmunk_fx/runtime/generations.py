"""What a session remembers: generations, their branches, and the caches of each."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from chipmunk_fx.graph.geometry import Grid
from chipmunk_fx.runtime.known import Known
from chipmunk_fx.runtime.tables import Tables
from chipmunk_fx.schedule.phase import Phase
from chipmunk_fx.schedule.policies import Drift
from chipmunk_fx.schedule.timeline import Timeline

BIRTHS = itertools.count()


@dataclass(frozen=True)
class Fallback:
    """A call, or a branch of one, that ran dense though the schedule had another phase for it."""

    step: int
    branch: int
    reason: str


@dataclass(frozen=True)
class Record:
    """What one call did. `renewed`: a refresh chose new lists of columns."""

    step: int
    branch: int
    phase: Phase
    graph: weakref.ref
    renewed: bool = True


@dataclass
class Branch:
    """Caches of one branch: Parameter -> ordinal -> tensors by slot name."""

    caches: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)
    held: dict[int, tuple[float, int]] = field(
        default_factory=dict
    )  # site index -> (share of columns, bytes of its own)
    last_refresh: int | None = None
    last_computed: int | None = None  # a step whose residual can serve again
    apart: int | None = None  # steps between it and the one computed before
    changes: tuple[torch.Tensor, ...] = ()  # of the residual of each stream between the two, fp32 [1] on the device
    known: Known = Known()  # what was known of masks at that refresh
    sparse_steps: int = 0  # since the last refresh

    def computed(self, step: int) -> None:
        """`step` has left a residual that can serve again."""
        self.apart = None if self.last_computed is None else step - self.last_computed
        self.last_computed = step

    @property
    def drift(self) -> Drift | None:
        """Read from the device: where steps are told by the latents, the host has just waited for what wrote it."""
        if self.last_computed is None or self.apart is None or not self.changes:
            return None
        return Drift(max(float(change) for change in self.changes), self.apart, self.last_computed)

    @property
    def bytes(self) -> int:
        return bytes_of(self.caches)


@dataclass(frozen=True)
class Prepared:
    """The state tensors of one graph and branch, good while every owner is the same Parameter object."""

    owners: tuple[tuple[int, weakref.ref], ...]
    known: Known
    state: list[torch.Tensor]

    def serves(self, values: Sequence[Any], known: Known) -> bool:
        return known is self.known and all(values[index] is owner() for index, owner in self.owners)


@dataclass
class Track:
    """The generations of one key: a timeline, the branches of the one under way, and what its calls did."""

    timeline: Timeline
    branches: dict[int, Branch] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    fallbacks: list[Fallback] = field(default_factory=list)
    tables: dict[Any, Tables] = field(default_factory=dict)
    grids: tuple[Grid, ...] | None = None
    clock: torch.Tensor | None = None
    prepared: dict[Any, Prepared] = field(default_factory=dict)
    last_call: int = 0
    begun: int = 0  # larger for the generation that began later, over all sessions

    def begin(self) -> None:
        """A generation begins: nothing cached is valid, buffers are kept for reuse."""
        self.records, self.fallbacks, self.tables, self.grids, self.prepared = [], [], {}, None, {}
        self.begun = next(BIRTHS)
        for branch in self.branches.values():
            branch.last_refresh = branch.last_computed = branch.apart = None

    @property
    def bytes(self) -> int:
        return sum(b.bytes for b in self.branches.values())


def bytes_of(caches: WeakIdKeyDictionary) -> int:
    """Of caches by Parameter, ordinal and slot name."""
    slots = (tensors for sites in caches.values() for tensors in sites.values())
    return sum(t.numel() * t.element_size() for tensors in slots for t in tensors.values())
