"""One model's state: its generations, their branches, and the caches of each. Found through a parameter, never by graph."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from chipmunk_fx.config import Config
from chipmunk_fx.errors import FallbackError
from chipmunk_fx.log import Notices, logger
from chipmunk_fx.runtime.assembly import Assembly, SiteOutOfMemory, masks
from chipmunk_fx.runtime.faults import Faults
from chipmunk_fx.runtime.generations import BIRTHS, RENEWING, Branch, Fallback, Made, Prepared, Record, Track
from chipmunk_fx.runtime.graphs import Graph
from chipmunk_fx.runtime.holdings import Holdings, OverBudget
from chipmunk_fx.runtime.known import Known, Prober
from chipmunk_fx.runtime.observe import GUIDED, Observer, Sight, are_branches, inputs_of
from chipmunk_fx.runtime.placement import giving_way
from chipmunk_fx.runtime.registry import active_scope, others, thread_key
from chipmunk_fx.schedule.phase import Phase
from chipmunk_fx.schedule.policies import policy_from
from chipmunk_fx.schedule.timeline import Position, Timeline
from chipmunk_fx.state.store import Place

_log = logger("runtime")
_BROKEN = "nan or inf in a cache"


class Session(Holdings):
    """Serves the calls of one model under one set of options; one call at a time."""

    def __init__(self, config: Config, limit: Callable[[Place], int], arrival: int, notices: Notices) -> None:
        super().__init__(limit, config)
        self.config, self.arrival, self.notices = config, arrival, notices
        self.born = next(BIRTHS)
        self.observer = Observer()
        self.probers: weakref.WeakKeyDictionary[Graph, Prober] = weakref.WeakKeyDictionary()
        self.policy = policy_from(config.schedule)
        self.computing = policy_from(replace(config.schedule, skip_steps=None, skip_threshold=None))
        self.faults = Faults()
        self.calls = 0

    def call(self, graph: Graph, values: Sequence[Any]) -> Any:
        with self.lock:
            self.store.follow(values[graph.owner].device)
            return self._serve(graph, values)

    def example_state(self, graph: Graph, values: Sequence[Any]) -> list[torch.Tensor]:
        """State of the right shapes for compiling `graph`, kept by no one."""
        track = Track(Timeline())
        return self._state(graph, track, Branch(), values, self._known(graph, values))[0].state

    def reset(self) -> None:
        with self.lock:
            for track in self.tracks.values():
                track.timeline.reset()

    def _serve(self, graph: Graph, values: Sequence[Any]) -> Any:
        track, named = self._track(values, graph)
        known = self._known(graph, values)
        apart = weakref.ref(graph) if named is None and track.timeline.infers else None
        sight = self.observer.observe(graph.plan.roles, values, apart)
        early = self._ahead(graph, track, sight, named, values, known)
        position = self._locate(track, sight, named)
        if position.begins:  # what was written to through `.data` has no new version
            known = self._known(graph, values, again=True)
        self._doubt(graph, track, position, values)
        branch = track.branches.setdefault(position.branch, Branch())
        made, early = self._confirmed(early, track, branch, position), None  # a result that is wrong takes no memory
        if made is None:
            self._look_for_damage(track, branch, position)
            if track.dropped:
                self._fall_back(track, position, _DROPPED, Phase.REFRESH)
                track.dropped = False
            made = self._make(graph, track, branch, position, values, known)
        if made.problem is not None:
            return self._rescue(made.graph, track, position, values, made.problem)
        return self._passed(track, branch, made, values, known)

    def _ahead(
        self, graph: Graph, track: Track, sight: Sight, named: int | None, values: Sequence[Any], known: Known
    ) -> Made | None:
        """The call as what it is expected to be, begun before the device has told what it is: host and device would else wait
        for each other in turns. None where it is no usual one."""
        if sight.arrived is None or not graph.repeatable:
            return None
        position = track.timeline.expect(sight.told, named)
        branch = track.branches.get(position.branch) if position else None
        if position is None or branch is None or not self._is_usual(graph, track, branch, values, known):
            return None
        return self._make(graph, track, branch, position, values, known)

    def _confirmed(self, early: Made | None, track: Track, branch: Branch, position: Position) -> Made | None:
        """What was made ahead, if the call is what it was taken for. If not, what it wrote is lost with its branch's caches."""
        if early is None:
            return None
        if early.position != position:
            taken = track.branches.get(early.position.branch)
            if taken is not None and taken.health is not None:
                taken.health.clear()  # of what lies in caches that are lost
            if not position.begins:
                track.timeline.surprise()
            return None
        if not branch.damaged:
            return early
        branch.filled, branch.last_computed = early.before
        return None

    def _is_usual(self, graph: Graph, track: Track, branch: Branch, values: Sequence[Any], known: Known) -> bool:
        """Whether the next call of `branch` has all that it needs and nothing is there to be said of it."""
        if branch.damaged or track.dropped or (graph.rewrites and known.problem):
            return False
        able = track.faults.able(self.faults.able(graph, values), values)
        prepared = track.ready(able, branch, values, known)
        if prepared is None or self.faults.of(able) is not None:
            return False
        return branch.last_computed is not None or branch.of(prepared.names[0]) is not None

    def _make(
        self, graph: Graph, track: Track, branch: Branch, position: Position, values: Sequence[Any], known: Known
    ) -> Made:
        graph, phase, state, renew = self._ready(graph, track, branch, position, values, known)
        names = track.named(graph, branch, values, known)
        before = branch.filled, branch.last_computed
        branch.filled, branch.last_computed = {}, None  # an exception leaves the branch without valid caches
        result, problem = self._run(graph, phase, values, state, renew)
        return Made(position, graph, phase, result, problem, before, renew, state is not None, names)

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
            phase = self._phase(able, track, branch, position, values, known)
            problem = self.faults.of(able) or (able.rewrites and known.problem)
            if phase is Phase.DENSE and (not able.skips or not position.decided or problem):
                return able, phase, None if problem else _masks(able, values, known), True
            try:
                return able, *self._cached(able, track, branch, position, phase, values, known)
            except OverBudget as over:
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
        prepared, whole = self._state(graph, track, branch, values, known)
        if not whole:  # caches are new where a parameter was replaced
            branch.forget(prepared.names[0])
        filled = branch.of(prepared.names[0])
        # lists are of no use where other keys are padding
        listed = filled is not None and known.same(filled.known)
        fresh = not whole or (phase is Phase.SPARSE and not listed)
        fresh = fresh or (phase is Phase.SKIP and prepared.names[1] != branch.stack)
        if fresh and phase in (Phase.SPARSE, Phase.SKIP):
            phase = Phase.REFRESH if graph.rewrites else Phase.DENSE
        if track.clock is not None:
            first = filled is None or not graph.keeps_weights
            steps = 0 if filled is None else filled.sparse
            anew = first if phase is Phase.REFRESH else steps % self.config.mlp.list_lifetime == 0
            track.clock.tell(position.step, anew)
        renew = phase is not Phase.REFRESH or not listed or not graph.keeps_lists
        if track.known is not None:
            track.known.fill_(listed)
        return phase, prepared.state[: graph.counts[phase]], renew

    def _state(
        self, graph: Graph, track: Track, branch: Branch, values: Sequence[Any], known: Known
    ) -> tuple[Prepared, bool]:
        """The tensors after a call's own inputs, and whether all caches were there already."""
        if (prepared := track.ready(graph, branch, values, known)) is not None:
            return prepared, True
        layer = self.arrival if graph.is_piece else None
        assembly = Assembly(
            graph, self.config, self.store, track, branch, values, known, self.shared_bytes, self._make_room, layer
        )
        state = assembly.state()
        self.held = self.account()
        return track.prepare(graph, branch, values, known, state), assembly.whole

    def _known(self, graph: Graph, values: Sequence[Any], again: bool = False) -> Known:
        if graph.plan.probe is None:
            return _NOTHING
        if graph not in self.probers:
            self.probers[graph] = Prober(graph.plan.probe)
        return self.probers[graph].ask(values, again)

    def _track(self, values: Sequence[Any], graph: Graph) -> tuple[Track, int | None]:
        """The generations that the call is one of, and its branch where the caller names it."""
        scope = active_scope(values[graph.owner])
        key = scope.key if scope else thread_key()
        if key not in self.tracks:
            schedule = self.config.schedule
            timeline = Timeline(schedule.steps, schedule.branches, bounded=scope is not None)
            self.tracks[key] = Track(timeline, **self._inherited())
        self.calls += 1
        self.tracks[key].last_call, self.tracks[key].scope, self.latest = self.calls, scope, key
        return self.tracks[key], scope.branch if scope else None

    def _locate(self, track: Track, sight: Sight, named: int | None) -> Position:
        seen = sight.whole()
        position = track.timeline.advance(seen, named)
        if position.begins:
            self._sweep(track.branches.values())
            self.store.drop([branch.caches for branch in track.begin(seen.shape)])
        if position.remark:
            self.notices.once(_log, position.remark, key=position.remark)
        return position

    def _doubt(self, graph: Graph, track: Track, position: Position, values: Sequence[Any]) -> None:
        """What the first two calls of a marked generation bring to the first block tells whether both are of one step."""
        scope, told = track.scope, self.config.schedule.branches
        if told or not graph.is_piece or scope is None or not scope.asks(self):
            return
        if position.step <= 1:
            before, track.inputs = track.inputs, inputs_of(graph.plan.roles, values)
            if position.step == 1 and are_branches(before, track.inputs):
                track.doubt = GUIDED
        scope.doubt = scope.doubt or track.doubt

    def _phase(
        self, graph: Graph, track: Track, branch: Branch, position: Position, values: Sequence[Any], known: Known
    ) -> Phase:
        if graph.is_piece and any(settings.is_dense(self.arrival) for settings in graph.settings):
            return Phase.DENSE
        if not position.decided:
            reason = position.reason or "its place in the generation is undecidable"
            return self._fall_back(track, position, reason + _CUT * graph.resumed)
        if graph.is_piece and track.scope is not None and track.scope.doubt:
            return self._fall_back(track, position, track.scope.doubt)
        if problem := (graph.rewrites and known.problem) or self.faults.of(graph):
            return self._fall_back(track, position, problem)
        history = branch.history(track.named(graph, branch, values, known)[0])
        if not graph.rewrites:
            phase = self.policy.phase(position.step, history)
            return phase if phase is Phase.SKIP else Phase.DENSE
        if graph.skips:
            return self.policy.phase(position.step, history)
        if self.policy is not self.computing and self.policy != self.computing:
            why = "a block does not show what is around it" if graph.is_piece else graph.plan.region
            self.notices.once(_log, f"no step is skipped, whatever schedule.skip_* say ({why})", key="skip")
        return self.computing.phase(position.step, history)

    def _look_for_damage(self, track: Track, branch: Branch, position: Position) -> None:
        """Caches with nan or inf in them are made anew."""
        if branch.health is not None and branch.health.broken() and branch.filled:
            branch.forget()
            self._fall_back(track, position, _BROKEN, Phase.REFRESH)

    def _fall_back(self, track: Track, position: Position, reason: str, phase: Phase = Phase.DENSE) -> Phase:
        if self.config.strict:
            raise FallbackError.of(f"step {position.step}, branch {position.branch}", reason)
        track.fallbacks.append(Fallback(position.step, position.branch, reason, phase))
        doing = "running dense" if phase is Phase.DENSE else "refreshing caches early"
        self.notices.once(_log, f"{doing}: {reason}", key=reason)
        return phase

    def _passed(self, track: Track, branch: Branch, made: Made, values: Sequence[Any], known: Known) -> Any:
        """The result of a call that is what it was made as."""
        step, phase = made.position.step, made.phase
        branch.filled, branch.last_computed = made.before
        if phase is Phase.REFRESH:
            branch.refreshed(step, made.names[0], known)
        if track.renews(phase, made.position, self.computing):
            self.notices.once(_log, RENEWING, key=RENEWING)
        if phase is not Phase.SKIP:
            if (filled := branch.of(made.names[0])) is not None:
                filled.sparse = filled.sparse + 1 if phase is Phase.SPARSE else 0
            if made.rewritten and made.graph.skips and made.graph.plan.stores(phase):
                branch.computed(step, made.names[1])
            if branch.health is not None:
                branch.health.send()
        track.records.append(Record(step, made.position.branch, phase, weakref.ref(made.graph), made.renew))
        _log.debug("step %d branch %d: %s", step, made.position.branch, phase)
        return made.result

    def _exempt(self, track: Track, position: Position, values: Sequence[Any], error: SiteOutOfMemory) -> None:
        """The site stays dense from now on, unless idle generations or other settings had memory to give."""
        site, owner = error.site, values[error.site.owner]
        if self._free_idle() or any([other.release() for other in others(owner, self)]):
            return
        self._fall_back(track, position, str(error))
        self._forsake(self.faults, owner, site, str(error))

    def _give_way(
        self, graph: Graph, track: Track, position: Position, values: Sequence[Any], over: OverBudget
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


def _masks(graph: Graph, values: Sequence[Any], known: Known) -> list[torch.Tensor] | None:
    """What a dense step needs to leave padded keys out; None where it is computed in the graph as it came."""
    return masks(graph, values, known) if graph.improves_dense and graph.rewrites and not graph.skips else None


_DROPPED = "its caches were dropped for those of another generation (memory.budget_gb)"
_CUT = (
    "; Dynamo has cut the model's graph before this piece: where no call but the first does what that was for (tables made "
    "when they are needed first), torch._dynamo.reset() once after it has the next call traced whole"
)
_NOTHING = Known()
