"""Write a plan into a copy of the graph: one graph a phase, caches as placeholders after the graph's own inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch.fx._lazy_graph_module import _make_graph_module, _use_lazy_graph_module

from chipmunk_fx.config import Config
from chipmunk_fx.graph.calls import dtype
from chipmunk_fx.graph.capture import Capture
from chipmunk_fx.graph.kept_attention import keep_kernels
from chipmunk_fx.graph.pattern import AttentionOperands, Kept, MlpOperands, Part
from chipmunk_fx.graph.plan import Plan, Site
from chipmunk_fx.graph.region import Region
from chipmunk_fx.graph.state import (
    MLP_SLOTS,
    OF_MLP_REFRESHES,
    OF_REFRESHES,
    WATCHED,
    add_inputs,
    slot_names,
    state_inputs,
)
from chipmunk_fx.graph.walk import is_used, moved_by, rank
from chipmunk_fx.schedule.phase import Phase

aten = torch.ops.aten
POWER = {"additive": 0.0, "scaled": 0.5}  # exponent of the selection's share (method.md: w0^p)


def rewrite(capture: Capture, plan: Plan, config: Config, phase: Phase, renew: bool = True) -> fx.GraphModule:
    """The graph of `phase`. Its inputs: the captured ones, then `state_inputs(plan, phase)`.

    `renew`: a refresh chooses new lists of columns for attention, otherwise it keeps those that are there; of no account where
    it is told whether there are any (`plan.tells_known`).
    Dense sites behind a key-padding mask are rewritten in every phase: padded keys are dropped, not masked.
    """
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(capture.module.graph, copied)
    graph.output(result)
    for old, new in copied.items():
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source  # pyright: ignore[reportAttributeAccessIssue]
    state = add_inputs(graph, state_inputs(plan, phase))
    if phase is Phase.SKIP:
        _skip(graph, copied, state, plan)
        return _module(capture, graph)
    for index, stream in enumerate(plan.streams if plan.stores(phase) else ()):
        start, stop = copied[stream.start], copied[stream.stop]
        with graph.inserting_after(stop):
            kept = state[index, "residual"], state.get((index, "change"))
            graph.call_function(torch.ops.chipmunk.region_store.default, (start, stop, *kept))
    writer = _Writer(graph, copied, state, plan, config, phase, renew)
    for site in plan.sites:
        if plan.mask_of(site) is not None or (site.status == "rewritten" and phase is not Phase.DENSE):
            writer.replace(site)
    keep_kernels(graph)
    return _module(capture, graph)


def _module(capture: Capture, graph: fx.Graph) -> fx.GraphModule:
    """What AOTAutograd takes for a graph of Dynamo's: with a source, or none, for all that comes in."""
    with _use_lazy_graph_module(True):  # as Dynamo's own: code that nobody runs is not written
        module = _make_graph_module(capture.module, graph)
    module.meta |= capture.module.meta
    constants = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    module._param_name_to_source = {name: ConstantSource(f"chipmunk_{name}") for name in constants}  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
    for node in graph.nodes:
        if node.op == "placeholder" and not hasattr(node, "_dynamo_source"):
            node._dynamo_source = None
    return module


def _skip(
    graph: fx.Graph, copied: Mapping[fx.Node, fx.Node], state: Mapping[tuple[int | None, str], fx.Node], plan: Plan
) -> None:
    """Put what the blocks added last in place of the blocks."""
    assert isinstance(plan.region, Region)
    region = {copied[n] for n in plan.region.nodes}
    for index, stream in enumerate(plan.streams):
        stop = copied[stream.stop]
        with graph.inserting_before(stop):
            arguments = copied[stream.start], state[index, "residual"]
            new = graph.call_function(torch.ops.chipmunk.region_add.default, arguments)
        stop.replace_all_uses_with(new, lambda user: user not in region, propagate_meta=True)
    for node in reversed([n for n in graph.nodes if n in region]):
        graph.erase_node(node)
    graph.eliminate_dead_code()


class _Writer:
    """Replaces the nodes of sites by their ops."""

    def __init__(
        self,
        graph: fx.Graph,
        copied: dict[fx.Node, fx.Node],
        state: Mapping[tuple[int | None, str], fx.Node],
        plan: Plan,
        config: Config,
        phase: Phase,
        renew: bool,
    ) -> None:
        self.graph, self.copied, self.state, self.plan = graph, copied, state, plan
        self.config, self.phase, self.renew = config, phase, renew
        cached = phase in (Phase.REFRESH, Phase.SPARSE)
        self.passages = {s.index: s.passage for s in plan.rewritten if cached and s.passage}

    def replace(self, site: Site) -> None:
        anchor = self.copied[site.nodes[0]]
        with self.graph.inserting_before(anchor):
            if site.index in self.passages:
                self._fetch(site)
            if isinstance(site.operands, AttentionOperands):
                new = self._attention(site, site.operands)
            else:
                new = self._mlp(site, site.operands)
            self._keep_caches(site)
            self._fetch_after(site, new)
        for key in ("nn_module_stack", "stack_trace", "val"):  # the last for matches in what is written
            if key in anchor.meta:
                new.meta[key] = anchor.meta[key]
        anchor.replace_all_uses_with(new)
        for node in sorted({self.copied[n] for n in (*site.nodes, *_through(site.operands))}, reverse=True):
            self._erase(node)

    def _erase(self, node: fx.Node) -> None:
        """Erase a node of which nothing comes, with its users."""
        for user in list(node.users):
            if not is_used(user):
                self._erase(user)
        if not node.users:
            self.graph.erase_node(node)

    def _attention(self, site: Site, operands: AttentionOperands) -> fx.Node:
        config, ops = self.config.attention, torch.ops.chipmunk
        q, k, v = (self._laid(self._cast(o.node, operands.cast), o.dims) for o in (operands.q, operands.k, operands.v))
        mask = self.plan.mask_of(site)
        present = (None, None) if mask is None else (self.state[mask, "valid"], self.state[mask, "span"])
        common: dict[str, Any] = {"scale": operands.scale, "sdpa": operands.sdpa}
        if site.status == "dense" or self.phase is Phase.DENSE:
            out = self.graph.call_function(ops.attention_dense.default, (q, k, v, *present), common)
            return self._attended(out, operands)
        common |= {"group_rows": site.group_rows, "ragged": config.local_columns}
        slots = [self._slot(site, name) for name in ("rest", "share", "lists")]
        order = self.state.get((site.index, "order"))
        if self.phase is Phase.SPARSE:
            out = self.graph.call_function(ops.attention_sparse.default, (q, k, v, order, *present, *slots), common)
            return self._attended(out, operands)
        extra = {
            "random_density": config.random_density,
            "power": POWER[config.combine],
            "mass_stride": config.mass_stride,
            "renew": config.renew_lists if self.plan.tells_known else self.renew,
            "seed": self.config.seed,
            "site": site.index,
        }
        always, clock = self.state.get((site.index, "always")), self.state[None, "clock"]
        lse = self._slot(site, "lse") if site.keeps_lse else None
        arguments = (q, k, v, order, always, *present, clock, self.state.get((None, "known")), *slots, lse)
        out = self.graph.call_function(ops.attention_refresh.default, arguments, common | extra)
        return self._attended(out, operands)

    def _attended(self, out: fx.Node, operands: AttentionOperands) -> fx.Node:
        """The result as the graph wants it, 0 in rows that attend to nothing."""
        if operands.rows is not None:
            attends = self.graph.call_function(aten.slice.Tensor, (self.copied[operands.rows], -1, 0, 1))
            out = self.graph.call_function(aten.where.ScalarOther, (attends, out, 0.0))
        return self._back(out, operands.out)

    def _mlp(self, site: Site, operands: MlpOperands) -> fx.Node:
        config, ops = self.config.mlp, torch.ops.chipmunk
        slots = [self._slot(site, name) if name in slot_names(site) else None for name in MLP_SLOTS]
        weights = [self._part(p) for p in (operands.w1, operands.b1, operands.wu, operands.bu, operands.w2)]
        bias, moving = self._second_bias(operands)
        there, back = _layouts(site, operands)
        if operands.channels_first:  # [F, C, 1, ...] -> [F, C]
            weights[::2] = [w and self.graph.call_function(aten.flatten.using_ints, (w, 1)) for w in weights[::2]]
        arguments = (
            self._laid(self.copied[operands.x], there), *weights, bias, self.state.get((site.index, "order")),
            self.state[None, "clock"], *slots,
        )  # fmt: skip
        common: dict[str, Any] = {"activation": operands.activation, "group_rows": site.group_rows}
        if self.phase is Phase.SPARSE:
            extra = {"random_density": config.random_density, "seed": self.config.seed, "site": site.index}
            product = self.graph.call_function(ops.mlp_sparse.default, arguments, common | extra)
        else:
            product = self.graph.call_function(ops.mlp_refresh.default, arguments, common)
        if moving is not None:
            product = self.graph.call_function(aten.add.Tensor, (product, moving))
        product = self._laid(product, back)
        if operands.kept is not None:
            self._keep(self.copied[operands.x], operands.kept)
        return product if operands.beside is None else self._beside(operands, product)

    def _second_bias(self, operands: MlpOperands) -> tuple[fx.Node | None, fx.Node | None]:
        """As the op takes it, which keeps it in its result; one that moves from step to step is added afterwards."""
        bias = None if operands.b2 is None else self.copied[operands.b2]
        moves = operands.b2 is not None and moved_by(operands.b2) is not None
        return (None, bias) if moves else (bias, None)

    def _keep(self, x: fx.Node, kept: Kept) -> None:
        """The columns that go elsewhere, from a linear of their own."""
        with self.graph.inserting_before(self.copied[kept.linear]):
            weights = self._part(kept.weight), self._part(kept.bias)
            rest = self.graph.call_function(aten.linear.default, (x, *weights))
            for piece in kept.pieces:
                bounds = piece.start - kept.start, piece.stop - kept.start
                whole = bounds == (0, kept.width)
                part = rest if whole else self.graph.call_function(aten.slice.Tensor, (rest, -1, *bounds))
                self.copied[piece.node].replace_all_uses_with(part, propagate_meta=True)
                self.graph.erase_node(self.copied[piece.node])
                self.copied[piece.node] = part

    def _beside(self, operands: MlpOperands, product: fx.Node) -> fx.Node:
        """linear(cat([a, h]), W, b) = linear(a, W_a, b) + h W_h^T; `product` is the second term."""
        beside = operands.beside
        assert beside is not None
        parts = [self.copied[p] for p in beside.parts]
        value = parts[0] if len(parts) == 1 else self.graph.call_function(aten.cat.default, (parts, -1))
        bias = None if beside.bias is None else self.copied[beside.bias]
        rest = self.graph.call_function(aten.linear.default, (value, self._part(beside.weight), bias))
        return self.graph.call_function(aten.add.Tensor, (rest, product))

    def _part(self, part: Part | None) -> fx.Node | None:
        if part is None or part.dim is None:
            return None if part is None else self.copied[part.node]
        arguments = (self.copied[part.node], part.dim, part.start, part.stop)
        return self.graph.call_function(aten.slice.Tensor, arguments)

    def _cast(self, source: fx.Node, to: torch.dtype | None) -> fx.Node:
        node = self.copied[source]
        return node if to in (None, dtype(source)) else self.graph.call_function(aten.to.dtype, (node, to))

    def _laid(self, node: fx.Node, dims: tuple[int | None, ...] | None) -> fx.Node:
        if dims is None:
            return node
        node = self.graph.call_function(aten.permute.default, (node, [d for d in dims if d is not None]))
        for place in (place for place, d in enumerate(dims) if d is None):
            node = self.graph.call_function(aten.unsqueeze.default, (node, place))
        return node

    def _back(self, node: fx.Node, out: tuple[int, ...] | None) -> fx.Node:
        """[B, H, N, D] as the graph wants it; a dimension that `out` leaves away has size 1."""
        absent = [] if out is None else [d for d in range(4) if d not in out]
        if out is None or not absent:
            return self._laid(node, out)
        node = self.graph.call_function(aten.squeeze.dims, (node, absent))
        return self._laid(node, tuple(sorted(out).index(d) for d in out))

    def _slot(self, site: Site, name: str) -> fx.Node:
        passage = self.passages.get(site.index)
        return self.state[(site.index, name) if passage is None else (passage.lane(name), f"stage {name}")]

    def _fetch(self, site: Site) -> None:
        """Wait for this site's caches to be on the device, and have the next site's copied while this one computes."""
        if site.index == next(iter(self.passages)):  # beside all that comes before
            with self.graph.inserting_before(next(n for n in self.graph.nodes if n.op == "call_function")):
                for late in (False, True):
                    self._bring(None, site, late)
        coming = self._following(site)
        self._bring(site, None if self._in_turn(site, coming) else coming)
        self._bring(site, None, late=True)

    def _fetch_after(self, site: Site, result: fx.Node) -> None:
        """Have what the next site reads copied to buffers that this one has used."""
        if site.index in self.passages and (coming := self._following(site)):
            self._bring(None, coming, late=True, after=result)
            if self._in_turn(site, coming):
                self._bring(None, coming, after=result)

    def _in_turn(self, site: Site, coming: Site | None) -> bool:
        """Whether both have one early lane, since a site between them has become dense."""
        return coming is not None and self._lane(site, late=False) == self._lane(coming, late=False)

    def _following(self, site: Site) -> Site | None:
        """The next site whose caches lie on the host."""
        return next((self.plan.sites[index] for index in self.passages if index > site.index), None)

    def _bring(self, ready: Site | None, coming: Site | None, late: bool = False, after: fx.Node | None = None) -> None:
        """Wait for what `ready` needs of its early or late lane, then begin to copy what `coming` reads to its own."""
        waited = self._staged(ready, slot_names(ready), late) if ready else []
        read = self._staged(coming, self._touched(coming, reads=True), late) if coming else []
        if waited or read:
            home = [self.state[coming.index, name] for name, _ in read] if coming else []
            arguments = [s for _, s in waited], home, [s for _, s in read], self.state[None, "lanes"], after
            kwargs = {name: self._lane(s, late) if s else 0 for name, s in (("lane", ready), ("coming", coming))}
            self.graph.call_function(torch.ops.chipmunk.cache_fetch.default, arguments, kwargs)

    def _lane(self, site: Site, late: bool) -> int:
        passage = self.passages[site.index]
        return passage.late if late else passage.early

    def _staged(self, site: Site, names: Sequence[str], late: bool) -> list[tuple[str, fx.Node]]:
        """Those of the caches `names` that take the early or the late lane, with their buffers."""
        passage, lane = self.passages[site.index], self._lane(site, late)
        return [(name, self._slot(site, name)) for name in names if passage.lane(name) == lane]

    def _keep_caches(self, site: Site) -> None:
        """Look for nan and inf in what the site has written, and send it home."""
        if not (written := self._touched(site, reads=False)):
            return
        name, columns = WATCHED[site.kind]
        watched = self._slot(site, name), self.state[None, "broken"]
        self.graph.call_function(torch.ops.chipmunk.cache_watch.default, watched, {"columns": columns})
        for late in (False, True) if site.index in self.passages else ():
            if staged := self._staged(site, written, late):
                home = [self.state[site.index, name] for name, _ in staged]
                arguments = [s for _, s in staged], home, self.state[None, "lanes"]
                kwargs = {"lane": self._lane(site, late)}
                self.graph.call_function(torch.ops.chipmunk.cache_store.default, arguments, kwargs)

    def _touched(self, site: Site, reads: bool) -> tuple[str, ...]:
        """The caches that the site's op reads, or those that it writes, in this phase."""
        if site.status == "dense" or self.phase not in (Phase.REFRESH, Phase.SPARSE):
            return ()
        names = slot_names(site)
        if self.phase is Phase.REFRESH:
            may_keep = not self.renew or (self.plan.tells_known and not self.config.attention.renew_lists)
            may_keep &= site.kind == "attention"
            earlier = ("lists",) * may_keep + tuple(name for name in names if name in OF_REFRESHES)
            return earlier if reads else names
        written = () if site.kind == "attention" else tuple(name for name in names if name not in OF_MLP_REFRESHES)
        return tuple(name for name in names if name not in OF_REFRESHES) if reads else written


def _layouts(site: Site, operands: MlpOperands) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    """Permutations of an MLP's input to [B, ..., N, C], and of the result to what the graph wants."""
    if not operands.channels_first:
        swap = (1, 0, 2) if site.tokens_first else None
        return swap, swap
    *places, last = range(1, rank(operands.x))
    return (0, *places[1:], last, 1), (0, last, *places)


def _through(operands: AttentionOperands | MlpOperands) -> tuple[fx.Node, ...]:
    """Nodes that divided the first linear's result into pieces that are made without them now."""
    kept = operands.kept if isinstance(operands, MlpOperands) else None
    return () if kept is None else tuple(n for piece in kept.pieces for n in piece.through[1:])
