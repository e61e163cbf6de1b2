"""Rows that content chooses or orders (expert choice, mixture of depths, tokens sorted or merged by likeness), time or chance.

From step to step they are other tokens, so that nothing kept of one is of any use to the next. Where Python orders them
(windows that are shifted in every other step), graphs that do it otherwise have caches of their own.
"""

from __future__ import annotations

import torch
from torch import fx

from chipmunk_fx.graph.capture import Capture, attribute
from chipmunk_fx.graph.effects import draws
from chipmunk_fx.graph.indexing import PICKS, SENDS
from chipmunk_fx.graph.inputs import Roles
from chipmunk_fx.graph.moves import follow
from chipmunk_fx.graph.orders import Orders, is_mask, is_whole, name
from chipmunk_fx.graph.pattern import AttentionOperands, MlpOperands
from chipmunk_fx.graph.region import Region
from chipmunk_fx.graph.sizes import Size, unbacked
from chipmunk_fx.graph.walk import NORMS, PROJECTIONS, ancestors, is_pointwise, rank

_REASON = "tokens are chosen or ordered by their content, by the time or at random, not alike from step to step"


def orders_of(capture: Capture, roles: Roles) -> Orders:
    """How what the latents, or other activations, hold orders the rows of all nodes, or what is drawn at random."""
    drawn = filter(draws, capture.module.graph.nodes)
    orders = Orders([*_activations(capture, roles), *drawn])
    for node in capture.module.graph.nodes:
        follow(node, orders)
    orders.timed = frozenset(_timed(capture, roles, orders))
    return orders


def _timed(capture: Capture, roles: Roles, orders: Orders) -> set[fx.Node]:
    """What is made of activations whose rows an index moves that is made of the timestep, or of strengths beside it."""
    inputs = [n for n in capture.module.graph.nodes if n.op == "placeholder"]
    times = {i for i in (roles.timestep, *roles.doubtful) if i is not None}
    strengths = {i for i in roles.rest if rank(inputs[i]) in (1, 2) and not is_whole(inputs[i])}
    late, moved = {inputs[i] for i in times | strengths}, set[fx.Node]()
    for node in capture.module.graph.nodes:
        read = node.all_input_nodes
        picks = name(node) in (*PICKS, *SENDS) and any(n in late and is_whole(n) and not is_mask(n) for n in read)
        if any(n in moved for n in read) or (picks and any(n in orders.content for n in read)):
            moved.add(node)
        elif node not in orders.content and any(n in late for n in read):
            late.add(node)
    return moved


Move = tuple[str, tuple[Size, ...]]
"""An op, with the numbers that it is given."""


def moves_of(capture: Capture, orders: Orders) -> tuple[Move, ...]:
    """What the graph itself does to rows of activations, each once: so that a block more or less makes no difference."""
    inputs = (n for n in capture.module.graph.nodes if n.op == "placeholder")
    names = {n: entry.name for n, entry in zip(inputs, capture.inputs, strict=True)}
    moves: dict[str, Move] = {}
    for node in capture.module.graph.nodes:
        if node not in orders.content or not isinstance(node.meta.get("val"), torch.Tensor) or _keeps_rows(node):
            continue
        told = [n for n in node.all_input_nodes if n not in orders.content] if name(node) in (*PICKS, *SENDS) else []
        for part in (node, *(n for index in told for n in ancestors(index, lambda _: False))):
            move = names.get(part) or _content(part, capture), tuple(_numbers(part))
            moves[str(move)] = move
    return tuple(moves.values())


def _content(node: fx.Node, capture: Capture) -> str:
    """What it is: the op, or the values of a constant (an order that is written as a list)."""
    value = attribute(capture.module, node) if node.op == "get_attr" else None
    return str(value.flatten().tolist()) if isinstance(value, torch.Tensor) else str(node.target)


def _keeps_rows(node: fx.Node) -> bool:
    return is_pointwise(node) or node.target in (*PROJECTIONS, *NORMS)


def _numbers(node: fx.Node) -> list[Size]:
    """Whole numbers among the arguments, but for those that only the data tell, and where a slice ends."""
    given = node.args[1:3] if name(node) == "slice" else (*node.args, *node.kwargs.values())
    parts = [part for arg in given for part in (arg if isinstance(arg, (tuple, list)) else [arg])]
    values = [part.meta.get("val") if isinstance(part, fx.Node) else part for part in parts]
    return [v for v in values if isinstance(v, (int, torch.SymInt)) and not unbacked([v])]


def choice_refusal(operands: AttentionOperands | MlpOperands | None, orders: Orders) -> str | None:
    """Why the rows that a site reads are not those that its caches were made of."""
    if isinstance(operands, AttentionOperands):
        read = [(laid.node, (laid.dims or (-1,))[-1]) for laid in (operands.q, operands.k, operands.v)]
    else:
        read = [(operands.x, 1 if operands.channels_first else -1)] if operands else []
    return f"its {_REASON}" if any(orders.is_moved(node, channels) for node, channels in read) else None


def steady(region: Region | str, orders: Orders) -> Region | str:
    """Blocks that can be skipped, or why they cannot: what they added last was added to other rows."""
    ends = () if isinstance(region, str) else [node for s in region.streams for node in (s.start, s.stop)]
    return f"their {_REASON}" if any(map(orders.is_moved, ends)) else region


def _activations(capture: Capture, roles: Roles) -> list[fx.Node]:
    """The latents and, mostly in a piece of a model, streams whose role is not known."""
    told = {roles.timestep, *roles.doubtful, *roles.ids, *roles.text}
    inputs = [n for n in capture.module.graph.nodes if n.op == "placeholder"]
    return [
        node
        for index, (node, entry) in enumerate(zip(inputs, capture.inputs, strict=True))
        if index == roles.latents
        or (index not in told and not entry.is_parameter and rank(node) >= 3 and entry.value.is_floating_point())
    ]
