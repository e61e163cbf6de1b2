"""One compiled graph as the runtime sees it: what it was captured as, its plan, its variants."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import fx

from chipmunk_fx.config import Config
from chipmunk_fx.graph.capture import Capture
from chipmunk_fx.graph.kept_attention import has_long_attention
from chipmunk_fx.graph.plan import Plan
from chipmunk_fx.graph.state import state_inputs
from chipmunk_fx.runtime.variants import Variants
from chipmunk_fx.schedule.phase import Phase

_PASSED = 3  # sessions in a row that were lost after one call, before caches are no longer tried


class Graph:
    """Shared by all models it serves. `owner`: the input (a parameter) by which a call's session is found."""

    def __init__(
        self, capture: Capture, plan: Plan, config: Config, variants: Variants, owner: int | None = None
    ) -> None:
        self.capture, self.plan, self.config, self.variants = capture, plan, config, variants
        self.entries = state_inputs(plan, Phase.REFRESH)
        self.counts = {phase: len(state_inputs(plan, phase)) for phase in Phase}
        parameters = (i for i, entry in enumerate(capture.inputs) if entry.is_parameter)
        if owner is None:
            owner = (plan.rewritten or plan.sites)[0].owner if plan.sites else next(parameters)
        self.owner = owner
        self.is_piece = not plan.roles.timed
        self.free = [i for i, entry in enumerate(capture.inputs) if entry.is_tensor and not entry.is_parameter]
        self.owners = tuple(sorted({site.owner for site in plan.rewritten}))
        self.rewrites, self.skips = bool(plan.rewritten), bool(plan.streams)
        self.improves_dense = bool(plan.masks) or has_long_attention(capture.module.graph)
        kinds = {s.kind for s in plan.rewritten}
        self.keeps_lists = "attention" in kinds and not config.attention.renew_lists
        # of MLPs; those that lie on the host pass through buffers that other sites use, too
        self.keeps_weights = not any(s.kind == "mlp" and s.passage for s in plan.rewritten)
        self.settings = [s for kind, s in (("attention", config.attention), ("mlp", config.mlp)) if kind in kinds]
        self._without: dict[frozenset[int], Graph] = {}
        self._stranger: weakref.ref | None = None  # the session met last for the first time
        self._lost = 0  # such sessions in a row whose parameters were gone before they came again

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
            self._without[key] = Graph(self.capture, plan, self.config, self.variants.of(plan), self.owner)
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
        """Whether a call changes one of its inputs, so that it cannot be done over."""
        return any(_written_input(node) for node in self.capture.module.graph.nodes)

    @cached_property
    def repeatable(self) -> bool:
        """Whether a call can be done over: it changes no input, and draws no random numbers."""
        return not self.writes_inputs and not any(_draws(node) for node in self.capture.module.graph.nodes)


def _draws(node: fx.Node) -> bool:
    """Whether it takes random numbers: not where it would drop values, but none in fact."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    arguments = node.target._schema.arguments  # pyright: ignore
    given = {argument.name: argument.default_value for argument in arguments}
    given |= {argument.name: value for argument, value in zip(arguments, node.args, strict=False)} | node.kwargs
    return given.get("dropout_p", given.get("p")) != 0 and given.get("train") is not False


def _written_input(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or not schema.is_mutable:
        return False
    written = node.args[0] if node.args else None
    while isinstance(written, fx.Node) and written.op == "call_function":
        aliases = getattr(getattr(written.target, "_schema", None), "arguments", ())
        if not aliases or aliases[0].alias_info is None:
            return False
        written = written.args[0]
    return isinstance(written, fx.Node) and written.op == "placeholder"
