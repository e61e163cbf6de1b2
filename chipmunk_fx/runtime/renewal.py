"""What a refresh of attention takes from the one before: lists that it keeps, or what it weighs masses by."""

from __future__ import annotations

from dataclasses import replace

from chipmunk_fx.config import Config
from chipmunk_fx.graph.plan import Plan, Site
from chipmunk_fx.kernels import refreshes_in_parts
from chipmunk_fx.runtime.footprint import density
from chipmunk_fx.runtime.variants import records_graphs


def settle(plan: Plan, config: Config) -> Plan:
    """Have refreshes be told whether there has been one before, and sites keep what the next can use.

    A recorded CUDA graph is told nothing: it takes a second one to keep lists, and masses weighed anew.
    """
    if records_graphs(config):
        return plan
    sites = tuple(replace(s, keeps_lse=True) if _uses_earlier(s, config) else s for s in plan.sites)
    renewing = config.attention.renew_lists
    told = any(s.kind == "attention" and s.status == "rewritten" and (s.keeps_lse or not renewing) for s in sites)
    return replace(plan, sites=sites, tells_known=told)


def _uses_earlier(site: Site, config: Config) -> bool:
    """Whether it renews its lists at refreshes that are faster where these are known beforehand."""
    if site.kind != "attention" or site.status == "dense" or not config.attention.renew_lists:
        return False
    share = density(site, config)
    return share < 1 and refreshes_in_parts(site.device, site.dtype, site.hints, site.group_rows, share)
