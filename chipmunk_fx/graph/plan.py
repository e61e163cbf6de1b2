"""Decide, for every candidate, whether it is rewritten or stays dense, and why. A plan is frozen and never edits a graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

import torch
from torch import fx

from chipmunk_fx.config import AttentionConfig, Config, MlpConfig
from chipmunk_fx.graph.capture import Capture
from chipmunk_fx.graph.flops import product_flops
from chipmunk_fx.graph.geometry import Geometry
from chipmunk_fx.graph.inputs import Roles
from chipmunk_fx.graph.match import Candidate
from chipmunk_fx.graph.pattern import AttentionOperands, MlpOperands
from chipmunk_fx.graph.sizes import Size, hints, is_data_dependent
from chipmunk_fx.graph.walk import ancestors, placeholders, projections, shape

GROUP_ROWS = 128  # rows that share a list where the user leaves it to us


@dataclass(frozen=True)
class Site:
    """One attention or MLP with all that the rewrite and the runtime need to know of it.

    `sizes`: attention (B, H, N, M, D); MLP (B, N, C, F, C2), N rows a batch. `owner` is the graph input (a parameter) by
    which its caches are kept, `ordinal` tells sites of one owner apart.
    """

    index: int
    name: str
    kind: Literal["attention", "mlp"]
    form: str
    where: str
    layer: int | None
    operands: AttentionOperands | MlpOperands
    nodes: tuple[fx.Node, ...]
    owner: int
    ordinal: int
    sizes: tuple[Size, ...]
    dtype: torch.dtype
    device: torch.device
    group_rows: int
    status: Literal["rewritten", "dense"] = "rewritten"
    reason: str = ""

    @property
    def rows(self) -> Size:
        """Length of the sequence whose rows are grouped."""
        return self.sizes[2] if self.kind == "attention" else self.sizes[1]

    @property
    def dense_flops(self) -> int:
        if self.kind == "attention":
            return 4 * prod(hints(self.sizes))
        b, n, c, f, out = hints(self.sizes)
        gated = isinstance(self.operands, MlpOperands) and self.operands.wu is not None
        return 2 * b * n * f * (c * (2 if gated else 1) + out)


@dataclass(frozen=True)
class StateInput:
    """A tensor that the runtime appends to a call's arguments: the clock, a table of a sequence, or a cache of a site."""

    name: str
    role: Literal["clock", "order", "always", "slot"]
    site: int | None = None
    slot: str | None = None


@dataclass(frozen=True)
class Plan:
    """`sites` in graph order (accepted ones), `refused` candidates, and what the graph's inputs mean."""

    sites: tuple[Site, ...]
    refused: tuple[Candidate, ...]
    roles: Roles
    geometry: Geometry
    rest_flops: int
    total_flops: int
    windowed: bool = False  # attention.local_window is set

    @property
    def rewritten(self) -> tuple[Site, ...]:
        return tuple(s for s in self.sites if s.status == "rewritten")

    @property
    def has_grid(self) -> bool:
        return self.geometry.sizes is not None or self.geometry.ids is not None

    @property
    def has_tables(self) -> bool:
        """Whether rows have an order other than as they come, or columns that are always on."""
        return self.has_grid or self.windowed


Gate = Callable[[Site], str | None]
"""Says why a site would not gain from sparsity, None where it would."""


def make_plan(
    capture: Capture, candidates: Sequence[Candidate], roles: Roles, geometry: Geometry, config: Config, gate: Gate
) -> Plan:
    inputs = [n for n in capture.module.graph.nodes if n.op == "placeholder"]
    # A piece of a model does not show which blocks come before it: the runtime counts them (Session.arrival).
    layers = {} if roles.timestep is None else number_layers(candidates, _node(inputs, roles.latents))
    sites: list[Site] = []
    refused = [c for c in candidates if c.operands is None]
    owners: Counter[int] = Counter()
    for candidate in candidates:
        if candidate.operands is None:
            continue
        owner = _owner(candidate.operands, capture, inputs)
        sizes = _sizes(candidate)
        if owner is None:
            refused.append(replace(candidate, operands=None, reason="no parameter behind it to keep its caches by"))
        elif is_data_dependent(sizes):
            refused.append(replace(candidate, operands=None, reason="its length is known only while the graph runs"))
        else:
            layer = layers.get(candidate)
            site = _site(len(sites), candidate, owner, owners[owner], sizes, layer, config)
            owners[owner] += 1
            sites.append(_decide(site, config, gate))
    explained = {n for s in sites for n in s.nodes}
    beside = product_flops(capture.module, explained)
    rest = beside + sum(_beside_flops(s) for s in sites)
    total = rest + sum(s.dense_flops for s in sites)
    return Plan(tuple(sites), tuple(refused), roles, geometry, rest, total, config.attention.local_window > 0)


def number_layers(candidates: Sequence[Candidate], latents: fx.Node | None) -> dict[Candidate, int]:
    """Block index of each candidate: blocks in order of their first attention that depends on the latents.

    An MLP belongs to its block or, where modules have no names, to the attention before it. Text-only refiners have none.
    """
    order: dict[str, int] = {}
    layers: dict[Candidate, int] = {}
    last: int | None = None
    for candidate in candidates:
        block = candidate.block
        if candidate.kind == "attention" and candidate.form != "cross":
            if latents is not None and latents not in placeholders(candidate.anchor):
                continue
            last = layers[candidate] = order.setdefault(block or candidate.name, len(order))
        elif candidate.kind == "mlp" and (layer := order.get(block) if block else last) is not None:
            layers[candidate] = layer
    return layers


def state_inputs(plan: Plan) -> tuple[StateInput, ...]:
    """What every rewritten variant takes after the graph's own inputs, in this order."""
    entries = [StateInput("clock", "clock")]
    for site in plan.rewritten:
        if plan.has_tables:
            entries.append(StateInput(f"order_{site.index}", "order", site.index))
            if site.kind == "attention":
                entries.append(StateInput(f"always_{site.index}", "always", site.index))
        names = ("rest", "share", "lists") if site.kind == "attention" else ("hidden", "out", "mean", "lists")
        entries += [StateInput(f"{name}_{site.index}", "slot", site.index, name) for name in names]
    return tuple(entries)


def _decide(site: Site, config: Config, gate: Gate) -> Site:
    settings = config.attention if site.kind == "attention" else config.mlp
    reason = None
    if not settings.enabled:
        reason = f"{site.kind}.enabled is false"
    elif site.layer is not None and site.layer < settings.dense_layers:
        reason = f"block {site.layer + 1} of the first {settings.dense_layers} ({site.kind}.dense_layers)"
    elif config.gate == "auto":
        reason = gate(site)
    return replace(site, status="dense", reason=reason) if reason else site


def _site(
    index: int, candidate: Candidate, owner: int, ordinal: int, sizes: tuple, layer: int | None, config: Config
) -> Site:
    assert candidate.operands is not None
    settings: AttentionConfig | MlpConfig = config.attention if candidate.kind == "attention" else config.mlp
    rows = GROUP_ROWS if settings.group_rows == "auto" else int(settings.group_rows)
    value = candidate.anchor.meta["val"]
    kind = "attention" if candidate.kind == "attention" else "mlp"
    return Site(
        index, candidate.name, kind, candidate.form, candidate.where, layer, candidate.operands, candidate.nodes,
        owner, ordinal, sizes, value.dtype, value.device, rows,
    )  # fmt: skip


def _sizes(candidate: Candidate) -> tuple[Size, ...]:
    operands = candidate.operands
    if isinstance(operands, AttentionOperands):
        b, h, n, d = operands.q.shape
        return b, h, n, operands.k.shape[2], d
    assert isinstance(operands, MlpOperands)
    x = shape(operands.x)
    rows = 1
    for size in x[1:-1]:
        rows = rows * size
    hidden = operands.w1.stop - operands.w1.start if operands.w1.dim is not None else shape(operands.w1.node)[0]
    return x[0], rows, x[-1], hidden, shape(operands.w2.node)[0]


def _owner(operands: AttentionOperands | MlpOperands, capture: Capture, inputs: Sequence[fx.Node]) -> int | None:
    """The parameter nearest to the site: the query projection's weight, or the first linear's."""
    parameters = {n: i for i, n in enumerate(inputs) if capture.inputs[i].is_parameter}
    if isinstance(operands, MlpOperands):
        starts = [operands.w1.node]
    else:
        starts = [a for p in projections(operands.q.node) if isinstance(a := p.args[1], fx.Node)]
    for start in starts:
        for node in ancestors(start, lambda n: False):
            if node in parameters:
                return parameters[node]
    return None


def _node(inputs: Sequence[fx.Node], index: int | None) -> fx.Node | None:
    return None if index is None else inputs[index]


def _beside_flops(site: Site) -> int:
    operands = site.operands
    if not isinstance(operands, MlpOperands) or operands.beside is None:
        return 0
    b, n, _, _, out = hints(site.sizes)
    weight = operands.beside.weight
    return 2 * b * n * out * (weight.stop - weight.start)
