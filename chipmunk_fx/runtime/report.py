"""What `explain` shows: every site with its status and reason, as text, as data, as JSON."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from tabulate import tabulate
from torch import fx, nn

from chipmunk_fx.config import Config
from chipmunk_fx.errors import ChipmunkError
from chipmunk_fx.graph.flops import node_flops
from chipmunk_fx.graph.inputs import Roles
from chipmunk_fx.graph.match import Candidate
from chipmunk_fx.graph.plan import Plan, Site
from chipmunk_fx.graph.sizes import hint, is_data_dependent
from chipmunk_fx.graph.walk import shape
from chipmunk_fx.runtime.registry import unwrap

KINDS = ("attention", "mlp")
_NO_TIMESTEP = "not found (calls are counted, by schedule.steps and schedule.branches)"


@dataclass(frozen=True)
class SiteReport:
    """One attention or MLP; `where` is the source line of the user's model. Sizes are those seen while compiling.

    `shape`: attention (B, H, N, M, D), MLP (B, N, C, F, C2); of what was refused, unless it is one SDPA, the result's.
    `flops`: of the dense site; of what was refused, of its last product alone. A near miss (accepted=False) names the
    `pattern` that got furthest, the graph's `node` at which it ended, and the `constraint` that was not met there.
    """

    name: str
    kind: str
    form: str
    accepted: bool
    status: Literal["rewritten", "dense"]
    reason: str
    shape: tuple[int | str, ...]
    where: str
    flops: int = 0
    pattern: str = ""
    node: str = ""
    constraint: str = ""


@dataclass(frozen=True)
class Report:
    """All sites of a model, in graph order: accepted ones first, then what was recognised and refused.

    `coverage`: share of the model's `total_flops` that rewritten sites hold.
    """

    sites: tuple[SiteReport, ...]
    timestep: str | None
    latents: str | None
    text: tuple[str, ...]
    geometry: str
    coverage: float
    notes: tuple[str, ...] = ()
    total_flops: int = 0

    def count(self, kind: str, status: str | None = None) -> int:
        """Accepted sites of a kind ("attention" | "mlp"), of one status ("rewritten" | "dense") where given."""
        if kind not in KINDS or status not in (None, "rewritten", "dense"):
            raise ValueError(
                f"count({kind!r}, status={status!r}): kinds are 'attention' and 'mlp', "
                "statuses 'rewritten', 'dense' or None for both"
            )
        return sum(s.accepted and s.kind == kind and status in (None, s.status) for s in self.sites)

    def tally(self, kind: str) -> dict[str, int]:
        """Coverage by count: sites "rewritten", of those "accepted", of those "found"."""
        found = sum(s.kind == kind for s in self.sites)
        return {"rewritten": self.count(kind, "rewritten"), "accepted": self.count(kind), "found": found}

    @property
    def accepted_coverage(self) -> float:
        """Share of the floating-point operations that accepted sites hold, rewritten or not."""
        return sum(s.flops for s in self.sites if s.accepted) / self.total_flops if self.total_flops else 0.0

    def to_json(self) -> str:
        summary = {kind: self.tally(kind) for kind in KINDS} | {"accepted_coverage": self.accepted_coverage}
        return json.dumps(asdict(self) | {"summary": summary}, indent=2)

    def __str__(self) -> str:
        taken = [(*_cells(s), s.status, s.reason, s.where) for s in self.sites if s.accepted]
        refused = [(*_cells(s), "refused", s.pattern, s.node, s.reason, s.where) for s in self.sites if not s.accepted]
        site = ("site", "kind", "form", "shape", "status")
        tables = []
        if taken or not refused:
            tables.append(tabulate(taken, headers=(*site, "reason", "where"), disable_numparse=True))
        if refused:
            headers = (*site, "pattern", "at", "reason", "where")
            tables.append(tabulate(refused, headers=headers, disable_numparse=True))
        counts = ", ".join(
            "{rewritten} of {accepted} {kind} sites rewritten ({found} found)".format(kind=kind, **self.tally(kind))
            for kind in KINDS
        )
        lines = [
            f"{counts}; they hold {self.coverage:.1%} of {self.total_flops / 1e9:.3g} G floating-point operations, "
            f"accepted ones {self.accepted_coverage:.1%}",
            f"timestep: {self.timestep or _NO_TIMESTEP}; latents: {self.latents or 'not found'}; "
            f"text: {', '.join(self.text) or 'none'}; grid: {self.geometry}",
            *self.notes,
        ]
        return "\n".join(["\n\n".join(tables), "", *lines])


def report_of(plan: Plan, names: Sequence[str], notes: Sequence[str] = ()) -> Report:
    """`names` of the graph's inputs, in order."""

    def name(index: int | None) -> str | None:
        return None if index is None else names[index]

    done = sum(s.dense_flops for s in plan.rewritten)
    roles = plan.roles
    return Report(
        tuple([_site(s) for s in plan.sites] + [_refused(c, names) for c in plan.refused]),
        roles.constant.name if roles.constant else name(roles.timestep),
        None if roles.latents is None else ", ".join(names[i] for i in (roles.latents, *roles.beside)),
        tuple(names[i] for i in roles.text),
        plan.geometry.source,
        done / plan.total_flops if plan.total_flops else 0.0,
        (*notes, *_doubts(roles, names)),
        plan.total_flops,
    )


def _doubts(roles: Roles, names: Sequence[str]) -> list[str]:
    """What is said of a timestep that no name tells."""
    if not roles.doubtful or roles.timestep is None:
        return []
    others = ", ".join(names[i] for i in roles.doubtful)
    return [
        f"no name tells whether the timestep is {names[roles.timestep]} or {others}: the first of them to move from step to step "
        "is taken for it; a name (timestep, t, sigma) would tell it at once"
    ]


def merge(reports: Sequence[Report], notes: Sequence[str] = ()) -> Report:
    """One report of a model that was captured in pieces."""
    if not reports:
        return Report((), None, None, (), "unknown", 0.0, tuple(notes))
    first = max(reports, key=lambda r: len(r.sites))
    total = sum(r.total_flops for r in reports)
    return Report(
        tuple(s for r in reports for s in r.sites),
        next((r.timestep for r in reports if r.timestep), None),
        next((r.latents for r in reports if r.latents), None),
        first.text,
        first.geometry,
        sum(r.coverage * r.total_flops for r in reports) / total if total else 0.0,
        (*dict.fromkeys(n for r in reports for n in r.notes), *notes),
        total,
    )


class _Stop(BaseException):
    """Ends the call from inside the backend, so that Dynamo keeps nothing of it and wraps no error of ours."""

    def __init__(self, error: ChipmunkError | None = None) -> None:
        self.error = error


Inspect = Callable[[fx.GraphModule, Sequence[Any], Config], Report]


def explain_model(model: nn.Module, args: tuple, kwargs: dict[str, Any], config: Config, inspect: Inspect) -> Report:
    """Capture `model(*args, **kwargs)`; compile nothing. A model whose graph breaks is run to see its other pieces."""
    target = unwrap(model)
    graphs: list[Report] = []
    calls: list[Report] = []  # blocks alike share a graph, which is called for each

    def running(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        try:
            seen = inspect(graph, inputs, config)
        except ChipmunkError as error:
            raise _Stop(error) from None
        graphs.append(seen)

        def call(*values: Any) -> Any:
            calls.append(seen)
            return graph.forward(*values)

        return call

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
        except (torch._dynamo.exc.Unsupported, torch._dynamo.exc.UserError) as unsupported:
            cause = str(unsupported).strip().splitlines()[0]
            try:
                torch.compile(target.forward, backend=running)(*args, **kwargs)
            except _Stop as stop:
                raise stop.error or stop from None
            notes.append(f"the graph breaks into {len(graphs)} pieces: {cause}")
    return merge(calls or graphs, notes)


def _cells(site: SiteReport) -> tuple[str, ...]:
    return site.name, site.kind, site.form, "x".join(map(str, site.shape))


def _site(site: Site) -> SiteReport:
    return SiteReport(
        site.name,
        site.kind,
        site.form,
        True,
        site.status,
        site.reason,
        site.hints,
        site.where,
        site.dense_flops,
    )


def _refused(candidate: Candidate, names: Sequence[str]) -> SiteReport:
    anchor = candidate.anchor
    inputs = [node.name for node in anchor.graph.nodes if node.op == "placeholder"]
    known = dict(zip(inputs, names, strict=True))  # graph inputs are shown under the user's names

    def told(text: str) -> str:
        return re.sub(r"\w+", lambda word: known.get(word.group(), word.group()), text)

    reason = told(candidate.reason or "")
    sizes = shape(anchor)
    if anchor.target is torch.ops.aten.scaled_dot_product_attention.default:
        query, key = (shape(argument) for argument in anchor.args[:2])  # pyright: ignore[reportArgumentType]
        sizes = (*query[:-1], key[-2], query[-1])
    return SiteReport(
        candidate.name,
        candidate.kind,
        candidate.form,
        False,
        "dense",
        reason,
        tuple(str(s) if is_data_dependent([s]) else hint(s) for s in sizes),
        candidate.where,
        0 if any(is_data_dependent(shape(n)) for n in (anchor, *anchor.all_input_nodes)) else node_flops(anchor),
        candidate.pattern,
        told((candidate.node or anchor).name),
        told(candidate.constraint or "") or reason,
    )
