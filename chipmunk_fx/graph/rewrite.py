"""Write a plan into a copy of the graph: one graph a phase, caches as placeholders after the graph's own inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from chipmunk_fx.config import Config
from chipmunk_fx.graph.capture import Capture
from chipmunk_fx.graph.pattern import AttentionOperands, MlpOperands, Part
from chipmunk_fx.graph.plan import Plan, Site, StateInput, state_inputs
from chipmunk_fx.schedule.phase import Phase

aten = torch.ops.aten
POWER = {"additive": 0.0, "scaled": 0.5}  # exponent of the selection's share (method.md: w0^p)


def rewrite(capture: Capture, plan: Plan, config: Config, phase: Phase) -> fx.GraphModule:
    """The graph of `phase` (refresh or sparse). Its inputs: the captured ones, then `state_inputs(plan)`."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(capture.module.graph, copied)
    graph.output(result)
    for old, new in copied.items():
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source  # pyright: ignore[reportAttributeAccessIssue]
    state = _placeholders(graph, state_inputs(plan))
    for site in plan.rewritten:
        _Writer(graph, copied, state, config, phase).replace(site)
    module = fx.GraphModule(capture.module, graph)
    module.recompile()
    return module


def _placeholders(graph: fx.Graph, entries: tuple[StateInput, ...]) -> dict[tuple[int | None, str], fx.Node]:
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    made = {}
    for entry in entries:
        with graph.inserting_after(last):
            last = graph.placeholder(f"chipmunk_{entry.name}")
        # Static for CUDA graphs, yet never guarded: the runtime swaps them from call to call.
        last.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
        made[entry.site, entry.slot or entry.role] = last
    return made


class _Writer:
    """Replaces one site's nodes by its op."""

    def __init__(
        self,
        graph: fx.Graph,
        copied: Mapping[fx.Node, fx.Node],
        state: Mapping[tuple[int | None, str], fx.Node],
        config: Config,
        phase: Phase,
    ) -> None:
        self.graph, self.copied, self.state, self.config, self.phase = graph, copied, state, config, phase

    def replace(self, site: Site) -> None:
        anchor = self.copied[site.nodes[0]]
        with self.graph.inserting_before(anchor):
            if isinstance(site.operands, AttentionOperands):
                new = self._attention(site, site.operands)
            else:
                new = self._mlp(site, site.operands)
        for key in ("nn_module_stack", "stack_trace"):
            if key in anchor.meta:
                new.meta[key] = anchor.meta[key]
        anchor.replace_all_uses_with(new)
        for node in sorted({self.copied[n] for n in site.nodes}, reverse=True):
            if not node.users:
                self.graph.erase_node(node)

    def _attention(self, site: Site, operands: AttentionOperands) -> fx.Node:
        config, ops = self.config.attention, torch.ops.chipmunk
        slots = [self._slot(site, name) for name in ("rest", "share", "lists")]
        q, k, v = (self._laid(self.copied[o.node], o.dims) for o in (operands.q, operands.k, operands.v))
        order = self.state.get((site.index, "order"))
        common: dict[str, Any] = {"scale": operands.scale, "group_rows": site.group_rows}
        if self.phase is Phase.SPARSE:
            out = self.graph.call_function(ops.attention_sparse.default, (q, k, v, order, *slots), common)
            return self._laid(out, operands.out)
        extra = {
            "random_density": config.random_density,
            "power": POWER[config.combine],
            "mass_stride": config.mass_stride,
            "seed": self.config.seed,
            "site": site.index,
        }
        arguments = (q, k, v, order, self.state.get((site.index, "always")), self.state[None, "clock"], *slots)
        out = self.graph.call_function(ops.attention_refresh.default, arguments, common | extra)
        return self._laid(out, operands.out)

    def _mlp(self, site: Site, operands: MlpOperands) -> fx.Node:
        config, ops = self.config.mlp, torch.ops.chipmunk
        slots = [self._slot(site, name) for name in ("hidden", "out", "mean", "lists")]
        weights = [self._part(p) for p in (operands.w1, operands.b1, operands.wu, operands.bu, operands.w2)]
        bias = None if operands.b2 is None else self.copied[operands.b2]
        arguments = (
            self.copied[operands.x], *weights, bias, self.state.get((site.index, "order")), self.state[None, "clock"],
            *slots,
        )  # fmt: skip
        common: dict[str, Any] = {"activation": operands.activation, "group_rows": site.group_rows}
        if self.phase is Phase.SPARSE:
            extra = {"random_density": config.random_density, "seed": self.config.seed, "site": site.index}
            product = self.graph.call_function(ops.mlp_sparse.default, arguments, common | extra)
        else:
            product = self.graph.call_function(ops.mlp_refresh.default, arguments, common)
        return product if operands.beside is None else self._beside(operands, product)

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

    def _laid(self, node: fx.Node, dims: tuple[int, ...] | None) -> fx.Node:
        return node if dims is None else self.graph.call_function(aten.permute.default, (node, list(dims)))

    def _slot(self, site: Site, name: str) -> fx.Node:
        return self.state[site.index, name]
