"""One model's state: its generations, their branches, and the caches of each. Found through a parameter, never by graph."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from chipmunk_fx.config import Config
from chipmunk_fx.errors import FallbackError
from chipmunk_fx.graph.plan import Site
from chipmunk_fx.log import Notices, logger
from chipmunk_fx.runtime.assembly import Assembly, SiteOutOfMemory, masks
from chipmunk_fx.runtime.faults import Faults
from chipmunk_fx.runtime.generations import BIRTHS, Branch, Fallback, Prepared, Record, Track
from chipmunk_fx.runtime.graphs import Graph
from chipmunk_fx.runtime.known import Known, Prober
from chipmunk_fx.runtime.observe import Observer
from chipmunk_fx.runtime.placement import giving_way
from chipmunk_fx.runtime.registry import Unnamed, active_scope, held, others, thread_key
from chipmunk_fx.schedule.phase import Phase
from chipmunk_fx.schedule.policies import policy_from
from chipmunk_fx.schedule.timeline import Position, Timeline
from chipmunk_fx.state.store import Account, Home, Place, Store, account

_log = logger("runtime")
_BROKEN = "nan or inf in a cache"


class Session:
    """Serves the calls of one model under one set of options; one call at a time."""

    def __init__(self, config: Config, limit: Callable[[Place], int], arrival: int, notices: Notices) -> None:
        self.config, self.limit, self.arrival, self.notices = config, limit, arrival, notices
        self.tag: Any = config
        self.born = next(BIRTHS)
        self.lock = threading.RLock()
        self.observer = Observer()
        self.probers: weakref.WeakKeyDictionary[Graph, Prober] = weakref.WeakKeyDictionary()
        self.policy = policy_from(config.schedule)
        self.computing = policy_from(replace(config.schedule, skip_steps=None, skip_threshold=None))
        self.tracks: dict[Any, Track] = {}
        self.store = Store()
        self.faults = Faults()
        self.shared_bytes: dict[int, dict[str, int]] = {}  # by site index and slot name
        self.held = Account()  # of all caches, read by other sessions
        self.calls = 0
        self.latest: Any = None

    def call(self, graph: Graph, values: Sequence[Any]) -> Any:
        with self.lock:
            self.store.follow(values[graph.owner].device)
            return self._serve(graph, values)

    def release(self) -> bool:
        """Free all caches, for settings that need the memory; false where there are none, or a call is under way."""
        if not self.lock.acquire(blocking=False):
            return False
        try:
            had = self.account().total > 0
            self._free(self.tracks.values())
            self.store.forget()
            self.held = self.account()
            return had
        finally:
            self.lock.release()

    def example_state(self, graph: Graph, values: Sequence[Any]) -> list[torch.Tensor]:
        """State of the right shapes for compiling `graph`, kept by no one."""
        track = Track(Timeline())
        return self._state(graph, track, Branch(), values, self._known(graph, values))[0]

    def reset(self) -> None:
        with self.lock:
            for track in self.tracks.values():
                track.timeline.reset()

    def account(self) -> Account:
        """Of all caches; the buffers that those on the host pass through are not among them."""
        return account(self._homes())

    def _serve(self, graph: Graph, values: Sequence[Any]) -> Any:
        track, position = self._locate(graph, values)
        branch = track.branches.setdefault(position.branch, Branch())
        known = self._known(graph, values)
        self._look_for_damage(track, branch, position)
        if track.dropped:
            self._fall_back(track, position, _DROPPED, Phase.REFRESH)
            track.dropped = False
        graph, phase, state, renew = self._ready(graph, track, branch, position, values, known)
        before = branch.last_refresh, branch.last_computed
        branch.last_refresh = branch.last_computed = None  # an exception leaves the branch without valid caches
        result, problem = self._run(graph, phase, values, state, renew)
        if problem is not None:
            del state
            return self._rescue(graph, track, position, values, problem)
        branch.last_refresh, branch.last_computed = before
        stored = state is not None and graph.skips and graph.plan.stores(phase)
        self._passed(track, branch, phase, position, known, graph, stored=stored, renewed=renew)
        return result

    def _run(
        self, graph: Graph, phase: Phase, values: Sequence[Any], state: list[torch.Tensor] | None, renew: bool
    ) -> tuple[Any, Exception | None]:
        """The result, or why there is none: a variant of ours that failed."""
        if state is None:
            return graph.variants.original()(*values), None
        try:
            return graph.variants.get(phase, state, renew)(*values, *state), None
        except Exception as error:
            if graph.writes_inputs:
                raise
            return None, error.with_traceback(None)  # which would keep the caches alive

    def _rescue(self, graph: Graph, track: Track, position: Position, values: Sequence[Any], problem: Exception) -> Any:
        """Run dense in place of a variant that failed; where that fails too, it is the model's own failure."""
        if isinstance(problem, torch.OutOfMemoryError):
            self._free(self.tracks.values())
        result = graph.variants.original()(*values)
        reason = f"a rewritten graph failed ({type(problem).__name__}: {str(problem).partition(chr(10))[0]})"
        if self.config.strict:
            raise FallbackError.of(f"step {position.step}, branch {position.branch}", reason) from problem
        self.faults.condemn(graph, reason)
        self._fall_back(track, position, reason)
        track.records.append(Record(position.step, position.branch, Phase.DENSE, weakref.ref(graph)))
        return result

    def _ready(
        self, graph: Graph, track: Track, branch: Branch, position: Position, values: Sequence[Any], known: Known
    ) -> tuple[Graph, Phase, list[torch.Tensor] | None, bool]:
        """The graph and phase that faults and caches allow, the tensors to append (none where nothing is rewritten), and
        whether new lists are chosen."""
        while True:
            able = track.faults.able(self.faults.able(graph, values), values)
            phase = self._phase(able, track, branch, position, known)
            problem = self.faults.of(able) or (able.rewrites and known.problem)
            if phase is Phase.DENSE and (not able.skips or not position.decided or problem):
                return able, phase, None if problem else _masks(able, values, known), True
            try:
                return able, *self._cached(able, track, branch, position, phase, values, known)
            except _OverBudget as over:
                if self._give_way(able, track, position, values, over):
                    continue
                self.store.drop([branch.caches])
                track.prepared.clear()
                self.held = self.account()
                return able, self._fall_back(track, position, str(over)), _masks(able, values, known), True
            except SiteOutOfMemory as error:
                self._exempt(track, position, values, error)

    def _cached(
        self, graph: Graph, track: Track, branch: Branch, position: Position, phase: Phase, values: Sequence[Any],
        known: Known,
    ) -> tuple[Phase, list[torch.Tensor], bool]:  # fmt: skip
        """The phase that the caches allow, its tensors, and whether it chooses new lists."""
        state, whole = self._state(graph, track, branch, values, known)
        if not whole:  # caches are new where a parameter was replaced
            branch.forget()
        # lists are of no use where other keys are padding
        listed = branch.last_refresh is not None and known.same(branch.known)
        fresh = not whole or (phase is Phase.SPARSE and not listed)
        if fresh and phase in (Phase.SPARSE, Phase.SKIP):
            phase = Phase.REFRESH if graph.rewrites else Phase.DENSE
        if track.clock is not None:
            renew = phase is Phase.REFRESH or branch.sparse_steps % self.config.mlp.list_lifetime == 0
            track.clock.tell(position.step, renew)
        renew = phase is not Phase.REFRESH or not listed or not graph.keeps_lists
        if track.known is not None:
            track.known.fill_(listed)
        return phase, state[: graph.counts[phase]], renew

    def _state(
        self, graph: Graph, track: Track, branch: Branch, values: Sequence[Any], known: Known
    ) -> tuple[list[torch.Tensor], bool]:
        """The tensors after a call's own inputs, and whether all caches were there already."""
        key = (weakref.ref(graph), id(branch), tuple([values[i].shape for i in graph.free]))
        prepared = track.prepared.get(key)
        if prepared is not None and prepared.serves(values, known):
            return prepared.state, True
        layer = self.arrival if graph.is_piece else None
        assembly = Assembly(
            graph, self.config, self.store, track, branch, values, known, self.shared_bytes, self._make_room, layer
        )
        state = assembly.state()
        self.held = self.account()
        owners = tuple((index, weakref.ref(values[index])) for index in graph.owners)
        track.prepared[key] = Prepared(owners, known, state)
        return state, assembly.whole

    def _known(self, graph: Graph, values: Sequence[Any]) -> Known:
        if graph.plan.probe is None:
            return _NOTHING
        if graph not in self.probers:
            self.probers[graph] = Prober(graph.plan.probe)
        return self.probers[graph].ask(values)

    def _locate(self, graph: Graph, values: Sequence[Any]) -> tuple[Track, Position]:
        scope = active_scope(values[graph.owner])
        key = scope.key if scope else thread_key()
        if key not in self.tracks:
            schedule = self.config.schedule
            timeline = Timeline(schedule.steps, schedule.branches, bounded=scope is not None)
            self.tracks[key] = Track(timeline, **self._inherited())
        track = self.tracks[key]
        seen = self.observer.observe(graph.plan.roles, values)
        position = track.timeline.advance(seen, scope.branch if scope else None)
        if position.begins:
            self.store.drop([branch.caches for branch in track.begin(seen.shape)])
        self.calls += 1
        track.last_call, self.latest = self.calls, key
        return track, position

    def _inherited(self) -> dict[str, Any]:
        """Buffers of a generation that nobody can enter again, kept until now for its summary; others are freed."""
        over = [key for key in self.tracks if isinstance(key, Unnamed) and key.over]
        gone = [self.tracks.pop(key) for key in over]
        self._free(gone[:-1])
        self.held = self.account()
        return {"branches": gone[-1].branches, "shape": gone[-1].shape} if gone else {}

    def _phase(self, graph: Graph, track: Track, branch: Branch, position: Position, known: Known) -> Phase:
        if graph.is_piece and any(settings.is_dense(self.arrival) for settings in graph.settings):
            return Phase.DENSE
        if not position.decided:
            return self._fall_back(track, position, position.reason or "its place in the generation is undecidable")
        if problem := (graph.rewrites and known.problem) or self.faults.of(graph):
            return self._fall_back(track, position, problem)
        if not graph.rewrites:
            phase = self.policy.phase(position.step, replace(branch.history, last_refresh=None))
            return phase if phase is Phase.SKIP else Phase.DENSE
        if graph.skips:
            return self.policy.phase(position.step, branch.history)
        if self.policy is not self.computing and self.policy != self.computing:
            why = "a block does not show what is around it" if graph.is_piece else graph.plan.region
            self.notices.once(_log, f"no step is skipped, whatever schedule.skip_* say ({why})", key="skip")
        return self.computing.phase(position.step, branch.history)

    def _look_for_damage(self, track: Track, branch: Branch, position: Position) -> None:
        """Caches with nan or inf in them are made anew."""
        if branch.health is not None and branch.health.broken() and branch.last_refresh is not None:
            self._fall_back(track, position, _BROKEN, Phase.REFRESH)
            branch.forget()

    def _fall_back(self, track: Track, position: Position, reason: str, phase: Phase = Phase.DENSE) -> Phase:
        if self.config.strict:
            raise FallbackError.of(f"step {position.step}, branch {position.branch}", reason)
        track.fallbacks.append(Fallback(position.step, position.branch, reason, phase))
        doing = "running dense" if phase is Phase.DENSE else "refreshing caches early"
        self.notices.once(_log, f"{doing}: {reason}", key=reason)
        return phase

    def _passed(
        self, track: Track, branch: Branch, phase: Phase, position: Position, known: Known, graph: Graph, *,
        stored: bool, renewed: bool,
    ) -> None:  # fmt: skip
        if phase is Phase.REFRESH:
            branch.last_refresh, branch.known = position.step, known
        if phase is not Phase.SKIP:
            branch.sparse_steps = branch.sparse_steps + 1 if phase is Phase.SPARSE else 0
            if stored:
                branch.computed(position.step)
            if branch.health is not None:
                branch.health.send()
        track.records.append(Record(position.step, position.branch, phase, weakref.ref(graph), renewed))
        _log.debug("step %d branch %d: %s", position.step, position.branch, phase)

    def _exempt(self, track: Track, position: Position, values: Sequence[Any], error: SiteOutOfMemory) -> None:
        """The site stays dense from now on, unless idle generations or other settings had memory to give."""
        site, owner = error.site, values[error.site.owner]
        if self._free_idle() or any([other.release() for other in others(owner, self)]):
            return
        self._fall_back(track, position, str(error))
        self._forsake(self.faults, owner, site, str(error))

    def _give_way(
        self, graph: Graph, track: Track, position: Position, values: Sequence[Any], over: _OverBudget
    ) -> bool:
        """One site on the device stays dense for this generation; false where none is to be had alone, or
        none would be left: whole calls that run dense leave padding out."""
        site = next((s for s in giving_way(graph.plan) if s.passage is None), None)
        if site is None or over.on_host or graph.is_whole or len(graph.plan.rewritten) == 1:
            return False
        reason = "caches exceed memory.budget_gb: some sites stay dense"
        if all(fallback.reason != reason for fallback in track.fallbacks):
            self._fall_back(track, position, reason, Phase.REFRESH)
        self._forsake(track.faults, values[site.owner], site, f"memory budget: {over}")
        return True

    def _forsake(self, faults: Faults, owner: torch.Tensor, site: Site, reason: str) -> None:
        """The site stays dense as long as `faults` last, and its caches go."""
        faults.exempt(owner, site, reason)
        for home in self._homes():
            home.get(owner, {}).pop(site.ordinal, None)
        for each in self.tracks.values():
            each.prepared.clear()
            for branch in each.branches.values():
                branch.held.pop(site.index, None)
        self.shared_bytes.pop(site.index, None)
        self.held = self.account()

    def _make_room(self, need: int, place: Place) -> None:
        """Drop the caches of the generations that were called longest ago until `need` bytes fit the budget."""
        self.held = self.account()
        limit = self.limit(place)
        while (total := need + held(self.tag).at(place)) > limit:
            if not self._free_idle():
                name = "what is free of host memory" if place.on_host else "memory.budget_gb"
                raise _OverBudget(total, f"{name} ({limit / 1e9:.3g} GB)", place.on_host)

    def _free_idle(self) -> bool:
        """Free the generation that was called longest ago, of those that are not under way; false where there is none."""
        idle = [t for k, t in self.tracks.items() if k != self.latest and t.branches]
        if idle:
            oldest = min(idle, key=lambda track: track.last_call)
            self._free([oldest])
            oldest.dropped = True
        return bool(idle)

    def _free(self, tracks: Iterable[Track]) -> None:
        for track in tracks:
            self.store.drop([branch.caches for branch in track.branches.values()])
            track.branches.clear()
            track.prepared.clear()
        self.held = self.account()

    def _homes(self) -> list[Home]:
        return [self.store.shared, *(b.caches for t in self.tracks.values() for b in t.branches.values())]


def _masks(graph: Graph, values: Sequence[Any], known: Known) -> list[torch.Tensor] | None:
    """What a dense step needs to leave padded keys out; None where it is computed in the graph as it came."""
    return masks(graph, values, known) if graph.improves_dense and graph.rewrites and not graph.skips else None


_DROPPED = "its caches were dropped for those of another generation (memory.budget_gb)"
_NOTHING = Known()


class _OverBudget(Exception):
    """A branch's caches do not fit the memory budget."""

    def __init__(self, total: int, limit: str, on_host: bool) -> None:
        super().__init__(f"caches of {total / 1e9:.3g} GB exceed {limit}")
        self.limit, self.on_host = limit, on_host
