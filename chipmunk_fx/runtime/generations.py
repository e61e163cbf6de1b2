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
from chipmunk_fx.runtime.graphs import Graph, Named, Names
from chipmunk_fx.runtime.known import Known
from chipmunk_fx.runtime.observe import Numbers
from chipmunk_fx.runtime.registry import Scope
from chipmunk_fx.runtime.tables import Tables
from chipmunk_fx.schedule.phase import Phase
from chipmunk_fx.schedule.policies import Drift, History, Policy
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


@dataclass
class Filled:
    """What a refresh has left in the caches of its sites: at which `step`, what was `known` of masks then, and how many `sparse`
    steps it has had since."""

    step: int
    known: Known
    sparse: int = 0


@dataclass(frozen=True)
class Made:
    """A call that was made as if it were at `position`: what came of it, or the problem; what its branch had `before` (filled
    caches, the last step computed); whether lists were renewed, and whether the graph was a rewritten one; `names`: as
    of `Graph.named`."""

    position: Position
    graph: Graph
    phase: Phase
    result: Any
    problem: Exception | None
    before: tuple[dict[Names, Filled], int | None]
    renew: bool
    rewritten: bool
    names: tuple[Names, Names]


@dataclass(frozen=True)
class Held:
    """What a site keeps for one branch: its share of columns, and bytes by slot name of what is its own."""

    share: float
    slots: dict[str, int]


@dataclass
class Branch:
    """Caches of one branch: Parameter -> what tells its sites apart -> cell. `used`: those of the generation under way."""

    caches: Home = field(default_factory=Home)
    used: set[Named] = field(default_factory=set)
    held: dict[int, Held] = field(default_factory=dict)  # by site index
    filled: dict[Names, Filled] = field(
        default_factory=dict
    )  # by the sites of a refresh, no two of which have one in common
    last_computed: int | None = None  # a step whose residual can serve again
    apart: int | None = None  # steps between it and the one computed before
    changes: tuple[torch.Tensor, ...] = ()  # of the residual of each stream between the two, fp32 [1] on the device
    stack: Names = frozenset()  # sites of the graph that left the residual
    health: Health | None = None

    def forget(self, names: Names | None = None) -> None:
        """Nothing cached is valid, or nothing that has to do with these sites; buffers are kept for reuse."""
        self.filled = {} if names is None else {n: f for n, f in self.filled.items() if n.isdisjoint(names)}
        self.last_computed = self.apart = None

    def refreshed(self, step: int, names: Names, known: Known) -> None:
        """`step` has filled the caches of these sites."""
        self.filled = {n: f for n, f in self.filled.items() if n.isdisjoint(names)} | {names: Filled(step, known)}

    def of(self, names: Names) -> Filled | None:
        """What the caches of all these sites hold; None where no single refresh has filled them."""
        if not names or names in self.filled:
            return self.filled.get(names)
        return next((filled for more, filled in self.filled.items() if names <= more), None)

    def computed(self, step: int, stack: Names) -> None:
        """`step` has left a residual that can serve again, in graphs with these sites."""
        self.apart = None if self.last_computed is None else step - self.last_computed
        self.last_computed, self.stack = step, stack

    @property
    def damaged(self) -> bool:
        """Whether nan or inf is known to be in its caches."""
        return self.health is not None and self.health.told

    def history(self, names: Names) -> History:
        """As far as it concerns these sites."""
        filled = self.of(names)
        return History(None if filled is None else filled.step, self.last_computed, self.drift)

    @property
    def drift(self) -> Drift | None:
        """Read from the device, which is waited for."""
        if self.last_computed is None or self.apart is None or not self.changes:
            return None
        return Drift(max(float(change) for change in self.changes), self.apart, self.last_computed)


@dataclass(frozen=True)
class Prepared:
    """The state tensors of one graph and branch, and its sites' names, good while every owner is the same Parameter object."""

    owners: tuple[tuple[int, weakref.ref], ...]
    known: Known
    state: list[torch.Tensor]
    names: tuple[Names, Names]

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


RENEWING = (
    "call after call is a refresh, which costs more than a dense one: a generation begins at each of them, or padding, sizes, "
    "shifts or tables of the model are others each time. Pictures, or parts of one, that take turns want "
    "chipmunk_fx.generation(model, key=...) around each call"
)
_MANY = 8


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
    scope: Scope | None = None  # the caller's `generation` block around the call that came last
    inputs: tuple[Numbers, ...] = ()  # some values of those of its first call
    doubt: str | None = None  # why branches cannot be told apart
    refreshes: int = 0  # in a row, up to the last call, that no schedule asks for, and first ones of generations

    def renews(self, phase: Phase, position: Position, policy: Policy) -> bool:
        """Whether so many calls in a row have been refreshes that nothing is gained by them, with this one."""
        step = position.step
        if phase is not Phase.REFRESH or (step > 0 and policy.phase(step, History(step - 1)) is Phase.REFRESH):
            self.refreshes = 0
        elif position.begins or step > 0:  # at step 0 every branch has one
            self.refreshes += 1
        return self.refreshes >= _MANY

    def ready(self, graph: Graph, branch: Branch, values: Sequence[Any], known: Known) -> Prepared | None:
        """What is prepared for such a call."""
        prepared = self.prepared.get(_call_key(graph, branch, values))
        return prepared if prepared is not None and prepared.serves(values, known) else None

    def prepare(
        self, graph: Graph, branch: Branch, values: Sequence[Any], known: Known, state: list[torch.Tensor]
    ) -> Prepared:
        owners = tuple((index, weakref.ref(values[index])) for index in graph.owners)
        prepared = Prepared(owners, known, state, graph.named(values, known.lengths))
        self.prepared[_call_key(graph, branch, values)] = prepared
        return prepared

    def named(self, graph: Graph, branch: Branch, values: Sequence[Any], known: Known) -> tuple[Names, Names]:
        """As of the graph, which need not be asked again for a call that is prepared."""
        prepared = self.ready(graph, branch, values, known)
        return graph.named(values, known.lengths) if prepared is None else prepared.names

    def begin(self, shape: Hashable) -> tuple[Branch, ...]:
        """A generation of this shape begins: nothing cached is valid. Returns the branches whose buffers cannot serve it."""
        self.records, self.fallbacks, self.grids, self.prepared = [], [], None, {}
        self.earlier, self.tables = self.tables, {}
        self.begun = next(BIRTHS)
        for branch in self.branches.values():
            branch.forget()
            branch.used = set()
        self.doubt = None
        gone = tuple(self.branches.values()) if shape != self.shape else ()
        if gone:
            self.branches = {}
        self.faults, self.dropped, self.shape = Faults(), False, shape
        return gone


def _call_key(graph: Graph, branch: Branch, values: Sequence[Any]) -> Any:
    return weakref.ref(graph), id(branch), *[values[i].shape for i in graph.free], *[values[i] for i in graph.numbers]
