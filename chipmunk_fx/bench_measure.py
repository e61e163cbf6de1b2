"""How long the steps of a whole model take: dense, sparse, sparse with skipped steps, and skipped steps alone.

Weights and inputs are random, which serves for speed only. A way is measured on a short generation that shows each of
its phases several times; what fifty steps would take is composed of these medians, or measured.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from chipmunk_fx.backend import explain, summary
from chipmunk_fx.bench_dense import FLASH4, kernels, preferred, through_op
from chipmunk_fx.bench_subjects import Built, ignore_masks
from chipmunk_fx.config import Config, ScheduleConfig
from chipmunk_fx.config_yaml import ORIGINAL
from chipmunk_fx.errors import BenchError
from chipmunk_fx.log import progress
from chipmunk_fx.runtime.report import Report
from chipmunk_fx.runtime.variants import records_graphs
from chipmunk_fx.schedule.phase import Phase
from chipmunk_fx.schedule.policies import History, policy_from

# Published for 50 steps (arXiv 2506.03275); lists are literal.
PUBLISHED_STEPS = 50
SKIPPED: tuple[int, ...] = ORIGINAL["step_caching.skip_step_schedule"]
DRIFT = 0.02  # of the latents from step to step


@dataclass(frozen=True)
class Request:
    """What to measure. `rounds`: timed generations a way, after one that compiles; `sparse_steps` and `skip_steps` in each.

    `whole`: run all `steps` of every way instead of composing their total. `eager`: also the model as it is, uncompiled.
    """

    options: Mapping[str, Any]
    steps: int = PUBLISHED_STEPS
    rounds: int = 2
    sparse_steps: int = 4
    skip_steps: int = 2
    whole: bool = False
    eager: bool = False
    backend: str = "inductor"


@dataclass(frozen=True)
class Way:
    """One way to run the model: `backend` of torch.compile (None: uncompiled) with `options`, and its phases by step."""

    name: str
    backend: str | None
    options: Mapping[str, Any]
    phases: tuple[str, ...]  # of the short generation
    unpadded: bool = False


@dataclass(frozen=True)
class Figures:
    """`ms`: median of a step by phase, all calls of the step together. `total_s` of `steps` steps: "composed" of these,
    "measured", or "extrapolated" as these are. `density`: share of columns a sparse step computes, mean over the rewritten
    sites of a kind. `shared_gb`: of `cache_gb`, what is no site's: what blocks add, buffers."""

    way: str
    kernel: str
    ms: dict[str, float]
    phases: dict[str, int]
    total_s: float
    total_is: str
    compile_s: float
    peak_gb: float | None
    sites: dict[str, str]
    density: dict[str, float]
    cache_gb: float
    shared_gb: float = 0.0
    fallbacks: tuple[str, ...] = ()


@torch.no_grad()
def measure(make: Callable[[], Built], request: Request, device: torch.device) -> list[Figures]:
    """The figures of every way, dense ones first. `make` gives a fresh model each time: caches live as long as it does.

    Raises BenchError where the model has no attention or MLP that could be rewritten.
    """
    built = make()
    report = explain(built.model, config=dict(request.options) or None, **built.calls[0])
    padded = built.unpadded is not None
    del built
    if not report.count("attention") + report.count("mlp"):
        raise BenchError(f"nothing of this model is understood, so only its dense speed could be measured:\n{report}")
    ways = dense_ways(request, padded)
    dense = [(way, kernel) for way in ways for kernel in (kernels(device) if way.backend else ("default",))]
    found = [_measure(make, *way, report, request, device) for way in progress(dense, "dense ways")]
    best = min(found, key=lambda figures: figures.total_s).kernel
    sparse = progress(list(sparse_ways(request)), "sparse ways")
    return found + [_measure(make, way, best, report, request, device) for way in sparse]


def dense_ways(request: Request, padded: bool) -> Iterator[Way]:
    """`padded`: there are inputs without padding to run, too."""
    phases = ("dense",) * request.sparse_steps
    mode = Config.from_options(request.options).inductor_mode  # CUDA graphs for all ways, or for none
    options = {} if mode is None else {"inductor.mode": mode}
    if request.eager:
        yield Way("uncompiled", None, {}, phases)
    yield Way("dense, as shipped" if padded else "dense", request.backend, options, phases)
    if padded:
        yield Way("dense, mask dropped", request.backend, options, phases, unpadded=True)


def sparse_ways(request: Request) -> Iterator[Way]:
    """Steps are skipped by the list in the settings, or the published one where it fits the number of steps; not by how
    far the model drifts, which random weights do not show."""
    own_list = Config.from_options(request.options).schedule.skip_steps
    skipped = own_list or (SKIPPED if request.steps == PUBLISHED_STEPS else None)
    sparse, skip = (Phase.SPARSE,) * request.sparse_steps, (Phase.SKIP,) * request.skip_steps
    options = dict(request.options) | {"schedule.skip_threshold": None}
    yield Way("sparse", "chipmunk", options | {"schedule.skip_steps": None}, (Phase.REFRESH, *sparse))
    if skipped:
        options["schedule.skip_steps"] = skipped
        yield Way("sparse + skip", "chipmunk", options, (Phase.REFRESH, *sparse, *skip))
        off = {"attention.enabled": False, "mlp.enabled": False}
        yield Way("skip alone", "chipmunk", options | off, (*[Phase.DENSE] * request.sparse_steps, *skip))


def _measure(
    make: Callable[[], Built], way: Way, kernel: str, report: Report, request: Request, device: torch.device
) -> Figures:
    """Compile and time one way on a fresh model."""
    built = make()
    calls = built.calls
    if way.unpadded and built.unpadded is not None:
        ignore_masks(built.model)
        calls = built.unpadded
    listed = {
        "schedule.steps": len(way.phases),
        "schedule.branches": len(calls),
        "schedule.refresh_steps": [i for i, phase in enumerate(way.phases) if phase == Phase.REFRESH],
        "schedule.skip_steps": [i for i, phase in enumerate(way.phases) if phase == Phase.SKIP] or None,
    }
    short = dict(way.options) | (listed if way.backend == "chipmunk" else {})
    with preferred(kernel):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        model = _compiled(built, way.backend, short, kernel)
        first = sum(_generation(model, calls, len(way.phases), report, device))
        if records_graphs(Config.from_options(way.options)):  # a graph is recorded at its second call
            _generation(model, calls, len(way.phases), report, device)
        rounds = [_generation(model, calls, len(way.phases), report, device) for _ in range(request.rounds)]
        seen = _seen(model, way)
        ms: dict[str, list[float]] = {}
        for seconds in rounds:
            for phase, value in zip(seen.phases or way.phases, seconds, strict=True):
                ms.setdefault(phase, []).append(1e3 * value)
        medians = {phase: statistics.median(values) for phase, values in ms.items()}
        counted = steps_by_phase(way, request.steps)
        total, how = _composed(medians, counted), "composed"
        if request.whole:
            model = _compiled(built, way.backend, way.options, kernel)
            _generation(model, calls, len(way.phases), report, device)
            total, how = sum(_generation(model, calls, request.steps, report, device)), "measured"
            counted = Counter(_seen(model, way).phases) or counted
        peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
    compiling = first - statistics.median(sum(seconds) for seconds in rounds)
    del model, built
    _forget(device)
    return Figures(
        way.name, kernel, medians, dict(counted), total, how, compiling, peak, seen.sites, seen.density, seen.cache_gb,
        seen.shared_gb, seen.fallbacks,
    )  # fmt: skip


def _generation(
    model: Any, calls: Sequence[Mapping[str, Any]], steps: int, report: Report, device: torch.device
) -> list[float]:
    """Seconds of every step of a generation; latents drift and the timestep falls, as in a sampler."""
    latents, timestep = (report.latents if report.latents in calls[0] else None), report.timestep
    noise = torch.randn_like(calls[0][latents]) if latents else None
    seconds = []
    for step in range(steps):
        moved: dict[str, Tensor | float] = {}
        if latents and noise is not None:
            moved[latents] = calls[0][latents] + DRIFT * step * noise
        if timestep and timestep in calls[0]:
            time_now = calls[0][timestep]  # the middle of a generation
            later = 2 * time_now * (1 - step / steps)
            moved[timestep] = later.to(time_now.dtype) if isinstance(time_now, Tensor) else type(time_now)(later)
        began = _now(device)
        for call in calls:
            model(**{**call, **moved})
        seconds.append(_now(device) - began)
    return seconds


def steps_by_phase(way: Way, steps: int) -> Counter[str]:
    """How many steps of each phase a generation of `steps` steps has."""
    if way.backend != "chipmunk":
        return Counter({str(Phase.DENSE): steps})
    schedule: ScheduleConfig = Config.from_options(way.options).schedule
    sparse = Phase.REFRESH in way.phases
    policy, history, counted = policy_from(schedule), History(), Counter[str]()
    for step in range(steps):
        phase = policy.phase(step, history)
        history = history.after(step, phase)
        counted[str(phase if sparse or phase is Phase.SKIP else Phase.DENSE)] += 1
    return counted


def _composed(ms: Mapping[str, float], counted: Mapping[str, int]) -> float:
    """Seconds. Phases that the model never went through (a fallback, nothing skippable) cost what its slowest one does."""
    slowest = max(ms.values())
    return sum(number * ms.get(phase, slowest) for phase, number in counted.items()) / 1e3


def extrapolated(figures: Sequence[Figures], blocks: int, whole: int, dense_layers: int) -> list[Figures]:
    """What a model of `whole` blocks would take, from one of `blocks` blocks that are all sparse.

    A skipped step is what is not blocks, and blocks are taken to be alike. `dense_layers` of the whole take what they take
    the best dense way. Raises BenchError where no step was skipped.
    """
    skipped = [way.ms[Phase.SKIP] for way in figures if Phase.SKIP in way.ms]
    if not skipped:
        raise BenchError(
            "what is not blocks is told from skipped steps, of which there are none; leave out --extrapolate"
        )
    beside = min(skipped)
    dense = min(way.ms[Phase.DENSE] for way in figures if set(way.ms) == {Phase.DENSE} and way.way != "uncompiled")

    def step(phase: str, ms: float) -> float:
        if phase == Phase.SKIP:
            return ms
        fixed = 0 if phase == Phase.DENSE else dense_layers
        return beside + (fixed * (dense - beside) + (whole - fixed) * (ms - beside)) / blocks

    made = []
    for way in figures:
        ms = {phase: step(phase, value) for phase, value in way.ms.items()}
        total, share = _composed(ms, way.phases), (whole - dense_layers) / blocks
        caches = way.shared_gb + (way.cache_gb - way.shared_gb) * share
        made.append(replace(way, ms=ms, total_s=total, total_is="extrapolated", peak_gb=None, cache_gb=caches))
    return made


@dataclass(frozen=True)
class _Seen:
    phases: list[str]
    sites: dict[str, str]
    density: dict[str, float]
    cache_gb: float
    shared_gb: float
    fallbacks: tuple[str, ...]


def _seen(model: Any, way: Way) -> _Seen:
    """What the last generation did."""
    if way.backend != "chipmunk":
        return _Seen([], {}, {}, 0.0, 0.0, ())
    done = summary(model)
    sites, density = {}, {}
    for kind in ("attention", "mlp"):
        of_kind = [site for site in done.sites if site.kind == kind]
        sparse = [site.density for site in of_kind if site.status == "rewritten"]
        sites[kind] = f"{len(sparse)} of {len(of_kind)}"
        density |= {kind: statistics.fmean(sparse)} if sparse else {}
    fallbacks = tuple(dict.fromkeys(fallback.reason for fallback in done.fallbacks))
    shared = done.cache_bytes - sum(site.cache_bytes for site in done.sites)
    return _Seen(done.phases.get(0, []), sites, density, done.cache_bytes / 1e9, shared / 1e9, fallbacks)


def _compiled(built: Built, backend: str | None, options: Mapping[str, Any], kernel: str) -> Any:
    torch._dynamo.reset()
    if backend is None:
        return built.model
    given: dict[str, Any] = {"options": dict(options)} if backend == "chipmunk" else {}
    if backend == "inductor" and kernel != FLASH4:
        given["mode"] = options.get("inductor.mode")
    compiler = through_op(backend) if kernel == FLASH4 and backend != "chipmunk" else backend
    return torch.compile(built.model, backend=compiler, fullgraph=built.fullgraph, dynamic=False, **given)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _forget(device: torch.device) -> None:
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
