"""One model's state: its generations, their branches, and the caches of each. Found through a parameter, never by graph."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from chipmunk_fx.config import AttentionConfig, Config
from chipmunk_fx.errors import FallbackError
from chipmunk_fx.graph.capture import Capture
from chipmunk_fx.graph.plan import Plan, Site, state_inputs
from chipmunk_fx.graph.sizes import bindings, evaluate
from chipmunk_fx.graph.walk import shape
from chipmunk_fx.log import Notices, logger
from chipmunk_fx.runtime.footprint import site_slots
from chipmunk_fx.runtime.generations import BIRTHS, Branch, Fallback, Prepared, Record, Track, bytes_of
from chipmunk_fx.runtime.known import Known, Padding, Prober
from chipmunk_fx.runtime.observe import Observer
from chipmunk_fx.runtime.registry import Unnamed, active_scope, held
from chipmunk_fx.runtime.tables import Tables, attention_tables
from chipmunk_fx.runtime.variants import Variants
from chipmunk_fx.schedule.phase import Phase
from chipmunk_fx.schedule.policies import policy_from
from chipmunk_fx.schedule.timeline import Position, Timeline
from chipmunk_fx.state.slots import Slot

_log = logger("runtime")
_REGION = -1  # in place of a site's ordinal


class Graph:
    """One compiled graph: what it was captured as, its plan, its variants. Shared by all models it serves."""

    def __init__(self, capture: Capture, plan: Plan, config: Config, variants: Variants) -> None:
        self.capture, self.plan, self.config, self.variants = capture, plan, config, variants
        self.entries = state_inputs(plan, Phase.REFRESH)
        parameters = (i for i, entry in enumerate(capture.inputs) if entry.is_parameter)
        self.owner = (plan.rewritten or plan.sites)[0].owner if plan.sites else next(parameters)
        self.clock = next(i for i, entry in enumerate(self.entries) if entry.role == "clock")
        self.is_piece = plan.roles.timestep is None
        self.free = [i for i, entry in enumerate(capture.inputs) if entry.is_tensor and not entry.is_parameter]
        kinds = {s.kind for s in plan.rewritten}
        self.keeps_lists = "attention" in kinds and not config.attention.renew_lists
        self.settings = [s for kind, s in (("attention", config.attention), ("mlp", config.mlp)) if kind in kinds]


class Session:
    """Serves the calls of one model under one set of options; one call at a time."""

    def __init__(self, config: Config, budget: Callable[[torch.device], int], arrival: int, notices: Notices) -> None:
        self.config, self.budget, self.arrival, self.notices = config, budget, arrival, notices
        self.tag: Any = config
        self.born = next(BIRTHS)
        self.lock = threading.RLock()
        self.observer = Observer()
        self.probers: weakref.WeakKeyDictionary[Graph, Prober] = weakref.WeakKeyDictionary()
        self.policy = policy_from(config.schedule)
        self.computing = policy_from(replace(config.schedule, skip_steps=None, skip_threshold=None))
        self.tracks: dict[Any, Track] = {}
        self.shared: WeakIdKeyDictionary = WeakIdKeyDictionary()  # what the branches of a site have in common
        self.shared_bytes: dict[int, int] = {}  # by site index
        self.held = 0  # bytes of all caches, read by other sessions
        self.calls = 0
        self.latest: Any = None

    def call(self, graph: Graph, values: Sequence[Any]) -> Any:
        with self.lock:
            return self._serve(graph, values)

    def example_state(self, graph: Graph, values: Sequence[Any]) -> list[torch.Tensor]:
        """State of the right shapes for compiling `graph`, kept by no one."""
        track = Track(Timeline())
        return self._state(graph, track, Branch(), values, self._known(graph, values))[0]

    def reset(self) -> None:
        with self.lock:
            for track in self.tracks.values():
                track.timeline.reset()

    def _serve(self, graph: Graph, values: Sequence[Any]) -> Any:
        track, position = self._locate(graph, values)
        branch = track.branches.setdefault(position.branch, Branch())
        known = self._known(graph, values)
        phase = self._phase(graph, track, branch, position, known)
        state: list[torch.Tensor] | None = None
        renew = True
        trusted = position.decided and not (known.problem and graph.plan.rewritten)
        if phase is not Phase.DENSE or (graph.plan.streams and trusted):
            phase, state, renew = self._ready(graph, track, branch, position, phase, values, known)
        before = branch.last_refresh, branch.last_computed
        branch.last_refresh = branch.last_computed = None  # an exception leaves the branch without valid caches
        if state is not None:
            result = graph.variants.get(phase, state, renew)(*values, *state)
        elif graph.plan.masks and graph.plan.rewritten and not graph.plan.streams and not known.problem:
            state = self._masks(graph, values, known)
            result = graph.variants.get(phase, state)(*values, *state)
        else:
            result = graph.variants.original()(*values)
        branch.last_refresh, branch.last_computed = before
        stored = state is not None and graph.plan.stores(phase)
        self._passed(track, branch, phase, position, known, graph, stored=stored, renewed=renew)
        return result

    def _ready(
        self, graph: Graph, track: Track, branch: Branch, position: Position, phase: Phase, values: Sequence[Any],
        known: Known,
    ) -> tuple[Phase, list[torch.Tensor] | None, bool]:  # fmt: skip
        """The phase that the caches allow, its tensors (none: the call has to be dense), whether it chooses new lists."""
        try:
            state, whole = self._state(graph, track, branch, values, known)
        except _OverBudget as over:
            branch.caches.clear()
            track.prepared.clear()
            self.held = self.bytes
            return self._fall_back(track, position, str(over)), None, True
        if not whole:  # caches are new where a parameter was replaced
            branch.last_refresh = branch.last_computed = None
        # lists are of no use where other keys are padding
        listed = whole and branch.last_refresh is not None and known.same(branch.known)
        fresh = not whole or (phase is Phase.SPARSE and not listed)
        if fresh and phase in (Phase.SPARSE, Phase.SKIP):
            phase = Phase.REFRESH if graph.plan.rewritten else Phase.DENSE
        self._set_clock(state[graph.clock], branch, phase, position.step)
        renew = phase is not Phase.REFRESH or not listed or not graph.keeps_lists
        return phase, state[: len(state_inputs(graph.plan, phase))], renew

    def _known(self, graph: Graph, values: Sequence[Any]) -> Known:
        if graph.plan.probe is None:
            return Known()
        if graph not in self.probers:
            self.probers[graph] = Prober(graph.plan.probe)
        return self.probers[graph].ask(values)

    def _masks(self, graph: Graph, values: Sequence[Any], known: Known) -> list[torch.Tensor]:
        """`valid` [B, M] and `span` of every mask."""
        state = []
        symbols = bindings(graph.capture.fakes, values)
        for index, padding in enumerate(known.paddings):
            site = next(site for site in graph.plan.sites if graph.plan.mask_of(site) == index)
            (batch,) = evaluate(site.sizes[:1], symbols)
            state += [padding.valid.expand(batch, -1).contiguous(), padding.span]
        return state

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

    def _phase(self, graph: Graph, track: Track, branch: Branch, position: Position, known: Known) -> Phase:
        if graph.is_piece and any(settings.is_dense(self.arrival) for settings in graph.settings):
            return Phase.DENSE
        if not position.decided:
            return self._fall_back(track, position, position.reason or "its place in the generation is undecidable")
        if known.problem and graph.plan.rewritten:
            return self._fall_back(track, position, known.problem)
        if not graph.plan.rewritten:
            phase = self.policy.phase(position.step, None, branch.drift, branch.last_computed)
            return phase if phase is Phase.SKIP else Phase.DENSE
        if graph.plan.streams:
            return self.policy.phase(position.step, branch.last_refresh, branch.drift, branch.last_computed)
        if self.policy != self.computing:
            why = "a block does not show what is around it" if graph.is_piece else graph.plan.region
            self.notices.once(_log, f"no step is skipped, whatever schedule.skip_* say ({why})", key="skip")
        return self.computing.phase(position.step, branch.last_refresh)

    def _fall_back(self, track: Track, position: Position, reason: str) -> Phase:
        if self.config.strict:
            raise FallbackError.of(f"step {position.step}, branch {position.branch}", reason)
        track.fallbacks.append(Fallback(position.step, position.branch, reason))
        self.notices.once(_log, f"running dense: {reason}", key=reason)
        return Phase.DENSE

    def _passed(
        self,
        track: Track,
        branch: Branch,
        phase: Phase,
        position: Position,
        known: Known,
        graph: Graph,
        *,
        stored: bool,
        renewed: bool,
    ) -> None:
        if phase is Phase.REFRESH:
            branch.last_refresh, branch.known = position.step, known
        if phase is not Phase.SKIP:
            branch.sparse_steps = branch.sparse_steps + 1 if phase is Phase.SPARSE else 0
            if stored:
                branch.computed(position.step)
        track.records.append(Record(position.step, position.branch, phase, weakref.ref(graph), renewed))
        _log.debug("step %d branch %d: %s", position.step, position.branch, phase)

    def _set_clock(self, clock: torch.Tensor, branch: Branch, phase: Phase, step: int) -> None:
        renew = phase is Phase.REFRESH or branch.sparse_steps % self.config.mlp.list_lifetime == 0
        clock.copy_(torch.tensor([step, int(renew)]))

    def _state(
        self, graph: Graph, track: Track, branch: Branch, values: Sequence[Any], known: Known
    ) -> tuple[list[torch.Tensor], bool]:
        """The tensors after a call's own inputs, and whether all caches were there already."""
        key = (weakref.ref(graph), id(branch), tuple(tuple(values[i].shape) for i in graph.free))
        prepared = track.prepared.get(key)
        if prepared is not None and prepared.serves(values, known):
            return prepared.state, True
        state, whole = self._assemble(graph, track, branch, values, known)
        owners = {site.owner: weakref.ref(values[site.owner]) for site in graph.plan.rewritten}
        track.prepared[key] = Prepared(tuple(owners.items()), known, state)
        return state, whole

    def _assemble(
        self, graph: Graph, track: Track, branch: Branch, values: Sequence[Any], known: Known
    ) -> tuple[list[torch.Tensor], bool]:
        symbols = bindings(graph.capture.fakes, values) | known.lengths
        if graph.plan.has_grid and track.grids is None:
            track.grids = graph.plan.geometry.grids(symbols, values)
        layer = {"layer": self.arrival} if graph.is_piece else {}
        sites = {site.index: replace(site, **layer) for site in graph.plan.rewritten}
        device = values[graph.owner].device
        state = self._masks(graph, values, known)
        residuals = [
            Slot(f"residual_{i}", evaluate(shape(stream.stop), symbols), stream.stop.meta["val"].dtype)
            for i, stream in enumerate(graph.plan.streams)
        ]
        streams = range(len(residuals) if graph.plan.measured else 0)
        changes = [Slot(f"change_{i}", (1,), torch.float32) for i in streams]
        kept, whole = self._cached(branch.caches, values[graph.owner], _REGION, [*residuals, *changes], device)
        if changes:
            branch.changes = tuple(kept[slot.name] for slot in changes)
        state += [kept[slot.name] for slot in (*residuals, *changes)]
        caches: dict[int, dict[str, torch.Tensor]] = {}
        for entry in graph.entries[len(state) :]:
            if entry.of is None:
                if track.clock is None or track.clock.device != device:
                    with torch.inference_mode(False):
                        track.clock = torch.zeros(2, dtype=torch.int64, device=device)
                state.append(track.clock)
                continue
            site = sites[entry.of]
            sizes = evaluate(site.sizes, symbols)
            tables = self._tables(graph, track, site, sizes, device)
            if entry.role != "slot":
                state.append(tables.order if entry.role == "order" else tables.always)
                continue
            if site.index not in caches:
                owner, mask = values[site.owner], graph.plan.mask_of(site)
                padding = None if mask is None else known.paddings[mask]
                slots = self._slots(site, sizes, tables, padding)
                caches[site.index] = {}
                for home, shared in ((branch.caches, False), (self.shared, True)):
                    some = [slot for slot in slots if slot.shared is shared]
                    tensors, kept = self._cached(home, owner, site.ordinal, some, device)
                    caches[site.index] |= tensors
                    whole = whole and kept
                columns = padding.keys if padding else sizes[3]
                size = sum(slot.bytes for slot in slots if not slot.shared)
                self.shared_bytes[site.index] = sum(slot.bytes for slot in slots if slot.shared)
                branch.held[site.index] = (caches[site.index]["lists"].shape[-1] / columns, size)
            state.append(caches[site.index][entry.slot or ""])
        return state, whole

    def _slots(self, site: Site, sizes: tuple[int, ...], tables: Tables, padding: Padding | None) -> tuple[Slot, ...]:
        """Densities are shares of the valid keys."""
        if site.kind == "mlp":
            return site_slots(site, sizes, self.config, len(tables.order))
        always = tables.always_count if padding is None else padding.fixed(tables.always)
        if padding is not None:
            sizes = (*sizes[:3], padding.keys, sizes[4])
        return site_slots(site, sizes, self.config, len(tables.order), always)

    def _tables(self, graph: Graph, track: Track, site: Site, sizes: tuple[int, ...], device: torch.device) -> Tables:
        attention = site.kind == "attention"
        rows, columns = (sizes[2], sizes[3]) if attention else (sizes[1], sizes[1])
        key = (site.kind, rows, columns, site.group_rows)
        if key not in track.tables:
            layout = graph.plan.geometry.layout(rows, track.grids or ())
            raster = self.config.tokens.order == "raster"
            # An MLP shares the order of rows, not what attention adds to it: dense text rows, local windows.
            settings = self.config.attention if attention else AttentionConfig()
            made = attention_tables(layout, rows, columns, site.group_rows, settings, raster)
            with torch.inference_mode(False):
                track.tables[key] = Tables(made.order.to(device), made.always.to(device))
        return track.tables[key]

    def _cached(
        self, home: WeakIdKeyDictionary, owner: torch.Tensor, ordinal: int, slots: Sequence[Slot], device: torch.device
    ) -> tuple[dict[str, torch.Tensor], bool]:
        """The buffers of one site, of one branch or shared by all; allocated where they do not fit the slots."""
        sites = home.setdefault(owner, {})
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
        return sum(track.bytes for track in self.tracks.values()) + self.shared_held

    @property
    def shared_held(self) -> int:
        return bytes_of(self.shared)


class _OverBudget(Exception):
    """A branch's caches do not fit the memory budget."""
