"""What went wrong under one session, and what stays dense because of it."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from chipmunk_fx.graph.plan import Site
from chipmunk_fx.runtime.graphs import Graph


class Faults:
    """Sites whose caches found no memory, by Parameter and ordinal, and graphs that failed, each with the reason."""

    def __init__(self) -> None:
        self._sites: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._graphs: weakref.WeakKeyDictionary[Graph, str] = weakref.WeakKeyDictionary()

    def exempt(self, owner: torch.Tensor, site: Site, reason: str) -> None:
        self._sites.setdefault(owner, {})[site.ordinal] = reason

    def condemn(self, graph: Graph, reason: str) -> None:
        self._graphs[graph] = reason

    def of(self, graph: Graph) -> str | None:
        """Why `graph` runs dense from now on; None where it need not."""
        return self._graphs.get(graph) if self._graphs else None

    def able(self, graph: Graph, values: Sequence[Any]) -> Graph:
        """`graph` without the sites that are exempt."""
        if not self._sites:
            return graph
        reasons = {
            site.index: reason
            for site in graph.plan.rewritten
            if (reason := self._sites.get(values[site.owner], {}).get(site.ordinal)) is not None
        }
        return graph.without(reasons) if reasons else graph
