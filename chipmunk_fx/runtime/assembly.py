"""Puts together the tensors that follow a call's own inputs: masks, clock, tables and caches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from chipmunk_fx.config import AttentionConfig, Config
from chipmunk_fx.graph.plan import Site
from chipmunk_fx.graph.sizes import bindings, evaluate
from chipmunk_fx.graph.state import StateInput
from chipmunk_fx.graph.walk import shape
from chipmunk_fx.runtime.footprint import site_columns, site_slots
from chipmunk_fx.runtime.generations import Branch, Clock, Held, Track
from chipmunk_fx.runtime.graphs import Graph
from chipmunk_fx.runtime.known import Known
from chipmunk_fx.runtime.tables import Fixed, Tables, attention_tables
from chipmunk_fx.state.health import Health
from chipmunk_fx.state.slots import Slot
from chipmunk_fx.state.store import CacheOutOfMemory, Cell, Home, Place, Store

_SIZES = 4  # of a site that are kept at once
_REGION = -1, 0  # in place of a site's ordinal, and how many there are

Room = Callable[[int, Place], None]
"""Makes room for so many bytes, or raises."""


class SiteOutOfMemory(Exception):
    """The caches of `site` found no memory."""

    def __init__(self, site: Site, reason: str) -> None:
        super().__init__(f"out of memory for the caches of {site.name}: {reason}")
        self.site = site


def masks(graph: Graph, values: Sequence[Any], known: Known) -> list[torch.Tensor]:
    """`valid` [B, M] and `span` of every mask."""
    state = []
    symbols = bindings(graph.capture.fakes, values)
    for index, padding in enumerate(known.paddings):
        site = next(site for site in graph.plan.sites if graph.plan.mask_of(site) == index)
        (batch,) = evaluate(site.sizes[:1], symbols)
        state += [padding.valid.expand(batch, -1).contiguous(), padding.span]
    return state


class Assembly:
    """Of one call. `shared_bytes`: site index -> bytes by slot name, of what branches share, kept up to date. `layer`: the
    block that a graph of one block serves.

    `whole` tells, after `state`, whether all caches were there already.
    """

    def __init__(
        self, graph: Graph, config: Config, store: Store, track: Track, branch: Branch, values: Sequence[Any],
        known: Known, shared_bytes: dict[int, dict[str, int]], room: Room, layer: int | None = None,
    ) -> None:  # fmt: skip
        self.graph, self.plan, self.config, self.store = graph, graph.plan, config, store
        self.track, self.branch, self.values, self.known = track, branch, values, known
        self.shared_bytes, self.room, self.layer = shared_bytes, room, layer
        self.symbols = bindings(graph.capture.fakes, values) | known.lengths
        self.device: torch.device = values[graph.owner].device
        self.keys, self.moved = graph.kept_by(self.symbols)
        self.whole = True
        self.sizes: dict[int, tuple[int, ...]] = {s.index: evaluate(s.sizes, self.symbols) for s in self.plan.rewritten}
        if self.plan.has_grid and track.grids is None:
            track.grids = self.plan.geometry.grids(self.symbols, values)

    def state(self) -> list[torch.Tensor]:
        """In the order of `graph.entries`. Raises `SiteOutOfMemory`, and what `room` raises."""
        paddings = iter(masks(self.graph, self.values, self.known))
        residuals = self._residuals()
        self._caches()
        return [self._tensor(entry, paddings, residuals) for entry in self.graph.entries]

    def _tensor(
        self, entry: StateInput, paddings: Iterator[torch.Tensor], residuals: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        if entry.role in ("valid", "span"):
            return next(paddings)
        if entry.role in ("residual", "change"):
            return residuals[entry.name]
        if entry.of is None:
            return {"broken": self._broken, "clock": self._clock, "known": self._known, "lanes": self._lanes}[
                entry.role
            ]()
        if entry.role == "stage":
            return self.store.stage[entry.of].tensors[entry.slot or ""]
        if entry.role == "slot":
            return self.cells[entry.of][entry.slot or ""]
        tables = self._tables(self.plan.sites[entry.of])
        return tables.order if entry.role == "order" else tables.always

    def _broken(self) -> torch.Tensor:
        if self.branch.health is None or self.branch.health.flag.device != self.device:
            self.branch.health = Health(self.device)
        return self.branch.health.flag

    def _clock(self) -> torch.Tensor:
        if self.track.clock is None or self.track.clock.tensor.device != self.device:
            self.track.clock = Clock.on(self.device)
        return self.track.clock.tensor

    def _known(self) -> torch.Tensor:
        if self.track.known is None:
            with torch.inference_mode(False):
                # Said of every such tensor: torch.set_default_device may name another.
                self.track.known = torch.zeros(1, dtype=torch.bool, device="cpu")
        return self.track.known

    def _lanes(self) -> torch.Tensor:
        return self.store.lanes(self.device, 1 + max(site.passage.late for site in self.plan.rewritten if site.passage))

    def _residuals(self) -> dict[str, torch.Tensor]:
        """By name of the input, what is kept of every stream."""
        if not self.plan.streams:
            return {}
        slots = [
            Slot(f"residual_{i}", evaluate(shape(stream.stop), self.symbols), stream.stop.meta["val"].dtype)
            for i, stream in enumerate(self.plan.streams)
        ]
        changes = [Slot(f"change_{i}", (1,), torch.float32) for i in range(len(slots) if self.plan.measured else 0)]
        owner = self.values[self.graph.owner]
        key = (*_REGION, *(slot.shape for slot in slots), self.moved)
        kept = self._cell(self.branch.caches, owner, key, [*slots, *changes], Place(self.device)).tensors
        if changes:
            self.branch.changes = tuple(kept[slot.name] for slot in changes)
        return kept

    def _caches(self) -> None:
        self.cells: dict[int, dict[str, torch.Tensor]] = {}
        for site in self.plan.rewritten:
            try:
                self._site(site if self.layer is None else replace(site, layer=self.layer))
            except CacheOutOfMemory as error:
                raise SiteOutOfMemory(site, str(error)) from None

    def _site(self, site: Site) -> None:
        columns, share = self._columns(site)
        owner = self.values[site.owner]
        slots = site_slots(site, self.sizes[site.index], columns, len(self._tables(site).order))
        place = Place(self.device, on_host=site.passage is not None)
        tensors: dict[str, torch.Tensor] = {}
        own = self.keys[site.index]
        for home, key in ((self.branch.caches, own), (self.store.shared, self.graph.shared_by(site))):
            some = [slot for slot in slots if slot.shared is (home is self.store.shared)]
            tensors |= self._cell(home, owner, key, some, place).tensors if some else {}
        if passage := site.passage:
            for lane in (passage.early, passage.late):
                self.store.staged(lane, [slot for slot in slots if passage.lane(slot.name) == lane], self.device)
        self.cells[site.index] = tensors
        self.shared_bytes[site.index] = {slot.name: slot.bytes for slot in slots if slot.shared}
        self.branch.held[site.index] = Held(share, {slot.name: slot.bytes for slot in slots if not slot.shared})

    def _cell(self, home: Home, owner: torch.Tensor, key: tuple[Any, ...], slots: Sequence[Slot], place: Place) -> Cell:
        """The buffers of one site, of one branch or shared by all; allocated where they do not fit the slots, in place of those
        that earlier generations had for it with other sizes, or of the oldest of many."""
        sites = home.setdefault(owner, {})
        if home is self.branch.caches:
            self.branch.used.add((id(owner), key))
        if key not in sites or not sites[key].holds(slots, place):
            alike = [k for k in sites if k[:2] == key[:2] and k != key]
            old = [k for k in alike if (id(owner), k) not in self.branch.used] or alike[: 1 - _SIZES]
            for cell in [sites.pop(k) for k in (*old, key) if k in sites]:
                self.store.spare(cell)
                self.track.prepared.clear()  # may hold what was spared
            self.room(sum(s.bytes for s in slots), place)
            sites[key] = self.store.make(slots, place)
            self.whole = False
        return sites[key]

    def _available(self, site: Site) -> int:
        """Columns to choose from: densities are shares of the valid keys."""
        mask = self.plan.mask_of(site)
        return self.sizes[site.index][3] if mask is None else self.known.paddings[mask].keys

    def _columns(self, site: Site) -> tuple[int, float]:
        """Places in a list, and the share of the columns that lists hold in the mean."""
        mask, fixed = self.plan.mask_of(site), Fixed()
        if site.kind == "attention":
            tables = self._tables(site)
            fixed = tables.fixed if mask is None else self.known.paddings[mask].fixed(tables.always)
        sizes, available = self.sizes[site.index], self._available(site)
        columns = site_columns(site, (*sizes[:3], available, sizes[4]), self.config, fixed.most)
        spare = fixed.most - fixed.mean if self.config.attention.local_columns and columns < available else 0
        return columns, (columns - spare) / available

    def _tables(self, site: Site) -> Tables:
        sizes, attention = self.sizes[site.index], site.kind == "attention"
        rows, columns = (sizes[2], sizes[3]) if attention else (sizes[1], sizes[1])
        layout = self.plan.geometry.layout(rows, self.track.grids or ())
        key = (site.kind, rows, columns, site.group_rows, layout, self.device)
        made = self.track.tables
        if key not in made and key in self.track.earlier:
            made[key] = self.track.earlier[key]
        if key not in made:
            raster = self.config.tokens.order == "raster"
            # An MLP shares the order of rows, not what attention adds to it: dense text rows, local windows.
            settings = self.config.attention if attention else AttentionConfig()
            with torch.inference_mode(False):  # they are remembered, and may be asked for outside it
                new = attention_tables(layout, rows, columns, site.group_rows, settings, raster)
                made[key] = Tables(new.order.to(self.device), new.always.to(self.device))
        return made[key]
