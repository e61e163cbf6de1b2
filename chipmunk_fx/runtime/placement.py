"""Where caches lie: site by site on the device, in pinned host memory, or not made at all, within what is free."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Hashable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from chipmunk_fx.config import Config
from chipmunk_fx.graph.passage import Passage
from chipmunk_fx.graph.plan import Plan, Site
from chipmunk_fx.runtime.footprint import branch_slots, cache_bytes
from chipmunk_fx.runtime.registry import held
from chipmunk_fx.state.store import Place

Where = Literal["device", "host", "dense"]

STEADY = 0.95  # of the host's free memory: compiling takes some, and calls whose caches then find no room are dense as a whole


def fit(plan: Plan, config: Config) -> Plan:
    """Give every site its place for the caches of the expected branches; what fits nowhere stays dense.

    Over budget, MLP sites give way first, the last ones first: with "auto" to the host, from there to dense.
    """
    if not plan.rewritten:
        return plan
    device = plan.rewritten[0].device
    offload = config.memory.offload if plan.roles.timed else "none"
    sizes = {s.index: cache_bytes(s, plan, config, config.schedule.branches or 1) for s in plan.rewritten}
    where: dict[int, Where] = dict.fromkeys(sizes, "host" if offload == "all" else "device")
    allowed = {"device": limit(config, Place(device)), "host": int(STEADY * limit(config, Place(device, on_host=True)))}
    reasons: dict[int, str] = {}
    moves: tuple[tuple[Where, Where], ...] = (("host", "dense"),) if offload == "all" else (("device", "dense"),)
    if offload == "auto":
        moves = (("device", "host"), ("host", "dense"))
    for source, target in moves:
        for site in giving_way(plan):
            total = sum(size for index, size in sizes.items() if where[index] == source)
            if total > allowed[source] and where[site.index] == source:
                where[site.index] = target
                reasons[site.index] = _over(source, total, allowed[source])
    return _sent(replace(plan, sites=tuple(_placed(s, where, sizes, reasons) for s in plan.sites)), where, config)


def notes(plan: Plan, config: Config) -> list[str]:
    """Where the caches of a plan lie, in words; nothing to say where all stay on the device unasked."""
    if config.memory.offload == "none" or not plan.rewritten:
        return []
    if not plan.roles.timed:
        return ["memory.offload: caches of a piece of a model stay on the device; compile the whole model to offload"]
    branches = config.schedule.branches or 1
    totals = {"device": 0, "host": 0}
    for site in plan.rewritten:
        totals["host" if site.passage else "device"] += cache_bytes(site, plan, config, branches)
    shown = ", ".join(f"{size / 1e6:.1f} MB {_AT[place]}" for place, size in totals.items())
    return [f"caches of {branches} branch(es): {shown}; {staging_bytes(plan, config) / 1e6:.1f} MB to pass through"]


def staging_bytes(plan: Plan, config: Config) -> int:
    """Bytes of the buffers on the device through which caches on the host pass, at the compiled sizes."""
    staged = {
        (site.passage.lane(slot.name), slot.name): slot.bytes
        for site in plan.rewritten
        if site.passage
        for slot in branch_slots(site, plan, config)
    }
    return sum(staged.values())


def limit(config: Config, place: Place) -> int:
    """Bytes that caches may take: memory.budget_gb, or 60 % of what is free on the device (host: 50 %) or theirs already."""
    mine = held(config).at(place)
    if place.on_host:
        return int(0.5 * (_host_memory() + mine))
    if config.memory.budget_gb != "auto":
        return int(min(float(config.memory.budget_gb) * 1e9, sys.maxsize))
    if place.device.type == "cuda":
        return int(0.6 * (torch.cuda.mem_get_info(place.device)[0] + mine))
    return int(0.5 * (_host_memory() + mine))


_AT = {"device": "on the device", "host": "in host memory"}


def giving_way(plan: Plan) -> Iterator[Site]:
    """The rewritten sites in the order in which they stay dense over budget: MLPs first, the last ones first."""
    for kind in ("mlp", "attention"):
        yield from (site for site in reversed(plan.rewritten) if site.kind == kind)


def _placed(site: Site, where: dict[int, Where], sizes: dict[int, int], reasons: dict[int, str]) -> Site:
    place = where.get(site.index)
    if place == "host":
        return site.noted(f"caches of {sizes[site.index] / 1e6:.3g} MB in host memory")
    return site if place != "dense" else replace(site, status="dense", reason=reasons[site.index])


def _sent(plan: Plan, where: dict[int, Where], config: Config) -> Plan:
    """With a way between host and device for the caches that lie on the host; sites whose caches are alike share lanes."""
    layouts: dict[Hashable, int] = {}
    seen: Counter[int] = Counter()
    sites = []
    for site in plan.sites:
        if where.get(site.index) == "host":
            settings = config.attention if site.kind == "attention" else config.mlp
            density = settings.density_of(site.layer)  # lists of two may be as long at this size and not at others
            alike = site.kind, str(site.sizes), branch_slots(site, plan, config), plan.mask_of(site), density
            layout = layouts.setdefault(alike, len(layouts))
            site = replace(site, passage=Passage.of(layout, seen[layout]))
            seen[layout] += 1
        sites.append(site)
    return replace(plan, sites=tuple(sites))


def _over(source: Where, total: int, allowed: int) -> str:
    whose = "memory.budget_gb" if source == "device" else f"{STEADY * 100:.0f} % of half of the host's free memory"
    return f"memory budget: caches of {total / 1e9:.3g} GB, {allowed / 1e9:.3g} GB allowed ({whose})"


def _host_memory() -> int:
    """Bytes that the host can give, what it uses to cache files included."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
