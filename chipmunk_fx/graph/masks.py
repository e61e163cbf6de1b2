"""What the inputs of a call tell before the model runs: key-padding masks, and lengths that depend on the data.

A mask that says the same for every head and row only leaves keys out. Its values are known beforehand if they follow from
the graph's inputs by cheap ops: that part of the graph, the probe, is cut out and run by itself. So are lengths like the
number of valid text tokens, where a model drops the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from chipmunk_fx.graph.alike import FOLDS, alike
from chipmunk_fx.graph.calls import dtype, is_identity
from chipmunk_fx.graph.effects import draws
from chipmunk_fx.graph.sizes import unbacked
from chipmunk_fx.graph.walk import (
    PROJECTIONS,
    ancestors,
    mutated_between,
    rank,
    shape,
    storage,
    strip,
    writers,
    written,
)

aten = torch.ops.aten

_ZEROS = (aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default)
_SIZES = (aten.sym_size.int, aten.sym_size.default)
_BOTH = (aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default, aten.mul.Tensor)
_COSTLY = (
    *PROJECTIONS,
    aten.matmul.default,
    aten.bmm.default,
    aten.mm.default,
    aten.scaled_dot_product_attention.default,
)


@dataclass(frozen=True)
class Mask:
    """A key-padding mask of the graph; `hides`: true stands for keys that are left out."""

    node: fx.Node
    hides: bool


@dataclass(frozen=True)
class Probe:
    """Computes some nodes of a captured graph from `inputs`, positions among the graph's own; only sizes matter of `measured`.

    `masks` come first in what `module` returns, then what tells the `lengths`: symbol and dimension (None: a number).
    """

    module: fx.GraphModule
    inputs: tuple[int, ...]
    measured: frozenset[int]
    masks: tuple[Mask, ...]
    lengths: tuple[tuple[Any, int | None], ...]

    def __call__(self, values: Sequence[Any]) -> tuple[tuple[torch.Tensor, ...], dict[Any, int]]:
        """Values of the masks, and of the symbols of lengths."""
        with torch.no_grad():
            results = self.module(*(values[i] for i in self.inputs))
        masks, tellers = list(results[: len(self.masks)]), results[len(self.masks) :]
        for index, mask in enumerate(self.masks):
            if mask.hides:
                masks[index] = ~masks[index]
        told = zip(self.lengths, tellers, strict=True)
        return tuple(masks), {symbol: int(t if dim is None else t.shape[dim]) for (symbol, dim), t in told}


def is_nothing(mask: fx.Node) -> bool:
    """Whether a mask that is added to scores is of zeros made in the graph, which nothing is written to."""
    made = strip(mask)
    kind = dtype(mask)
    return made.target in _ZEROS and kind is not None and kind.is_floating_point and not writers([made])


def unfolded(mask: fx.Node) -> fx.Node:
    """The mask before reshapes in a row that end in the shape they began with, and before it was copied for heads or rows.

    The first fold and unfold batch and heads; the copies would be made anew whenever the values are asked for.
    """
    node = found = mask
    while (node.target in FOLDS or _is_copy(node)) and not writers([node]):
        source = node.all_input_nodes[0]
        copied = _is_copy(node) and node is found
        node, found = source, source if copied or shape(source) == shape(found) else found
    return found


def _is_copy(node: fx.Node) -> bool:
    """Whether a mask [B, H, N, M] is one [B, 1 or H, 1 or N, M], copied."""
    if node.target not in (aten.expand.default, aten.repeat.default) or rank(node.all_input_nodes[0]) != 4:
        return False
    before, after = shape(node.all_input_nodes[0]), shape(node)
    return len(after) == 4 and all(statically_known_true(before[d] == after[d]) for d in (0, 3))


def divided(mask: fx.Node, anchor: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """(keys, rows) of a boolean mask that is both: one is the same for every row, one for every key; else (mask, None).

    `anchor`: the attention.
    """
    node, passed = mask, [mask]
    while is_identity(node):
        node = node.all_input_nodes[0]
        passed.append(node)
    sides = node.all_input_nodes if node.target in _BOTH else []
    if len(sides) != 2 or any(rank(n) != 4 or dtype(n) != torch.bool for n in (mask, *sides)):
        return mask, None
    for keys, rows in (sides, sides[::-1]):
        if alike(keys, 2) and alike(rows, 3) and not alike(keys, 3):
            return (mask, None) if mutated_between(node, anchor, [*passed, *sides]) else (unfolded(keys), rows)
    return mask, None


def padding_refusal(mask: fx.Node, anchor: fx.Node) -> str | None:
    """Why an attention mask [B, H, N, M] is more than key padding, or not known beforehand; None for neither.

    `anchor`: the attention.
    """
    value = mask.meta["val"]
    sizes = f"attention mask {tuple(value.shape)} {value.dtype}"
    if value.dim() not in (2, 4) or value.shape[-1] == 1:
        return f"{sizes}; key padding is [batch, 1, 1, keys]"
    if not all(alike(mask, dim) for dim in ((1, 2) if value.dim() == 4 else (0,))):
        return f"{sizes} differs from row to row or head to head; key padding is supported"
    if reason := probe_refusal(mask):
        return f"{sizes}: {reason}"
    if writer := next((n for n in _behind(mask) if n > anchor), None):
        return f"{sizes}: {writer} writes to it after the attention"
    return None


def probe_refusal(node: fx.Node) -> str | None:
    """Why the value of `node` cannot be learnt before the model runs."""
    behind = _behind(node)
    if costly := next((n for n in behind if n.target in _COSTLY), None):
        return f"its values come out of {costly}"
    if drawn := next(filter(draws, behind), None):
        return f"its values are drawn at random by {drawn}"
    if constant := next((n for n in behind if n.op not in ("placeholder", "call_function", "get_attr")), None):
        return f"its values come out of {constant}"
    given = {storage(n) for n in behind if n.op != "call_function"}
    if writer := next((n for n in behind if any(storage(target) in given for target in written(n))), None):
        return f"{writer} writes in place to an input on the way to it"
    return None


def make_probe(module: fx.GraphModule, masks: Sequence[Mask], symbols: Iterable[Any]) -> Probe | None:
    """Cut out what computes the masks and tells the symbols, for each of which `probe_refusal` is None."""
    tellers = tellers_of(module)
    lengths = [(symbol, *tellers[symbol]) for symbol in symbols]
    wanted = [*(mask.node for mask in masks), *(node for _, node, _ in lengths)]
    if not wanted:
        return None
    inputs = [n for n in module.graph.nodes if n.op == "placeholder"]
    graph, copied = fx.Graph(), {}
    for node in sorted({n for told in wanted for n in _behind(told)}):
        copied[node] = graph.node_copy(node, lambda n: copied[n])
    graph.output(tuple(copied[n] for n in wanted))
    used = tuple(i for i, n in enumerate(inputs) if n in copied)
    measured = (i for i in used if all(user.target in _SIZES for user in copied[inputs[i]].users))
    answers = tuple((symbol, dim) for symbol, _, dim in lengths)
    return Probe(fx.GraphModule(module, graph), used, frozenset(measured), tuple(masks), answers)


def tellers_of(module: fx.GraphModule) -> dict[Any, tuple[fx.Node, int | None]]:
    """The node from which each data-dependent symbol is first known, and along which dimension (None: it is a number)."""
    tellers: dict[Any, tuple[fx.Node, int | None]] = {}
    for node in module.graph.nodes:
        value = node.meta.get("val")
        sizes = enumerate(value.shape) if isinstance(value, torch.Tensor) else [(None, value)]
        for dim, size in sizes:
            if isinstance(size, torch.SymInt) and size.node.expr in unbacked([size]):
                tellers.setdefault(size.node.expr, (node, dim))
    return tellers


def _behind(node: fx.Node) -> list[fx.Node]:
    """What computes `node`, as far as the first costly op on each way, and what writes to any of it in place."""
    found = dict.fromkeys(ancestors(node, lambda n: n.target in _COSTLY))
    fresh = list(found)
    while new := [writer for writer in writers(fresh) if writer not in found]:
        fresh = [n for writer in new for n in ancestors(writer, lambda n: n.target in _COSTLY) if n not in found]
        found.update(dict.fromkeys(fresh))
    return list(found)
