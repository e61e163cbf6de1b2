"""What a session remembers: generations, their branches, and the caches of each."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from chipmunk_fx.graph.geometry import Grid
from chipmunk_fx.runtime.faults import Faults
from chipmunk_fx.runtime.graphs import Graph, Named
from chipmunk_fx.runtime.known import Known
from chipmunk_fx.runtime.tables import Tables
from chipmunk_fx.schedule.phase import Phase
from chipmunk_fx.schedule.policies import Drift, History
from chipmunk_fx.schedule.timeline import Position, Timeline
from chipmunk_fx.state.health import Health
from chipmunk_fx.state.store import Home

BIRTHS = itertools.count()


@dataclass(frozen=True)
class Fallback:
    """A call that did not do what the schedule had for it: its `phase` was "dense", or "refresh" where a cache was broken."""

    step: int
    branch: int
    reason: str
    phase: Phase = Phase.DENSE


@dataclass(frozen=True)
class Record:
    """What one call did. `renewed`: a refresh chose new lists of columns."""

    step: int
    branch: int
    phase: Phase
    graph: weakref.ref
    renewed: bool = True


@dataclass(frozen=True)
class Made:
    """A call that was made as if it were at `position`: what came of it, or the problem; what its branch had `before` (its last
    refresh, the last step computed); whether lists were renewed, and whether the graph was a rewritten one."""

    position: Position
    graph: Graph
    phase: Phase
    result: Any
    problem: Exception | None
    before: tuple[int | None, int | None]
    renew: bool
    rewritten: bool


@dataclass(frozen=True)
class Held:
    """What a site keeps for one branch: its share of columns, and bytes by slot name of what is its own."""

    share: float
    slots: dict[str, int]


@dataclass
class Branch:
    """Caches of one branch: Parameter -> ordinal -> cell."""

    caches: Home = field(default_factory=Home)
    held: dict[int, Held] = field(default_factory=dict)  # by site index
    last_refresh: int | None = None
    last_computed: int | None = None  # a step whose residual can serve again
    apart: int | None = None  # steps between it and the one computed before
    changes: tuple[torch.Tensor, ...] = ()  # of the residual of each stream between the two, fp32 [1] on the device
    known: Known = Known()  # what was known of masks at that refresh
    filled: frozenset[Named] = frozenset()  # sites that it wrote
    stack: frozenset[Named] = frozenset()  # sites of the graph that left the residual
    sparse_steps: int = 0  # since the last refresh
    health: Health | None = None

    def forget(self) -> None:
        """Nothing cached is valid; buffers are kept for reuse."""
        self.last_refresh = self.last_computed = self.apart = None

    def computed(self, step: int, stack: frozenset[Named]) -> None:
        """`step` has left a residual that can serve again, in graphs with these sites."""
        self.apart = None if self.last_computed is None else step - self.last_computed
        self.last_computed, self.stack = step, stack

    @property
    def damaged(self) -> bool:
        """Whether nan or inf is known to be in its caches."""
        return self.health is not None and self.health.told

    @property
    def history(self) -> History:
        return History(self.last_refresh, self.last_computed, self.drift)

    @property
    def drift(self) -> Drift | None:
        """Read from the device, which is waited for."""
        if self.last_computed is None or self.apart is None or not self.changes:
            return None
        return Drift(max(float(change) for change in self.changes), self.apart, self.last_computed)


@dataclass(frozen=True)
class Prepared:
    """The state tensors of one graph and branch, good while every owner is the same Parameter object."""

    owners: tuple[tuple[int, weakref.ref], ...]
    known: Known
    state: list[torch.Tensor]

    def serves(self, values: Sequence[Any], known: Known) -> bool:
        return known is self.known and all(values[index] is owner() for index, owner in self.owners)


@dataclass
class Clock:
    """`tensor`: what kernels are told of a step, int64 [2] on the device: the step, and whether MLPs choose new neurons (at a
    refresh: store weights, whatever is kept of them). `places`: of these two in it; `told`: what it holds, None where that is
    not known."""

    tensor: torch.Tensor
    places: tuple[torch.Tensor, ...]
    told: tuple[int, int] | None = (0, 0)

    @classmethod
    def on(cls, device: torch.device) -> Clock:
        with torch.inference_mode(False):
            tensor = torch.zeros(2, dtype=torch.int64, device=device)
            return cls(tensor, tensor.unbind())

    def tell(self, step: int, anew: bool) -> None:
        """By kernels that fill: a copy from the host would wait for all that the device has to do."""
        now, before = (step, int(anew)), self.told
        self.told = None  # whoever interrupts between the fills leaves nothing that can be relied on
        for index, (place, value) in enumerate(zip(self.places, now, strict=True)):
            if before is None or value != before[index]:
                place.fill_(value)
        self.told = now


@dataclass
class Track:
    """The generations of one key: a timeline, the branches of the one under way, and what its calls did. `faults`: sites for
    which the budget has no room in this generation; `dropped`: its caches went to another one."""

    timeline: Timeline
    branches: dict[int, Branch] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    fallbacks: list[Fallback] = field(default_factory=list)
    tables: dict[Any, Tables] = field(default_factory=dict)
    earlier: dict[Any, Tables] = field(
        default_factory=dict
    )  # of the generation before: to send them again, the host would wait
    grids: tuple[Grid, ...] | None = None
    clock: Clock | None = None
    known: torch.Tensor | None = None  # bool [1] on the host: there are caches of a refresh before
    prepared: dict[Any, Prepared] = field(default_factory=dict)
    faults: Faults = field(default_factory=Faults)
    dropped: bool = False
    last_call: int = 0
    begun: int = 0  # larger for the generation that began later, over all sessions
    shape: Hashable = None  # of the latents

    def begin(self, shape: Hashable) -> tuple[Branch, ...]:
        """A generation of this shape begins: nothing cached is valid. Returns the branches whose buffers cannot serve it."""
        self.records, self.fallbacks, self.grids, self.prepared = [], [], None, {}
        self.earlier, self.tables = self.tables, {}
        self.begun = next(BIRTHS)
        for branch in self.branches.values():
            branch.forget()
        gone = tuple(self.branches.values()) if shape != self.shape else ()
        if gone:
            self.branches = {}
        self.faults, self.dropped, self.shape = Faults(), False, shape
        return gone
