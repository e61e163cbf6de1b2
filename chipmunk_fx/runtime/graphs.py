"""One compiled graph as the runtime sees it: what it was captured as, its plan, its variants."""

from __future__ import annotations

import hashlib
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from chipmunk_fx.config import Config
from chipmunk_fx.graph import effects
from chipmunk_fx.graph.capture import Capture
from chipmunk_fx.graph.kept_attention import has_long_attention
from chipmunk_fx.graph.plan import Plan, Site
from chipmunk_fx.graph.sizes import bindings, evaluate, evaluated, symbols_in
from chipmunk_fx.graph.state import state_inputs
from chipmunk_fx.runtime.variants import Variants
from chipmunk_fx.schedule.phase import Phase

Key = tuple[Any, ...]
"""What tells caches of one Parameter apart, the ordinal of their site and the number of its sites first."""

Named = tuple[int, Key]
"""A site as it is in a call: the id of its Parameter object, whose caches are new where that is, and what they are kept by."""

Names = frozenset[Named]

_PASSED = 3  # sessions in a row that were lost after one call, before caches are no longer tried


class Graph:
    """Shared by all models it serves. `owner`: the input (a parameter) by which a call's session is found; `resumed`: a graph
    before it ended where Dynamo could not follow."""

    def __init__(
        self,
        capture: Capture,
        plan: Plan,
        config: Config,
        variants: Variants,
        owner: int | None = None,
        resumed: bool = False,
    ) -> None:
        self.capture, self.plan, self.config, self.variants = capture, plan, config, variants
        self.entries = state_inputs(plan, Phase.REFRESH)
        self.counts = {phase: len(state_inputs(plan, phase)) for phase in Phase}
        parameters = (i for i, entry in enumerate(capture.inputs) if entry.is_parameter)
        if owner is None:
            owner = (plan.rewritten or plan.sites)[0].owner if plan.sites else next(parameters)
        self.owner = owner
        self.is_piece, self.resumed = not plan.roles.timed, resumed
        self.free = [i for i, entry in enumerate(capture.inputs) if entry.is_tensor and not entry.is_parameter]
        self.owners = tuple(sorted({site.owner for site in plan.rewritten}))
        self.rewrites, self.skips = bool(plan.rewritten), bool(plan.streams)
        self.improves_dense = bool(plan.masks) or has_long_attention(capture.module.graph)
        kinds = {s.kind for s in plan.rewritten}
        self.keeps_lists = "attention" in kinds and not config.attention.renew_lists
        # of MLPs; those that lie on the host pass through buffers that other sites use, too
        self.keeps_weights = not any(s.kind == "mlp" and s.passage for s in plan.rewritten)
        self.settings = [s for kind, s in (("attention", config.attention), ("mlp", config.mlp)) if kind in kinds]
        sizes = [*(size for site in plan.sites for size in site.sizes), *(n for _, given in plan.moves for n in given)]
        self._symbols = symbols_in(sizes)
        self.numbers = [i for i, entry in enumerate(capture.inputs) if {*symbols_in([entry.value])} & {*self._symbols}]
        self._kept: tuple[tuple[int | None, ...], dict[int, Key], str] | None = None  # the answer given last
        self._counts = Counter(site.owner for site in plan.sites)
        self._without: dict[frozenset[int], Graph] = {}
        self._stranger: weakref.ref | None = None  # the session met last for the first time
        self._lost = 0  # such sessions in a row whose parameters were gone before they came again

    def named(self, values: Sequence[Any], lengths: Mapping[Any, int]) -> tuple[Names, Names]:
        """Its sites in this call, those that are rewritten and all. lengths: those that depend on the data."""
        told = sorted([*self.free, *self.numbers])  # sizes of parameters are no symbols
        symbols = bindings([self.capture.inputs[i].value for i in told], [values[i] for i in told])
        keys, _ = self.kept_by(symbols | lengths)
        names = {site.index: (id(values[site.owner]), keys[site.index]) for site in self.plan.sites}
        return frozenset(names[site.index] for site in self.plan.rewritten), frozenset(names.values())

    def shared_by(self, site: Site) -> tuple[int, int]:
        """What tells sites of one Parameter apart: the ordinal among so many, since a module that serves several blocks may be
        called without the first of them."""
        return site.ordinal, self._counts[site.owner]

    def kept_by(self, symbols: Mapping[Any, int]) -> tuple[dict[int, Key], str]:
        """By index of each site, the same of its caches that hold rows: of others, or moved otherwise, they are others. And how
        rows are moved."""
        told = tuple(map(symbols.get, self._symbols))
        if (known := self._kept) is None or known[0] != told:
            moves = [(op, *(evaluated(n, symbols) for n in numbers)) for op, numbers in self.plan.moves]
            moved = hashlib.sha256(str(moves).encode()).hexdigest()
            keys = {s.index: (*self.shared_by(s), evaluate(s.sizes, symbols), moved) for s in self.plan.sites}
            self._kept = known = told, keys, moved
        return known[1:]

    def without(self, reasons: Mapping[int, str]) -> Graph:
        """The same with some sites (index -> reason) dense, in graphs of its own.

        With dynamic shapes all become dense: guards that a graph built after the first call would add are not enforced.
        """
        if self.is_whole:
            (reason,) = dict.fromkeys(reasons.values()) if len(set(reasons.values())) == 1 else ["out of memory"]
            reasons = {site.index: reason for site in self.plan.rewritten}
        key = frozenset(reasons)
        if key not in self._without:
            sites = tuple(
                replace(s, status="dense", reason=reasons[s.index]) if s.index in reasons else s
                for s in self.plan.sites
            )
            skips = self.plan.skips and not self.is_whole
            plan = replace(self.plan, sites=sites, skips=skips)
            self._without[key] = Graph(
                self.capture, plan, self.config, self.variants.of(plan), self.owner, self.resumed
            )
        return self._without[key]

    @property
    def is_whole(self) -> bool:
        """Whether sites become dense all together or not at all."""
        return self.capture.dynamic and self.config.lowering != "eager"

    def in_passing(self, session: Any, calls: int) -> bool:
        """Whether parameters are replaced at every call, so that no cache would be met again: `session` has had `calls`."""
        if calls:
            self._lost = 0
            return False
        gone = self._stranger is not None and self._stranger() is None
        self._lost = self._lost + 1 if gone else 0
        self._stranger = weakref.ref(session)
        return self._lost >= _PASSED

    @cached_property
    def writes_inputs(self) -> bool:
        """Whether a call changes one of its inputs, so that one that failed half-way cannot be done over."""
        return effects.writes_inputs(self.capture.module.graph)

    @cached_property
    def repeatable(self) -> bool:
        """Whether a call can be made twice in place of once."""
        return effects.repeatable(self.capture.module.graph)
