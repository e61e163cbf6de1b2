"""What the graph of a phase takes beside the user's inputs: masks, clock, tables, caches, and how they reach a device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import fx

from chipmunk_fx.graph.plan import Plan, Site
from chipmunk_fx.schedule.phase import Phase

ATTENTION_SLOTS = ("rest", "share", "lists", "lse")
OF_REFRESHES = ("lse",)  # which sparse steps do not read
FP8_SLOTS = ("w1_fp8", "scales", "change_scale")
OF_MLP_REFRESHES = ("by_neuron", *FP8_SLOTS)  # which no other step writes
MLP_SLOTS = ("hidden", "out", "mean", "lists", *OF_MLP_REFRESHES)
# What tells that a site's caches are broken, and how much of each row: a hidden value that is not finite is in all of `out`.
WATCHED = {"attention": ("rest", 1 << 30), "mlp": ("out", 64)}


@dataclass(frozen=True)
class StateInput:
    """A tensor that the runtime appends to a call's arguments.

    What is known of a mask, what the blocks added to a stream and how far that moved, whether a cache is broken, the clock,
    whether a refresh has been before, the streams of copies, a table of a sequence, a cache of a site, or the buffer on the
    device through which caches that lie on the host pass. `of`: index of the mask, stream, site or, for a "stage", the lane.
    """

    name: str
    role: Literal[
        "valid", "span", "residual", "change", "broken", "clock", "known", "lanes", "stage", "order", "always", "slot"
    ]
    of: int | None = None
    slot: str | None = None

    @property
    def key(self) -> tuple[int | None, str]:
        """Unlike for all inputs of a graph."""
        return self.of, f"stage {self.slot}" if self.role == "stage" else self.slot or self.role


def state_inputs(plan: Plan, phase: Phase) -> tuple[StateInput, ...]:
    """What the variant of `phase` takes after the graph's own inputs, in this order: those of a refresh, or their beginning."""
    entries = [StateInput(f"{role}_{i}", role, i) for i in range(len(plan.masks)) for role in ("valid", "span")]
    if plan.stores(phase) or phase is Phase.SKIP:
        entries += [StateInput(f"residual_{i}", "residual", i) for i in range(len(plan.streams))]
    if plan.stores(phase) and plan.measured:
        entries += [StateInput(f"change_{i}", "change", i) for i in range(len(plan.streams))]
    if phase in (Phase.DENSE, Phase.SKIP):
        return tuple(entries)
    entries += [StateInput("broken", "broken"), StateInput("clock", "clock"), *_passage(plan), *_caches(plan)]
    if phase is Phase.REFRESH and plan.tells_known:
        entries.append(StateInput("known", "known"))
    return tuple(entries)


def add_inputs(graph: fx.Graph, entries: tuple[StateInput, ...]) -> dict[tuple[int | None, str], fx.Node]:
    """Placeholders for these inputs, after those that the graph has."""
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    made = {}
    for entry in entries:
        with graph.inserting_after(last):
            last = graph.placeholder(f"chipmunk_{entry.name}")
        # Static for CUDA graphs, yet never guarded: the runtime swaps them from call to call.
        last.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
        made[entry.key] = last
    return made


def slot_names(site: Site) -> tuple[str, ...]:
    if site.kind == "attention":
        return (
            ATTENTION_SLOTS if site.keeps_lse else tuple(name for name in ATTENTION_SLOTS if name not in OF_REFRESHES)
        )
    return MLP_SLOTS if site.fp8 else tuple(name for name in MLP_SLOTS if name not in FP8_SLOTS)


def _passage(plan: Plan) -> Iterator[StateInput]:
    sent = [site for site in plan.rewritten if site.passage]
    if sent:
        yield StateInput("lanes", "lanes")
    staged = {(site.passage.lane(name), name): None for site in sent if site.passage for name in slot_names(site)}
    for lane, name in sorted(staged, key=lambda key: key[0]):
        yield StateInput(f"stage_{lane}_{name}", "stage", lane, name)


def _caches(plan: Plan) -> Iterator[StateInput]:
    for site in plan.rewritten:
        if plan.has_tables:
            yield StateInput(f"order_{site.index}", "order", site.index)
            if site.kind == "attention":
                yield StateInput(f"always_{site.index}", "always", site.index)
        for name in slot_names(site):
            yield StateInput(f"{name}_{site.index}", "slot", site.index, name)
