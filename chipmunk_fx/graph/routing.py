"""Rows that content chooses or orders (expert choice, mixture of depths, tokens sorted or merged by likeness), the timestep or
chance.

From step to step they are other tokens, so that nothing kept of one is of any use to the next. Where numbers of Python's order
them (windows that are shifted in every other step), graphs that differ in these have caches of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from chipmunk_fx.graph.capture import Capture
from chipmunk_fx.graph.effects import draws
from chipmunk_fx.graph.inputs import Roles
from chipmunk_fx.graph.moves import follow
from chipmunk_fx.graph.orders import Orders, name
from chipmunk_fx.graph.pattern import AttentionOperands, MlpOperands
from chipmunk_fx.graph.region import Region
from chipmunk_fx.graph.sizes import Size, unbacked
from chipmunk_fx.graph.walk import rank

_REASON = "tokens are chosen or ordered by their content, by the timestep or at random, not alike from step to step"
_MOVES = ("roll", "flip", "rot90", "constant_pad_nd", "slice", "select")


def orders_of(capture: Capture, roles: Roles) -> Orders:
    """How what the latents, or other activations, hold orders the rows of all nodes, or the timestep, or what is drawn."""
    drawn = filter(draws, capture.module.graph.nodes)
    orders = Orders([*_activations(capture, roles), *drawn])
    for node in capture.module.graph.nodes:
        follow(node, orders)
    return orders


def shifts_of(capture: Capture, orders: Orders) -> tuple[Size, ...]:
    """The numbers by which the graph itself moves rows of activations, in its order; where a slice ends is not among them."""
    moves = [node for node in capture.module.graph.nodes if name(node) in _MOVES and node.args[0] in orders.content]
    return tuple(n for node in moves for arg in node.args[1:3] for n in _numbers(arg))


def _numbers(arg: Any) -> list[Size]:
    """Of an argument; none of one that only the data tell."""
    if isinstance(arg, (tuple, list)):
        return [number for part in arg for number in _numbers(part)]
    value = arg.meta.get("val") if isinstance(arg, fx.Node) else arg
    return [value] if isinstance(value, (int, torch.SymInt)) and not unbacked([value]) else []


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
    """The latents, the timestep and, mostly in a piece of a model, streams whose role is not known."""
    told, times = {*roles.ids, *roles.text}, (roles.timestep, *roles.doubtful)
    inputs = [n for n in capture.module.graph.nodes if n.op == "placeholder"]
    return [
        node
        for index, (node, entry) in enumerate(zip(inputs, capture.inputs, strict=True))
        if index == roles.latents
        or index in times
        or (index not in told and not entry.is_parameter and rank(node) >= 3 and entry.value.is_floating_point())
    ]
