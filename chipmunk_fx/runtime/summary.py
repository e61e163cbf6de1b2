"""What a model's last generation did: phases, work, memory, fallbacks."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from tabulate import tabulate

from chipmunk_fx.errors import ChipmunkError
from chipmunk_fx.graph.plan import Plan, Site
from chipmunk_fx.runtime.footprint import density
from chipmunk_fx.runtime.generations import Fallback, Track
from chipmunk_fx.runtime.registry import Unnamed
from chipmunk_fx.runtime.session import Session
from chipmunk_fx.schedule.phase import Phase, strip
from chipmunk_fx.state.store import Account, account

LEGEND = "(R refresh, s sparse, . skipped, D dense)"
COLOURS = ("#c9ccd1", "#d1495b", "#2e86ab", "#f4f1e8")  # dense, refresh, sparse, skip: in the order of Phase
_UNREACHED = (
    "no call has reached the backend yet; where another method than forward is called, compile that: "
    'model.method = torch.compile(model.method, backend="chipmunk")'
)
_NOTHING = "nothing of the model was rewritten (explain says why)"


@dataclass(frozen=True)
class SiteSummary:
    """`phases`: branch -> phase of each step. `density`: share of columns or neurons that a sparse step computes.

    `place`: where its caches lie, "device" or "host". `caches`: bytes of each by name, over all branches.
    """

    name: str
    kind: str
    status: str
    reason: str
    phases: dict[int, list[str]]
    density: float
    cache_bytes: int
    place: str = "device"
    caches: Mapping[str, int] = field(default_factory=dict)

    @property
    def strip(self) -> str:
        """One letter a step, once where all branches agree."""
        return " ".join(dict.fromkeys(strip(phases) for _, phases in sorted(self.phases.items())))


class PlotError(ChipmunkError):
    """A summary that cannot be drawn."""


@dataclass(frozen=True)
class Summary:
    """`flops_ratio`: operations of the generation as a share of the dense model's, matched sites and the rest.

    `cache_bytes`: of all caches; of these, `host_bytes` lie in host memory, and pass through `staging_bytes` on the device.
    `listed`: the refreshes at which attention chose new lists, by step, where others kept them (attention.renew_lists).
    """

    phases: dict[int, list[str]]
    sites: tuple[SiteSummary, ...]
    flops_ratio: float
    cache_bytes: int
    fallbacks: tuple[Fallback, ...]
    note: str = ""
    listed: tuple[int, ...] = ()
    host_bytes: int = 0
    staging_bytes: int = 0

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    def __str__(self) -> str:
        if not self.phases:
            return f"chipmunk_fx: {self.note or 'no call yet'}"
        strips = [f"branch {b}: {strip(phases)}" for b, phases in sorted(self.phases.items())]
        rows = [
            (s.name, s.kind, s.status, s.strip, f"{s.density:.3f}", s.cache_bytes / 1e6, s.reason) for s in self.sites
        ]
        heads = ("site", "kind", "status", "steps", "density", "cache MB", "reason")
        table = [tabulate(rows, headers=heads, floatfmt=".2f", disable_numparse=[3])] if rows else []
        total = f"operations: {self.flops_ratio:.1%} of dense; caches: {self.cache_bytes / 1e6:.1f} MB"
        if self.host_bytes:
            total += (
                f", {self.host_bytes / 1e6:.1f} MB of them in host memory by way of {self.staging_bytes / 1e6:.1f} MB"
            )
        counts = Counter((str(f.phase), f.reason) for f in self.fallbacks)
        falls = [f"{count} {'call' if count == 1 else 'calls'} {does}: {why}" for (does, why), count in counts.items()]
        kept = [f"lists of attention chosen at steps {', '.join(map(str, self.listed))}"] if self.listed else []
        return "\n".join([*strips, LEGEND, *table, total, *kept, *falls, *([self.note] if self.note else [])])

    def plot(self, path: str | os.PathLike[str], branch: int = 0) -> None:
        """Write a picture, in the format that the ending of `path` names: sites down, steps across, a colour a phase.

        Raises PlotError where matplotlib is missing, and where there is no such branch.
        """
        if branch not in self.phases:
            known = ", ".join(map(str, sorted(self.phases))) or "none: no call has reached the backend yet"
            raise PlotError(f"the summary has no branch {branch} to draw; branches: {known}")
        try:
            from matplotlib.colors import ListedColormap
            from matplotlib.figure import Figure
            from matplotlib.patches import Patch
        except ImportError as missing:
            raise PlotError("summary.plot needs matplotlib: pip install matplotlib") from missing
        steps = self.phases[branch]
        shown = [s for s in self.sites if len(s.phases.get(branch, ())) == len(steps)]
        lines = {"schedule": steps} | {f"{s.name} {s.kind}": s.phases[branch] for s in shown}
        cells = [[list(Phase).index(Phase(phase)) for phase in phases] for phases in lines.values()]
        figure = Figure(figsize=(2.5 + 0.16 * len(cells[0]), 1 + 0.2 * len(cells)), layout="constrained")
        axes = figure.subplots()
        axes.pcolormesh(cells, cmap=ListedColormap(COLOURS), vmin=-0.5, vmax=3.5, edgecolors="white", linewidth=0.5)
        axes.set_yticks([row + 0.5 for row in range(len(cells))], list(lines))
        axes.invert_yaxis()
        axes.set_xlabel("step")
        axes.set_title(f"branch {branch}, {self.flops_ratio:.0%} of the operations of dense")
        handles = [Patch(color=c, label=phase) for c, phase in zip(COLOURS, Phase, strict=True)]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(COLOURS), frameon=False)
        figure.savefig(path)


def summarize(sessions: Sequence[Session], key: Any = None, named: bool = False, met: bool = True) -> Summary:
    """The generation begun last, or the one of `key` where `named`. Raises KeyError for a key that no call had.

    `met`: calls have reached the backend.
    """
    tracks = _tracks(sessions, key, named)
    if named and not tracks:
        known = sorted(
            {repr(k) for s in sessions for k in list(s.tracks) if k is not None and not isinstance(k, Unnamed)}
        )
        raise KeyError(f"no generation {key!r}; there are {', '.join(known) or 'none with a key'}")
    if not tracks:
        return Summary({}, (), 1.0, 0, (), "" if sessions else _NOTHING if met else _UNREACHED)
    sites = [site for session, track in tracks for site in _sites(session, track)]
    spent, dense = zip(*(_work(session, track) for session, track in tracks), strict=True)
    kept = sum((_account(session, track) for session, track in tracks), Account())
    first = max((track for _, track in tracks), key=lambda t: any(r.phase is not Phase.DENSE for r in t.records))
    return Summary(
        _phases(first),
        tuple(sites),
        sum(spent) / sum(dense) if sum(dense) else 1.0,
        kept.total,
        tuple(f for _, track in tracks for f in track.fallbacks),
        listed=_listed(first),
        host_bytes=kept.host,
        staging_bytes=sum(cell.bytes for session, _ in tracks for cell in session.store.stage.values()),
    )


def site_flops(site: Site, phase: Phase, share: float, sampled: float) -> float:
    """Operations of one site in one phase, `share` of its columns being computed on a sparse step.

    A refresh of attention adds the column masses, from a share of `sampled` rows, and the selected part.
    """
    dense = site.dense_flops
    if site.status == "dense" or phase is Phase.DENSE:
        return dense
    if site.kind == "mlp":
        return dense if phase is Phase.REFRESH else dense * share
    return dense * (1 + 0.5 * sampled + share if phase is Phase.REFRESH else share)


def _tracks(sessions: Sequence[Session], key: Any, named: bool) -> list[tuple[Session, Track]]:
    """One generation: the same key in all sessions (pieces of the model) under the settings that it began with."""
    called = [(s, k, t) for s in sessions for k, t in list(s.tracks.items()) if t.records and (k == key or not named)]
    newest, chosen, _ = max(called, key=lambda entry: entry[2].begun, default=(None, None, None))
    return [(s, t) for s, k, t in called if newest is not None and s.tag == newest.tag and k == chosen]


def _listed(track: Track) -> tuple[int, ...]:
    refreshes = [record for record in track.records if record.phase is Phase.REFRESH]
    renewed = {record.step for record in refreshes if record.renewed}
    return () if all(record.renewed for record in refreshes) else tuple(sorted(renewed))


def _phases(track: Track) -> dict[int, list[str]]:
    phases: dict[int, list[str]] = {}
    for record in track.records:
        phases.setdefault(record.branch, []).append(str(record.phase))
    return phases


def _plans(track: Track) -> list[Plan]:
    plans: list[Plan] = []
    for record in track.records:
        graph = record.graph()
        if graph is not None and not any(graph.plan is plan for plan in plans):
            plans.append(graph.plan)
    return plans


def _sites(session: Session, track: Track) -> list[SiteSummary]:
    plans = _plans(track)
    phases = _phases(track)
    summaries = []
    is_piece = bool(plans) and not plans[-1].roles.timed  # a block among others
    prefix = f"{session.arrival}." if is_piece else ""
    exempt = _exempt(session, plans[-1]) if is_piece else ""
    for site in plans[-1].sites if plans else ():
        if exempt and site.status == "rewritten":
            site = replace(site, status="dense", reason=exempt)
        own = {b: [_phase_of(site, plans[-1], phase) for phase in p] for b, p in phases.items()}
        share, caches = _held(session, track, site)
        bytes_, reason = sum(caches.values()), site.reason
        name = prefix + site.name
        summaries.append(
            SiteSummary(
                name, site.kind, site.status, reason, own, share, bytes_, "host" if site.passage else "device", caches
            )
        )
    return summaries


def _exempt(session: Session, plan: Plan) -> str:
    """Why a block that is compiled by itself is dense, if it is: all of it, whichever kind of site the settings are of."""
    kinds, block = {site.kind for site in plan.rewritten}, session.arrival
    told = (("attention", session.config.attention), ("mlp", session.config.mlp))
    named = [
        f"{kind}.{'layers' if settings.of_layer(block) else 'dense_layers'}"
        for kind, settings in told
        if kind in kinds and settings.is_dense(block)
    ]
    return f"block {block} is dense as a whole, by {' and '.join(named)}" if named else ""


def _phase_of(site: Site, plan: Plan, phase: str) -> str:
    if phase == Phase.SKIP:
        return phase if plan.in_region(site) else str(Phase.DENSE)
    return str(Phase.DENSE) if site.status == "dense" else phase


def _held(session: Session, track: Track, site: Site) -> tuple[float, dict[str, int]]:
    """(share of columns in the lists that the site holds, bytes of its caches by name over all branches)."""
    held = [branch.held[site.index] for branch in track.branches.values() if site.index in branch.held]
    if not held:
        return density(site, session.config), {}
    caches = Counter(session.shared_bytes.get(site.index, {}))
    for each in held:
        caches.update(each.slots)
    return held[-1].share, dict(caches)


def _account(session: Session, track: Track) -> Account:
    own = account(branch.caches for branch in track.branches.values())
    return own + account([session.store.shared]) if own.total else own


def _work(session: Session, track: Track) -> tuple[float, float]:
    """(operations done, operations of the dense model) over the generation's calls."""
    spent = dense = 0.0
    for record in track.records:
        graph = record.graph()
        if graph is not None:
            plan = graph.plan
            dense += plan.total_flops
            if record.phase is Phase.SKIP:
                spent += plan.skip_flops
                continue
            spent += plan.rest_flops
            for site in plan.sites:
                share, _ = _held(session, track, site)
                sampled = 1 / session.config.attention.mass_stride if record.renewed else 0.0
                spent += site_flops(site, record.phase, share, sampled)
    return spent, dense
