"""Which MLPs make the products of their sparse steps in fp8 (mlp.fp8), and why others do not."""

from __future__ import annotations

from dataclasses import replace

from chipmunk_fx.config import Config
from chipmunk_fx.graph.plan import Plan, Site
from chipmunk_fx.kernels import refused_in_fp8
from chipmunk_fx.runtime.footprint import density


def settle(plan: Plan, config: Config) -> Plan:
    """Have every rewritten MLP say in what its products are made, if the user asks for fp8."""
    if not config.mlp.fp8:
        return plan
    return replace(plan, sites=tuple(_settled(site, config) for site in plan.sites))


def in_fp8(site: Site, config: Config) -> bool:
    return site.kind == "mlp" and config.mlp.fp8 and refusal(site, config) is None


def refusal(site: Site, config: Config) -> str | None:
    """Why the sparse steps of an MLP cannot make, or do not need, products in fp8."""
    if density(site, config) == 1:
        return "a sparse step with every neuron is a refresh"
    return refused_in_fp8(site.device, site.dtype, site.hints, site.group_rows)


def _settled(site: Site, config: Config) -> Site:
    if site.kind != "mlp" or site.status == "dense":
        return site
    if refused := refusal(site, config):
        return site.noted(f"products in {site.dtype}, not fp8: {refused}")
    return replace(site, fp8=True).noted("products in fp8")
