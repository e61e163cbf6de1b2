"""How many columns a site computes and what it keeps between steps, from its sizes and the settings."""

from __future__ import annotations

from collections.abc import Sequence

from chipmunk_fx.config import Config
from chipmunk_fx.graph.plan import Plan, Site
from chipmunk_fx.runtime.tables import attention_tables
from chipmunk_fx.state.slots import Slot, attention_slots, columns, mlp_slots

TILE = 16  # column counts are rounded up to this


def site_columns(site: Site, sizes: Sequence[int], config: Config, always: int = 0) -> int:
    """Columns (keys or neurons) in a group's list on a sparse step; `always` of them are fixed (text, local windows)."""
    settings = config.attention if site.kind == "attention" else config.mlp
    return columns(sizes[3], settings.density_of(site.layer), settings.random_density, always, TILE)


def site_slots(site: Site, sizes: Sequence[int], columns: int, grouped_rows: int | None = None) -> tuple[Slot, ...]:
    """The caches of one branch of a site. `columns`: of a list; `grouped_rows`: rows that share lists (all by default)."""
    if site.kind == "attention":
        b, h, n, m, d = sizes
        return attention_slots(
            b, h, n, m, d, site.dtype, grouped_rows=grouped_rows, group_rows=site.group_rows, columns=columns,
            device=site.device.type, keeps_lse=site.keeps_lse,
        )  # fmt: skip
    b, n, c, f, out = sizes
    fp8 = (site.first_weights, c) if site.fp8 else None
    return mlp_slots(b, n, f, out, site.dtype, group_rows=site.group_rows, columns=columns, fp8=fp8)


def density(site: Site, config: Config) -> float:
    """Share of columns a sparse step computes at the compiled sizes (text and cubes not counted: they depend on the call)."""
    if site.status == "dense":
        return 1.0
    window = config.attention.local_window if site.kind == "attention" else 0.0
    return min(site_columns(site, site.hints, config) / site.hints[3] + window, 1.0)


def branch_slots(site: Site, plan: Plan, config: Config) -> tuple[Slot, ...]:
    """The caches of one branch at the compiled sizes, all keys being valid."""
    if site.kind == "mlp":
        return site_slots(site, site.hints, site_columns(site, site.hints, config))
    _, _, rows, keys, _ = site.hints
    layout = plan.geometry.layout(rows, plan.geometry.compiled)
    raster = config.tokens.order == "raster"
    tables = attention_tables(layout, rows, keys, site.group_rows, config.attention, raster)
    columns = site_columns(site, site.hints, config, tables.fixed.most)
    return site_slots(site, site.hints, columns, len(tables.order))


def cache_bytes(site: Site, plan: Plan, config: Config, branches: int = 1) -> int:
    """Bytes of a site's caches at the compiled sizes, all keys being valid."""
    return sum(slot.bytes * (1 if slot.shared else branches) for slot in branch_slots(site, plan, config))
