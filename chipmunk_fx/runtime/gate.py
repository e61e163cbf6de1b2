"""The cost gate: why a site would not be faster sparse, from measured costs; and the memory budget."""

from __future__ import annotations

import os
from dataclasses import replace

import torch

from chipmunk_fx.config import Config
from chipmunk_fx.graph.plan import Plan, Site
from chipmunk_fx.graph.sizes import hints
from chipmunk_fx.kernels import BACKENDS
from chipmunk_fx.runtime.footprint import cache_bytes, density

# Two CPU cores with AVX-512 (kernels/README.md has the sweep): below these row counts gathering costs what sparsity saves.
_CPU_ROWS = {"attention": 768, "mlp": 768}
_CPU_DENSITY = {"attention": 0.45, "mlp": 0.6}  # above this share dense is as fast


def cost_gate(site: Site, config: Config) -> str | None:
    """Why `site` stays dense with gate="auto"; None where sparse steps are expected to be faster."""
    if site.device.type == "cuda" and not BACKENDS:
        return 'no kernel backend for cuda: plain PyTorch would be slower than dense (gate="off" runs it)'
    rows, share = hints([site.rows])[0], density(site, config)
    if rows < _CPU_ROWS[site.kind]:
        return f"{rows} rows: sparse is not faster below {_CPU_ROWS[site.kind]}"
    if share > _CPU_DENSITY[site.kind]:
        return f"density {share:.2f}: sparse is not faster above {_CPU_DENSITY[site.kind]}"
    return None


def fit(plan: Plan, config: Config) -> Plan:
    """Keep sites dense until the caches of the expected branches fit the budget: MLP sites first, the last ones first."""
    if not plan.rewritten:
        return plan
    branches = config.schedule.branches or 1
    limit = budget(config, plan.rewritten[0].device)
    sizes = {s.index: branches * cache_bytes(s, config) for s in plan.rewritten}
    sites = list(plan.sites)
    for kind in ("mlp", "attention"):
        for site in [s for s in reversed(plan.rewritten) if s.kind == kind]:
            total = sum(sizes.values())
            if total <= limit:
                return replace(plan, sites=tuple(sites))
            reason = f"memory budget: caches of {total / 1e9:.3g} GB, {limit / 1e9:.3g} GB allowed (memory.budget_gb)"
            sites[site.index] = replace(site, status="dense", reason=reason)
            del sizes[site.index]
    return replace(plan, sites=tuple(sites))


def budget(config: Config, device: torch.device) -> int:
    """Bytes that caches may take: memory.budget_gb, or 60 % of what is free on the device (host: 50 %)."""
    if config.memory.budget_gb != "auto":
        return int(float(config.memory.budget_gb) * 1e9)
    if device.type == "cuda":
        return int(0.6 * torch.cuda.mem_get_info(device)[0])
    return int(0.5 * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
