"""What `explain` shows: every site with its status and reason, as text, as data, as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from tabulate import tabulate
from torch import fx, nn

from chipmunk_fx.config import Config
from chipmunk_fx.errors import ChipmunkError
from chipmunk_fx.graph.match import Candidate
from chipmunk_fx.graph.plan import Plan, Site
from chipmunk_fx.graph.sizes import hints
from chipmunk_fx.graph.walk import shape
from chipmunk_fx.runtime.registry import unwrap


@dataclass(frozen=True)
class SiteReport:
    """One attention or MLP. `shape`: attention (B, H, N, M, D), MLP (B, N, C, F, C2); sizes while compiling."""

    name: str
    kind: str
    form: str
    accepted: bool
    status: Literal["rewritten", "dense"]
    reason: str
    shape: tuple[int, ...]
    where: str


@dataclass(frozen=True)
class Report:
    """All sites of a model, in graph order: accepted ones first, then what was recognised and refused."""

    sites: tuple[SiteReport, ...]
    timestep: str | None
    latents: str | None
    text: tuple[str, ...]
    geometry: str
    coverage: float
    notes: tuple[str, ...] = ()

    def count(self, kind: str, status: str | None = None) -> int:
        """Accepted sites of a kind ("attention" | "mlp"), of one status ("rewritten" | "dense") where given."""
        if kind not in ("attention", "mlp") or status not in (None, "rewritten", "dense"):
            raise ValueError(
                f"count({kind!r}, status={status!r}): kinds are 'attention' and 'mlp', "
                "statuses 'rewritten', 'dense' or None for both"
            )
        return sum(s.accepted and s.kind == kind and status in (None, s.status) for s in self.sites)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    def __str__(self) -> str:
        rows = [
            (
                s.name,
                s.kind,
                s.form,
                "x".join(map(str, s.shape)),
                s.status if s.accepted else "refused",
                s.reason,
                s.where,
            )
            for s in self.sites
        ]
        table = tabulate(rows, headers=("site", "kind", "form", "shape", "status", "reason", "where"))
        counts = ", ".join(
            f"{self.count(kind, 'rewritten')} of {self.count(kind)} {kind} sites rewritten"
            for kind in ("attention", "mlp")
        )
        lines = [
            f"{counts}; they hold {self.coverage:.1%} of the floating-point operations",
            f"timestep: {self.timestep or 'not found'}; latents: {self.latents or 'not found'}; "
            f"text: {', '.join(self.text) or 'none'}; grid: {self.geometry}",
            *self.notes,
        ]
        return "\n".join([table, *lines])


def report_of(plan: Plan, names: Sequence[str], notes: Sequence[str] = ()) -> Report:
    """`names` of the graph's inputs, in order."""

    def name(index: int | None) -> str | None:
        return None if index is None else names[index]

    done = sum(s.dense_flops for s in plan.rewritten)
    roles = plan.roles
    return Report(
        tuple([_site(s) for s in plan.sites] + [_refused(c) for c in plan.refused]),
        name(roles.timestep),
        name(roles.latents),
        tuple(names[i] for i in roles.text),
        plan.geometry.source,
        done / plan.total_flops if plan.total_flops else 0.0,
        tuple(notes),
    )


def merge(reports: Sequence[Report], notes: Sequence[str] = ()) -> Report:
    """One report of a model that was captured in pieces."""
    if not reports:
        return Report((), None, None, (), "unknown", 0.0, tuple(notes))
    first = max(reports, key=lambda r: len(r.sites))
    return Report(
        tuple(s for r in reports for s in r.sites),
        next((r.timestep for r in reports if r.timestep), None),
        next((r.latents for r in reports if r.latents), None),
        first.text,
        first.geometry,
        first.coverage,
        (*(n for r in reports for n in r.notes), *notes),
    )


class _Stop(BaseException):
    """Ends the call from inside the backend, so that Dynamo keeps nothing of it and wraps no error of ours."""

    def __init__(self, error: ChipmunkError | None = None) -> None:
        self.error = error


Inspect = Callable[[fx.GraphModule, Sequence[Any], Config], Report]


def explain_model(model: nn.Module, args: tuple, kwargs: dict[str, Any], config: Config, inspect: Inspect) -> Report:
    """Capture `model(*args, **kwargs)`; compile nothing. A model whose graph breaks is run to see its other pieces."""
    target = unwrap(model)
    reports: list[Report] = []

    def running(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        try:
            reports.append(inspect(graph, inputs, config))
        except ChipmunkError as error:
            raise _Stop(error) from None
        return graph.forward

    def stopping(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        running(graph, inputs)
        raise _Stop

    notes: list[str] = []
    # Classes may share the code of a wrapped forward: looking at many models must not use up its recompiles.
    with (
        torch.no_grad(),
        torch._dynamo.config.patch(recompile_limit=sys.maxsize, accumulated_recompile_limit=sys.maxsize),
    ):
        try:
            torch.compile(target.forward, backend=stopping, fullgraph=True)(*args, **kwargs)
        except _Stop as stop:
            if stop.error:
                raise stop.error from None
        except torch._dynamo.exc.Unsupported as unsupported:
            cause = str(unsupported).strip().splitlines()[0]
            try:
                torch.compile(target.forward, backend=running)(*args, **kwargs)
            except _Stop as stop:
                raise stop.error or stop from None
            notes.append(f"the graph breaks into {len(reports)} pieces: {cause}")
    return merge(reports, notes)


def _site(site: Site) -> SiteReport:
    return SiteReport(
        site.name, site.kind, site.form, True, site.status, site.reason, hints(site.sizes), site.where
    )  # fmt: skip


def _refused(candidate: Candidate) -> SiteReport:
    sizes = tuple(str(s) if not isinstance(s, int) else s for s in shape(candidate.anchor))
    return SiteReport(
        candidate.name, candidate.kind, candidate.form, False, "dense", candidate.reason or "", sizes, candidate.where
    )  # pyright: ignore[reportArgumentType]
