"""Which block of the model a candidate belongs to."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from chipmunk_fx.graph.match import Candidate
from chipmunk_fx.graph.walk import depending


def number_layers(candidates: Sequence[Candidate], latents: fx.Node | None) -> dict[Candidate, int]:
    """Block index of each candidate: blocks in order of their first attention that depends on the latents.

    An MLP belongs to its block or, where modules have no names, to the attention before it. Text-only refiners have none.
    """
    moving = None if latents is None else depending(latents)
    order: dict[str, int] = {}
    layers: dict[Candidate, int] = {}
    last: int | None = None
    for candidate in candidates:
        block = candidate.block
        if candidate.kind == "attention" and candidate.form != "cross":
            if moving is not None and candidate.anchor not in moving:
                continue
            last = layers[candidate] = order.setdefault(block or candidate.name, len(order))
        elif candidate.kind == "mlp" and (layer := order.get(block) if block else last) is not None:
            layers[candidate] = layer
    return layers
