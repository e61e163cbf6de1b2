"""Decide, for every candidate, whether it is rewritten or stays dense, and why. A plan is frozen and never edits a graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal

import torch
from torch import fx

from chipmunk_fx.config import AttentionConfig, Config, MlpConfig
from chipmunk_fx.graph.capture import Capture
from chipmunk_fx.graph.flops import product_flops
from chipmunk_fx.graph.geometry import Geometry
from chipmunk_fx.graph.inputs import Roles
from chipmunk_fx.graph.layers import number_layers
from chipmunk_fx.graph.masks import Mask, Probe, make_probe, probe_refusal, tellers_of
from chipmunk_fx.graph.match import Candidate
from chipmunk_fx.graph.passage import Passage
from chipmunk_fx.graph.pattern import AttentionOperands, MlpOperands
from chipmunk_fx.graph.region import Region, Stream, dead_after_skip, find_region
from chipmunk_fx.graph.routing import Move, choice_refusal, moves_of, orders_of, steady
from chipmunk_fx.graph.sizes import Size, bindings, evaluate, hints, unbacked
from chipmunk_fx.graph.walk import ancestors, placeholders, projections, shape
from chipmunk_fx.ops.groups import GROUP_ROWS
from chipmunk_fx.schedule.phase import Phase


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
    hints: tuple[int, ...]  # sizes seen while compiling
    dtype: torch.dtype
    device: torch.device
    group_rows: int
    tokens_first: bool = False  # an MLP on [N, B, C], not [B, N, C]
    status: Literal["rewritten", "dense"] = "rewritten"
    reason: str = ""
    passage: Passage | None = None  # of caches that lie on the host between steps
    fp8: bool = False  # the products of an MLP's sparse steps are made in fp8
    keeps_lse: bool = False  # an attention keeps the denominators of a refresh for the next one

    @property
    def rows(self) -> Size:
        """Length of the sequence whose rows are grouped."""
        return self.sizes[2] if self.kind == "attention" else self.sizes[1]

    @property
    def dense_flops(self) -> int:
        if self.kind == "attention":
            return 4 * prod(self.hints)
        b, n, c, f, out = self.hints
        return 2 * b * n * f * (c * self.first_weights + out)

    @property
    def first_weights(self) -> int:
        """Weights of the first product of an MLP: two where there is an up branch."""
        return 2 if isinstance(self.operands, MlpOperands) and self.operands.wu is not None else 1

    def noted(self, note: str) -> Site:
        """The same with more to say of it."""
        return replace(self, reason="; ".join(said for said in (self.reason, note) if said))


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
    probe: Probe | None = None  # tells masks and lengths before the model runs
    region: Region | str = "not looked for"  # the blocks that a skipped step leaves out, or why none are
    skips: bool = False  # steps are to be skipped
    skip_flops: int = 0  # operations of a skipped step
    measured: bool = False  # computed steps tell how far what the blocks add has moved
    moves: tuple[Move, ...] = ()  # of rows of activations
    tells_known: bool = (
        False  # refreshes are told whether there has been one before; else it takes a graph more to keep lists
    )

    @property
    def rewritten(self) -> tuple[Site, ...]:
        return tuple(s for s in self.sites if s.status == "rewritten")

    @property
    def streams(self) -> tuple[Stream, ...]:
        """Residual streams through the region, whose residuals every computed step keeps."""
        return self.region.streams if self.skips and isinstance(self.region, Region) else ()

    def stores(self, phase: Phase) -> bool:
        """Whether the variant keeps residuals."""
        return bool(self.streams) and phase is not Phase.SKIP

    def in_region(self, site: Site) -> bool:
        return isinstance(self.region, Region) and site.nodes[0] in self.region.nodes

    @property
    def masks(self) -> tuple[Mask, ...]:
        """The key-padding masks, whose sites are computed by our ops in every phase."""
        return self.probe.masks if self.probe else ()

    def mask_of(self, site: Site) -> int | None:
        mask = _mask(site.operands)
        return self.masks.index(mask) if mask in self.masks else None

    @property
    def has_grid(self) -> bool:
        return self.geometry.sizes is not None or self.geometry.ids is not None

    @property
    def has_tables(self) -> bool:
        """Whether rows have an order other than as they come, or columns that are always on."""
        return self.has_grid or self.windowed


Gate = Callable[[Site], str | None]
"""Says why a site would not gain from sparsity, None where it would."""

GroupRows = Callable[[str, torch.device, torch.dtype, Sequence[int]], int]
"""Rows that share a list where the user leaves it to us, from a site's kind, device, dtype and sizes."""


def make_plan(
    capture: Capture,
    candidates: Sequence[Candidate],
    roles: Roles,
    geometry: Geometry,
    config: Config,
    gate: Gate,
    real: Sequence[Any],
    group_rows: GroupRows = lambda *_: GROUP_ROWS,
) -> Plan:
    """`real`: the inputs of the call that compiles, from which data-dependent lengths are learnt."""
    inputs = [n for n in capture.module.graph.nodes if n.op == "placeholder"]
    # A piece of a model does not show which blocks come before it: the runtime counts them (Session.arrival).
    layers = number_layers(candidates, _node(inputs, roles.latents)) if roles.timed else {}
    refused = [c for c in candidates if c.operands is None]
    accepted: list[tuple[Candidate, int]] = []
    orders = orders_of(capture, roles)
    for candidate in candidates:
        if candidate.operands is None:
            continue
        owner = _owner(candidate.operands, capture, inputs)
        problem = (
            "no parameter behind it to keep its caches by" if owner is None else _unknown_length(candidate, capture)
        )
        problem = problem or _nothing(candidate) or choice_refusal(candidate.operands, orders)
        problem = problem or _embeds(candidate, _node(inputs, roles.latents), roles.timed)
        if owner is None or problem:
            refused.append(replace(candidate, operands=None, reason=problem))
        else:
            accepted.append((candidate, owner))
    probe = _probe(capture, [candidate for candidate, _ in accepted])
    known = bindings(capture.fakes, real) | (probe(real)[1] if probe and probe.lengths else {})
    found: list[Site] = []
    owners: Counter[int] = Counter()
    for candidate, owner in accepted:
        layer = layers.get(candidate)
        found.append(_site(len(found), candidate, owner, owners[owner], layer, config, known, group_rows))
        owners[owner] += 1
    streams = {(s.hints[0], s.hints[2]) for s in found if s.kind == "attention"}
    sites = [
        _decide(_laid_out(site, streams), candidate.dense, config, gate)
        for site, (candidate, _) in zip(found, accepted, strict=True)
    ]
    explained = {n for s in sites for n in s.nodes}
    beside = product_flops(capture.module, explained)
    rest = beside + sum(_beside_flops(s) for s in sites)
    total = rest + sum(s.dense_flops for s in sites)
    windowed = config.attention.local_window > 0
    region = steady(find_region(capture, candidates, _node(inputs, roles.latents)), orders)
    spared = set() if isinstance(region, str) else dead_after_skip(capture.module, region)
    measured = config.schedule.skip_threshold is not None
    skips = (bool(config.schedule.skip_steps) or measured) and not isinstance(region, str)
    return Plan(
        tuple(sites), tuple(refused), roles, geometry, rest, total, windowed, probe, region, skips,
        product_flops(capture.module, spared), measured, moves_of(capture, orders),
    )  # fmt: skip


def _embeds(candidate: Candidate, latents: fx.Node | None, whole: bool) -> str | None:
    """Why an MLP is an embedder of the conditioning: it depends on no latents, and stands outside the stacks of blocks.

    A refiner of the text is a stack of blocks too. Rows [rows, width] of all samples in one are taken wherever they stand.
    """
    operands = candidate.operands
    if latents is None or candidate.block or not isinstance(operands, MlpOperands) or len(shape(operands.x)) < 3:
        return None
    sources = placeholders(operands.x)
    if latents in sources:
        return None
    if not whole:
        return "no latents are seen behind it in this piece of the model: a text's feed-forward, or an embedder"
    return "embeds the conditioning: no latents behind it, no block of a stack"


def _nothing(candidate: Candidate) -> str | None:
    """Why there is nothing to compute: no tokens, or a width of 0 (a branch that a small configuration rounds away)."""
    sizes = _sizes(candidate)
    return f"sizes {', '.join(map(str, sizes))}: nothing to compute" if 0 in hints(sizes) else None


def _unknown_length(candidate: Candidate, capture: Capture) -> str | None:
    """Why the site's data-dependent sizes cannot be learnt before the model runs."""
    tellers = tellers_of(capture.module) if (symbols := unbacked(_sizes(candidate))) else {}
    for symbol in symbols:
        refusal = probe_refusal(tellers[symbol][0]) if symbol in tellers else f"nothing tells {symbol}"
        if refusal:
            return f"its length is known only while the graph runs: {refusal}"
    return None


def _probe(capture: Capture, accepted: Sequence[Candidate]) -> Probe | None:
    masks: dict[Mask, None] = {}
    symbols: dict[Any, None] = {}
    for candidate in accepted:
        symbols |= dict.fromkeys(sorted(unbacked(_sizes(candidate)), key=str))
        if (mask := _mask(candidate.operands)) and not candidate.dense:
            masks[mask] = None
    return make_probe(capture.module, tuple(masks), symbols)


def _mask(operands: AttentionOperands | MlpOperands | None) -> Mask | None:
    if not isinstance(operands, AttentionOperands) or operands.mask is None:
        return None
    return Mask(operands.mask, operands.hides)


def _decide(site: Site, reason: str | None, config: Config, gate: Gate) -> Site:
    settings = config.attention if site.kind == "attention" else config.mlp
    if reason:
        pass
    elif not settings.enabled:
        reason = f"{site.kind}.enabled is false"
    elif site.layer is not None and settings.is_dense(site.layer):
        listed = f"block {site.layer} ({site.kind}.layers)"
        first = f"block {site.layer}, of the first {settings.dense_layers} ({site.kind}.dense_layers)"
        reason = listed if settings.of_layer(site.layer) else first
    elif config.gate == "auto":
        reason = gate(site)
    if reason:
        return replace(site, status="dense", reason=reason)
    said = settings.of_layer(site.layer)
    return (
        site if said is None else replace(site, reason=f"density {said:g} for block {site.layer} ({site.kind}.layers)")
    )


def _site(
    index: int,
    candidate: Candidate,
    owner: int,
    ordinal: int,
    layer: int | None,
    config: Config,
    known: Mapping[Any, int],
    group_rows: GroupRows,
) -> Site:
    assert candidate.operands is not None
    sizes = _sizes(candidate)
    settings: AttentionConfig | MlpConfig = config.attention if candidate.kind == "attention" else config.mlp
    value = candidate.anchor.meta["val"]
    kind = "attention" if candidate.kind == "attention" else "mlp"
    seen = evaluate(sizes, known)
    wanted = settings.group_rows
    rows = group_rows(kind, value.device, value.dtype, seen) if wanted == "auto" else int(wanted)
    return Site(
        index, candidate.name, kind, candidate.form, candidate.where, layer, candidate.operands, candidate.nodes,
        owner, ordinal, sizes, seen, value.dtype, value.device, rows,
    )  # fmt: skip


def _laid_out(site: Site, streams: Set[tuple[int, int]]) -> Site:
    """An MLP whose input is laid out tokens first, as (batch, length) of an attention tell."""
    first, second = site.hints[:2]
    given = site.operands
    rank = len(shape(given.x)) if isinstance(given, MlpOperands) and not given.channels_first else 0
    if rank != 3 or (second, first) not in streams or (first, second) in streams:
        return site
    sizes, hinted = ((n, b, *rest) for b, n, *rest in (site.sizes, site.hints))
    return replace(site, sizes=sizes, hints=hinted, tokens_first=True)


def _sizes(candidate: Candidate) -> tuple[Size, ...]:
    operands = candidate.operands
    if isinstance(operands, AttentionOperands):
        b, h, n, d = operands.q.shape
        return b, h, n, operands.k.shape[2], d
    assert isinstance(operands, MlpOperands)
    x = shape(operands.x)
    if operands.channels_first:
        x = (x[0], *x[2:], x[1])
    if len(x) == 2:  # the rows of all samples, one after the other
        x = (1, *x)
    hidden = operands.w1.stop - operands.w1.start if operands.w1.dim is not None else shape(operands.w1.node)[0]
    return x[0], prod(x[1:-1]), x[-1], hidden, shape(operands.w2.node)[0]


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
    if not isinstance(operands, MlpOperands):
        return 0
    b, n, c, _, out = site.hints
    kept = c * operands.kept.width if operands.kept else 0
    beside = out * (operands.beside.weight.stop - operands.beside.weight.start) if operands.beside else 0
    return 2 * b * n * (kept + beside)
