"""Make pictures with a dense and with a sparse model; say how long each step took and how close the pictures are."""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from common import psnr
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

import chipmunk_fx
from chipmunk_fx.runtime.summary import Summary
from chipmunk_fx.schedule import History, Phase, policy_from


class Sampler(Protocol):
    """Makes picture number `index`, [3, H, W] in [0, 1], with `model` in the place of `transformer`."""

    transformer: nn.Module
    names: list[str]  # what each picture shows
    calls: int  # of the transformer, a step

    def sample(self, model: nn.Module, index: int, steps: int) -> Tensor: ...


@dataclass(frozen=True)
class Run:
    """All pictures of one model. `total`: seconds, with what surrounds the transformer; `steps`: (phase, seconds)."""

    pictures: list[Tensor]
    inputs: dict[str, Any]
    warm_up_steps: int
    warm_up: float
    total: float
    steps: list[tuple[str, float]]

    def median(self, phase: str) -> float | None:
        """Seconds of the transformer in a step of this phase."""
        seconds = [s for p, s in self.steps if p == phase]
        return statistics.median(seconds) if seconds else None

    def figures(self) -> dict[str, Any]:
        medians = {phase: self.median(phase) for phase in dict.fromkeys(phase for phase, _ in self.steps)}
        return {"warm_up_s": self.warm_up, "total_s": self.total, "median_step_s": medians, "steps": self.steps}


class Clock:
    """Seconds of every call of a module, the device's work included; each call moves `bar`. Keeps the first inputs."""

    def __init__(self, model: nn.Module, device: torch.device, bar: tqdm):
        self.device, self.bar = device, bar
        self.seconds: list[float] = []
        self.inputs: dict[str, Any] = {}
        self._start = 0.0
        model.register_forward_pre_hook(self._before, with_kwargs=True)
        model.register_forward_hook(self._after)

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.inputs = self.inputs or kwargs
        self._start = self.now()

    def _after(self, *_: Any) -> None:
        self.seconds.append(self.now() - self._start)
        self.bar.update()


def make_pictures(
    label: str,
    model: nn.Module,
    sampler: Sampler,
    steps: int,
    warm_up_steps: int,
    device: torch.device,
    phases: Callable[[], Sequence[str]],
) -> Run:
    """Compile `model` in a generation of `warm_up_steps`, then make and time every picture.

    `phases` gives the phase of each step of the picture just made.
    """
    pictures: list[Tensor] = []
    timed: list[tuple[str, float]] = []
    calls, total = sampler.calls, 0.0
    everything = calls * (warm_up_steps + steps * len(sampler.names))
    with tqdm(total=everything, desc=f"{label}: compiling", unit="call") as bar:
        clock = Clock(model, device, bar)
        began = clock.now()
        sampler.sample(model, 0, warm_up_steps)
        warm_up = clock.now() - began
        for index, name in enumerate(sampler.names):
            bar.set_description(f"{label}: {name[:20]}")
            clock.seconds.clear()
            began = clock.now()
            pictures.append(sampler.sample(model, index, steps))
            total += clock.now() - began
            seconds = [sum(clock.seconds[i : i + calls]) for i in range(0, calls * steps, calls)]
            timed += zip(phases(), seconds, strict=True)
    return Run(pictures, clock.inputs, warm_up_steps, warm_up, total, timed)


def run_dense(sampler: Sampler, steps: int, device: torch.device, lowering: str) -> Run:
    model: Any = torch.compile(sampler.transformer, backend="eager" if lowering == "eager" else "inductor")
    return make_pictures("dense", model, sampler, steps, 1, device, lambda: ["dense"] * steps)


def run_sparse(sampler: Sampler, steps: int, device: torch.device, options: Mapping[str, Any]) -> tuple[Run, Summary]:
    model: Any = torch.compile(sampler.transformer, backend="chipmunk", options=dict(options))

    def phases() -> Sequence[str]:
        return chipmunk_fx.summary(model).phases.get(0, ["dense"] * steps)

    warm_up_steps = steps_to_see_all(chipmunk_fx.Config.from_options(options), steps)
    run = make_pictures("chipmunk", model, sampler, steps, warm_up_steps, device, phases)
    return run, chipmunk_fx.summary(model)


def steps_to_see_all(config: chipmunk_fx.Config, steps: int) -> int:
    """The length, at most `steps`, of the shortest generation that has every phase that one of `steps` steps has."""
    if config.schedule.skip_threshold is not None:
        return steps  # what is skipped depends on the picture
    policy, history = policy_from(config.schedule), History()
    first: dict[Phase, int] = {}
    for step in range(steps):
        phase = policy.phase(step, history)
        first.setdefault(phase, step)
        history = history.after(step, phase)
    return max(first.values()) + 1


def compare(
    sampler: Sampler, dense: Run | None, sparse: Run, summary: Summary, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Every figure of two runs, by name, ready for JSON. `dense` None: what needs it is None."""
    config = chipmunk_fx.Config.from_options(options)
    report = chipmunk_fx.explain(sampler.transformer, config=options, **sparse.inputs)
    sites = {}
    for kind, of_kind in (("attention", config.attention), ("mlp", config.mlp)):
        shares = [site.density for site in summary.sites if site.kind == kind and site.status == "rewritten"]
        sites[kind] = {
            "found": report.count(kind),
            "rewritten": report.count(kind, "rewritten"),
            "density": of_kind.density,
            "random_density": of_kind.random_density,
            "computed": statistics.fmean(shares) if shares else None,
            "dense_because": dict(
                Counter(s.reason for s in report.sites if s.accepted and s.kind == kind and s.reason)
            ),
        }
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "pictures": list(sampler.names),
        "options": dict(options),
        "dense": dense.figures() if dense else None,
        "chipmunk": sparse.figures(),
        "speed_up": dense.total / sparse.total if dense else None,
        "psnr_db": [psnr(a, b) for a, b in zip(dense.pictures, sparse.pictures, strict=True)] if dense else None,
        "sites": sites,
        "grid": report.geometry,
        "phases": summary.phases,
        "flops_ratio": summary.flops_ratio,
        "cache_bytes": summary.cache_bytes,
        "fallbacks": [asdict(fallback) for fallback in summary.fallbacks],
    }


def table(dense: Run | None, sparse: Run, figures: Mapping[str, Any]) -> str:
    """One row a quantity, one column a model; below, why sites stayed dense."""

    def row(name: str, pick: Callable[[Run], float | None], digits: int) -> tuple[str, ...]:
        values = [pick(run) if run else None for run in (dense, sparse)]
        return name, *("" if value is None else f"{value:.{digits}f}" for value in values)

    warm_up = " / ".join(str(run.warm_up_steps) for run in (dense, sparse) if run)
    rows = [
        row(f"compiling, with {warm_up} steps, s", lambda run: run.warm_up, 1),
        row(f"{len(sparse.pictures)} pictures after that, s", lambda run: run.total, 2),
    ]
    for phase in ("dense", "refresh", "sparse", "skip"):
        if any(run and run.median(phase) for run in (dense, sparse)):
            rows.append(row(f"{phase} step, median s", lambda run, phase=phase: run.median(phase), 3))
    if figures["psnr_db"]:
        rows += [
            ("speed-up without compiling", "", f"{figures['speed_up']:.2f}x"),
            ("PSNR against dense, mean dB", "", f"{statistics.fmean(figures['psnr_db']):.2f}"),
            ("PSNR against dense, least dB", "", f"{min(figures['psnr_db']):.2f}"),
        ]
    for kind, site in figures["sites"].items():
        rows.append((f"{kind} sites rewritten", "", f"{site['rewritten']} of {site['found']}"))
        if site["computed"] is not None:
            setting = f"{site['density']:g} + {site['random_density']:g} random"
            rows.append((f"{kind} density, set to {setting}", "", f"{site['computed']:.3f}"))
    rows += [
        ("operations, share of dense", "", f"{figures['flops_ratio']:.3f}"),
        ("caches, MB", "", f"{figures['cache_bytes'] / 1e6:.1f}"),
    ]
    text = tabulate(rows, headers=("", "dense", "chipmunk"), disable_numparse=True, colalign=("left", "right", "right"))
    reasons = [
        f"{kind}: {number} dense, {reason}"
        for kind, site in figures["sites"].items()
        for reason, number in site["dense_because"].items()
    ]
    return "\n".join([text, *reasons])
