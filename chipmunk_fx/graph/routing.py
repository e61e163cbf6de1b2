"""Rows that content chooses or orders (expert choice, mixture of depths, tokens sorted or merged by likeness), or chance.

From step to step they are other tokens, so that nothing kept of one is of any use to the next.
"""

from __future__ import annotations

from torch import fx

from chipmunk_fx.graph.capture import Capture
from chipmunk_fx.graph.effects import draws
from chipmunk_fx.graph.inputs import Roles
from chipmunk_fx.graph.moves import follow
from chipmunk_fx.graph.orders import Orders
from chipmunk_fx.graph.pattern import AttentionOperands, MlpOperands
from chipmunk_fx.graph.region import Region
from chipmunk_fx.graph.walk import rank

_REASON = "tokens are chosen or ordered by their content or at random, not alike from step to step"


def orders_of(capture: Capture, roles: Roles) -> Orders:
    """How what the latents, or other activations, hold orders the rows of all nodes, or what is drawn at random."""
    drawn = filter(draws, capture.module.graph.nodes)
    orders = Orders([*_activations(capture, roles), *drawn])
    for node in capture.module.graph.nodes:
        follow(node, orders)
    return orders


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
