"""One model's state: its generations, their branches, and the caches of each. Found through a parameter, never by graph."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from chipmunk_fx.config import AttentionConfig, Config
from chipmunk_fx.errors import FallbackError
from chipmunk_fx.graph.capture import Capture
from chipmunk_fx.graph.plan import Plan, Site, state_inputs
from chipmunk_fx.graph.sizes import bindings, evaluate
from chipmunk_fx.log import Notices, logger
from chipmunk_fx.runtime.footprint import site_slots
from chipmunk_fx.runtime.observe import Observer
from chipmunk_fx.runtime.registry import Unnamed, active_scope, held
from chipmunk_fx.runtime.tables import Tables, attention_tables
from chipmunk_fx.runtime.variants import Variants
from chipmunk_fx.schedule.phase import Phase
from chipmunk_fx.schedule.policies import policy_from
from chipmunk_fx.schedule.timeline import Position, Timeline
from chipmunk_fx.state.slots import Slot

_log = logger("runtime")
_BIRTHS = itertools.count()


@dataclass(frozen=True)
class Fallback:
    """A call, or a branch of one, that ran dense though the schedule had another phase for it."""

    step: int
    branch: int
    reason: str


@dataclass(frozen=True)
class Record:
    """What one call did."""

    step: int
    branch: int
    phase: Phase
    graph: weakref.ref


@dataclass
class Branch:
    """Caches of one branch: Parameter -> ordinal -> tensors by slot name."""

    caches: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)
    held: dict[int, tuple[float, int]] = field(default_factory=dict)  # site index -> (share of columns, bytes)
    last_refresh: int | None = None
    sparse_steps: int = 0  # since the last refresh

    @property
    def bytes(self) -> int:
        slots = (s for sites in self.caches.values() for s in sites.values())
        return sum(t.numel() * t.element_size() for tensors in slots for t in tensors.values())


@dataclass(frozen=True)
class _Prepared:
    """The state tensors of one graph and branch, good while every owner is the same Parameter object."""

    owners: tuple[tuple[int, weakref.ref], ...]
    state: list[torch.Tensor]

    def serves(self, values: Sequence[Any]) -> bool:
        return all(values[index] is owner() for index, owner in self.owners)


@dataclass
class Track:
    """The generations of one key: a timeline, the branches of the one under way, and what its calls did."""

    timeline: Timeline
    branches: dict[int, Branch] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    fallbacks: list[Fallback] = field(default_factory=list)
    tables: dict[Any, Tables] = field(default_factory=dict)
    grid: tuple[int, int, int] | None = None
    clock: torch.Tensor | None = None
    prepared: dict[Any, _Prepared] = field(default_factory=dict)
    last_call: int = 0
    begun: int = 0  # larger for the generation that began later, over all sessions

    def begin(self) -> None:
        """A generation begins: nothing cached is valid, buffers are kept for reuse."""
        self.records, self.fallbacks, self.tables, self.grid, self.prepared = [], [], {}, None, {}
        self.begun = next(_BIRTHS)
        for branch in self.branches.values():
            branch.last_refresh = None

    @property
    def bytes(self) -> int:
        return sum(b.bytes for b in self.branches.values())


class Graph:
    """One compiled graph: what it was captured as, its plan, its variants. Shared by all models it serves."""

    def __init__(self, capture: Capture, plan: Plan, config: Config, variants: Variants) -> None:
        self.capture, self.plan, self.config, self.variants = capture, plan, config, variants
        self.entries = state_inputs(plan)
        self.owner = plan.rewritten[0].owner
        self.is_piece = plan.roles.timestep is None
        self.free = [i for i, entry in enumerate(capture.inputs) if entry.is_tensor and not entry.is_parameter]
        kinds = {s.kind for s in plan.rewritten}
        self.dense_layers = max(
            s.dense_layers for k, s in (("attention", config.attention), ("mlp", config.mlp)) if k in kinds
        )


class Session:
    """Serves the calls of one model under one set of options; one call at a time."""

    def __init__(self, config: Config, budget: Callable[[torch.device], int], arrival: int, notices: Notices) -> None:
        self.config, self.budget, self.arrival, self.notices = config, budget, arrival, notices
        self.tag: Any = config
        self.born = next(_BIRTHS)
        self.lock = threading.RLock()
        self.observer = Observer()
        self.policy = policy_from(config.schedule)
        self.tracks: dict[Any, Track] = {}
        self.held = 0  # bytes of all caches, read by other sessions
        self.calls = 0
        self.latest: Any = None

    def call(self, graph: Graph, values: Sequence[Any]) -> Any:
        with self.lock:
            return self._serve(graph, values)

    def example_state(self, graph: Graph, values: Sequence[Any]) -> list[torch.Tensor]:
        """State of the right shapes for compiling `graph`, kept by no one."""
        track = Track(Timeline())
        return self._state(graph, track, Branch(), values)[0]

    def reset(self) -> None:
        with self.lock:
            for track in self.tracks.values():
                track.timeline.reset()

    def _serve(self, graph: Graph, values: Sequence[Any]) -> Any:
        track, position = self._locate(graph, values)
        branch = track.branches.setdefault(position.branch, Branch())
        phase = self._phase(graph, track, branch, position)
        state: list[torch.Tensor] = []
        if phase is not Phase.DENSE:
            try:
                state, whole = self._state(graph, track, branch, values)
            except _OverBudget as over:
                branch.caches.clear()
                track.prepared.clear()
                self.held = self.bytes
                phase = self._fall_back(track, position, str(over))
                state = []
            else:
                if phase is Phase.SPARSE and not whole:  # a parameter was replaced: its caches are new
                    phase = Phase.REFRESH
                self._set_clock(state[0], branch, phase, position.step)
        due, branch.last_refresh = branch.last_refresh, None  # an exception leaves the branch without valid caches
        result = graph.variants.get(phase, state)(*values, *state)
        self._passed(track, branch, phase, position, due, graph)
        return result

    def _locate(self, graph: Graph, values: Sequence[Any]) -> tuple[Track, Position]:
        scope = active_scope(values[graph.owner])
        key = scope.key if scope else None
        if key not in self.tracks:
            self._forget()
            schedule = self.config.schedule
            self.tracks[key] = Track(Timeline(schedule.steps, schedule.branches, bounded=scope is not None))
        track = self.tracks[key]
        position = track.timeline.advance(
            self.observer.observe(graph.plan.roles, values), scope.branch if scope else None
        )
        if position.begins:
            track.begin()
        self.calls += 1
        track.last_call, self.latest = self.calls, key
        return track, position

    def _forget(self) -> None:
        """Drop the generations that nobody can enter again; the last one is kept until then for its summary."""
        self.tracks = {k: t for k, t in self.tracks.items() if not (isinstance(k, Unnamed) and k.over)}
        self.held = self.bytes

    def _phase(self, graph: Graph, track: Track, branch: Branch, position: Position) -> Phase:
        if graph.is_piece and self.arrival < graph.dense_layers:
            return Phase.DENSE
        if not position.decided:
            return self._fall_back(track, position, position.reason or "its place in the generation is undecidable")
        phase = self.policy.phase(position.step, branch.last_refresh)
        if phase is Phase.SKIP:
            self.notices.once(
                _log, "schedule.skip_steps: no region of blocks can be skipped yet; those steps run sparse"
            )
            return Phase.SPARSE
        return phase

    def _fall_back(self, track: Track, position: Position, reason: str) -> Phase:
        if self.config.strict:
            raise FallbackError.of(f"step {position.step}, branch {position.branch}", reason)
        track.fallbacks.append(Fallback(position.step, position.branch, reason))
        self.notices.once(_log, f"running dense: {reason}", key=reason)
        return Phase.DENSE

    def _passed(
        self, track: Track, branch: Branch, phase: Phase, position: Position, due: int | None, graph: Graph
    ) -> None:
        branch.last_refresh = position.step if phase is Phase.REFRESH else due
        branch.sparse_steps = branch.sparse_steps + 1 if phase is Phase.SPARSE else 0
        track.records.append(Record(position.step, position.branch, phase, weakref.ref(graph)))
        _log.debug("step %d branch %d: %s", position.step, position.branch, phase)

    def _set_clock(self, clock: torch.Tensor, branch: Branch, phase: Phase, step: int) -> None:
        renew = phase is Phase.REFRESH or branch.sparse_steps % self.config.mlp.list_lifetime == 0
        clock.copy_(torch.tensor([step, int(renew)]))

    def _state(
        self, graph: Graph, track: Track, branch: Branch, values: Sequence[Any]
    ) -> tuple[list[torch.Tensor], bool]:
        """The tensors after a call's own inputs, and whether all caches were there already."""
        key = (weakref.ref(graph), id(branch), tuple(tuple(values[i].shape) for i in graph.free))
        known = track.prepared.get(key)
        if known is not None and known.serves(values):
            return known.state, True
        state, whole = self._assemble(graph, track, branch, values)
        owners = {site.owner: weakref.ref(values[site.owner]) for site in graph.plan.rewritten}
        track.prepared[key] = _Prepared(tuple(owners.items()), state)
        return state, whole

    def _assemble(
        self, graph: Graph, track: Track, branch: Branch, values: Sequence[Any]
    ) -> tuple[list[torch.Tensor], bool]:
        known = bindings(graph.capture.fakes, values)
        if graph.plan.has_grid and track.grid is None:
            track.grid = graph.plan.geometry.grid(known, values)
        sites = {site.index: site for site in graph.plan.rewritten}
        device = values[graph.owner].device
        whole, state = True, []
        caches: dict[int, dict[str, torch.Tensor]] = {}
        for entry in graph.entries:
            if entry.site is None:
                if track.clock is None or track.clock.device != device:
                    with torch.inference_mode(False):
                        track.clock = torch.zeros(2, dtype=torch.int64, device=device)
                state.append(track.clock)
                continue
            site = sites[entry.site]
            tables = self._tables(graph, track, site, evaluate(site.sizes, known), device)
            if entry.role != "slot":
                state.append(tables.order if entry.role == "order" else tables.always)
                continue
            if site.index not in caches:
                owner = values[site.owner]
                sizes = evaluate(site.sizes, known)
                always = tables.always_count if site.kind == "attention" else 0
                slots = site_slots(site, sizes, self.config, len(tables.order), always)
                caches[site.index], kept = self._cached(branch, owner, site.ordinal, slots, device)
                whole = whole and kept
                size = sum(slot.bytes for slot in slots)
                branch.held[site.index] = (caches[site.index]["lists"].shape[-1] / sizes[3], size)
            state.append(caches[site.index][entry.slot or ""])
        return state, whole

    def _tables(self, graph: Graph, track: Track, site: Site, sizes: tuple[int, ...], device: torch.device) -> Tables:
        attention = site.kind == "attention"
        rows, columns = (sizes[2], sizes[3]) if attention else (sizes[1], sizes[1])
        key = (site.kind, rows, columns, site.group_rows)
        if key not in track.tables:
            layout = graph.plan.geometry.layout(rows, track.grid)
            raster = self.config.tokens.order == "raster"
            # An MLP shares the order of rows, not what attention adds to it: dense text rows, local windows.
            settings = self.config.attention if attention else AttentionConfig()
            made = attention_tables(layout, rows, columns, site.group_rows, settings, raster)
            with torch.inference_mode(False):
                track.tables[key] = Tables(made.order.to(device), made.always.to(device))
        return track.tables[key]

    def _cached(
        self, branch: Branch, owner: torch.Tensor, ordinal: int, slots: tuple[Slot, ...], device: torch.device
    ) -> tuple[dict[str, torch.Tensor], bool]:
        """The buffers of one site in one branch; allocated where they do not fit the slots."""
        sites = branch.caches.setdefault(owner, {})
        held = sites.get(ordinal, {})
        if all(
            s.name in held and tuple(held[s.name].shape) == s.shape and held[s.name].dtype == s.dtype
            and held[s.name].device == device
            for s in slots
        ):  # fmt: skip
            return held, True
        sites.pop(ordinal, None)
        self.held = self.bytes
        self._make_room(sum(s.bytes for s in slots), device)
        with torch.inference_mode(False):  # a cache made in inference mode could not be written outside it
            made = {s.name: torch.zeros(s.shape, dtype=s.dtype, device=device) for s in slots}
        sites[ordinal] = made
        self.held = self.bytes
        return made, False

    def _make_room(self, need: int, device: torch.device) -> None:
        """Drop the caches of the generations that were called longest ago until `need` bytes fit the budget."""
        limit = self.budget(device)
        while need + held(self.tag) > limit:
            idle = [t for k, t in self.tracks.items() if k != self.latest and t.branches]
            if not idle:
                raise _OverBudget(
                    f"caches of {(need + held(self.tag)) / 1e9:.3g} GB exceed memory.budget_gb ({limit / 1e9:.3g} GB)"
                )
            oldest = min(idle, key=lambda track: track.last_call)
            oldest.branches.clear()
            oldest.prepared.clear()
            self.held = self.bytes

    @property
    def bytes(self) -> int:
        return sum(track.bytes for track in self.tracks.values())


class _OverBudget(Exception):
    """A branch's caches do not fit the memory budget."""
