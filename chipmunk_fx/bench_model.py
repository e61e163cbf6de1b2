"""`chipmunk-fx bench model`: dense, sparse, sparse with skipped steps and skipped steps alone, side by side."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from chipmunk_fx.arguments import count_of, device_of, option_of, size_of
from chipmunk_fx.bench_measure import PUBLISHED_STEPS, Figures, Request, extrapolated, measure
from chipmunk_fx.bench_subjects import SUBJECTS, Built, Subject, build, few, own
from chipmunk_fx.config import Config
from chipmunk_fx.errors import BenchError, UsageError
from chipmunk_fx.schedule.phase import Phase

PHASES = tuple(str(phase) for phase in Phase)
COLORS = {"dense": "#8c8c8c", "refresh": "#d98c3f", "sparse": "#3f7fd9", "skip": "#5fb36a"}
STEPS = f"default: {PUBLISHED_STEPS}; of other numbers no step is skipped unless schedule.skip_steps says so"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

Resolve = Callable[[str], tuple[nn.Module, Mapping[str, Any]]]  # MODULE:FACTORY -> what the factory returns


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`parser` is that of `bench model`; what it parses goes to `run`."""
    add = parser.add_argument
    known = ", ".join(SUBJECTS)
    add("model", metavar="NAME|MODULE:FACTORY", help=f"{known}; or a function that returns (model, keyword inputs)")
    measuring_arguments(parser)
    add("--json", nargs="?", const=True, type=Path, metavar="FILE", help="print JSON, or write it there too")


def measuring_arguments(parser: argparse._ActionsContainer) -> None:
    """What scripts that measure a model offer too."""
    add = parser.add_argument
    add("--blocks", type=count_of, help="at most so many blocks of each kind, for a quick look")
    add(
        "--extrapolate",
        type=int,
        metavar="N",
        help="measure N blocks of the rarest kind (better 2 than 1), tell the whole named model from them",
    )
    add("--rounds", type=count_of, default=2, help="timed generations a way, after the one that compiles (default: 2)")
    add("--whole", action="store_true", help="run every step of a generation instead of composing its total")
    add("--uncompiled", action="store_true", help="measure the model as it is, too")
    add("--plot", type=Path, metavar="PNG", help="draw the totals by phase, where matplotlib is installed")
    _add_missing(
        parser, "--size", type=size_of, metavar="HxW[xF]", help="pixels and frames (default: the model's usual)"
    )
    _add_missing(parser, "--steps", type=count_of, default=PUBLISHED_STEPS, help=STEPS)
    _add_missing(parser, "--dtype", choices=tuple(DTYPES), default="bf16", help="of a named model; default: bf16")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    _add_missing(parser, "--device", type=device_of, default=device, help="default: cuda if there is one")
    _add_missing(parser, "--seed", type=int, default=0, help="of weights and inputs; default: 0")
    repeated = {"action": "append", "default": [], "metavar": "NAME=VALUE"}
    _add_missing(
        parser,
        "--option",
        help="a setting beside the preset; may be repeated; schedule.skip_threshold is left out",
        **repeated,
    )


def run(arguments: argparse.Namespace, resolve: Resolve) -> list[Figures]:
    """Measure and print. Raises BenchError, UsageError, PretrainedError or ConfigError."""
    device, dtype = torch.device(arguments.device), DTYPES[arguments.dtype]
    options = {"preset": SUBJECTS[arguments.model].preset} if arguments.model in SUBJECTS else {}
    options |= dict(option_of(text) for text in arguments.option)
    config = Config.from_options(options)
    subject, blocks, whole = _subject(arguments, config)
    if arguments.extrapolate:
        options |= {"attention.dense_layers": 0, "mlp.dense_layers": 0}
    make = _maker(arguments, subject, resolve, device, dtype)
    backend = "eager" if config.lowering == "eager" else "inductor"
    asked = Request(
        options, arguments.steps, arguments.rounds, whole=arguments.whole, eager=arguments.uncompiled, backend=backend
    )
    figures = measure(make, asked, device)
    if arguments.extrapolate:
        figures = extrapolated(figures, blocks, whole, config.attention.dense_layers)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    types = arguments.dtype if subject else "in its own types"
    settings = {"model": arguments.model, "size": arguments.size, "blocks": arguments.blocks, "options": options}
    settings |= {"extrapolated": {"from": blocks, "to": whole}} if arguments.extrapolate else {}
    about = settings | {"steps": asked.steps, "device": name, "torch": torch.__version__, "dtype": types}
    text = json.dumps(about | {"ways": [asdict(way) | ratios(way, figures) for way in figures]}, indent=2)
    if arguments.json is True:
        print(text)
    else:
        limit = f", {arguments.blocks} blocks of each kind" if arguments.blocks else ""
        limit = limit or (f", {whole} blocks told from {blocks}" if arguments.extrapolate else "")
        weights = "; random weights" if subject else ""
        print(f"{arguments.model}{limit}, {types}, {name}, torch {torch.__version__}{weights}")
        print(table(figures, asked.steps, config))
    if isinstance(arguments.json, Path):
        arguments.json.write_text(text + "\n")
    if arguments.plot:
        plot(figures, arguments.plot)
    return figures


def ratios(way: Figures, figures: Sequence[Figures]) -> dict[str, float]:
    """How many times faster than the best dense way, and than the model as shipped, by its own best kernel."""
    dense = [other for other in figures if set(other.phases) == {"dense"} and other.way != "uncompiled"]
    shipped = [other.total_s for other in dense if other.way == dense[0].way]
    best = min(other.total_s for other in dense)
    return {"over_best_dense": best / way.total_s, "over_as_shipped": min(shipped) / way.total_s}


def table(figures: Sequence[Figures], steps: int, config: Config) -> str:
    """One row a way, then what its rows leave unsaid."""
    shown = [phase for phase in PHASES if any(phase in way.ms for way in figures)]
    kinds = [kind for kind in ("attention", "mlp") if any(kind in way.density for way in figures)]
    rows = []
    for way in figures:
        row: dict[str, Any] = {"way": way.way, "sdpa": way.kernel}
        row |= {f"{kind} density": f"{way.density[kind]:.3f}" if kind in way.density else "" for kind in kinds}
        row |= {f"{phase}, ms": f"{way.ms[phase]:.1f}" if phase in way.ms else "" for phase in shown}
        row |= {f"{steps} steps, s": f"{way.total_s:.2f}", "total is": way.total_is}
        row |= {head: f"{value:.2f}x" for head, value in _heads(ratios(way, figures)).items()}
        row |= {"peak, GB": "" if way.peak_gb is None else f"{way.peak_gb:.1f}", "compile, s": f"{way.compile_s:.1f}"}
        rows.append(row)
    lines = [tabulate(rows, headers="keys", disable_numparse=True)]
    for way in figures:
        if way.sites:
            sites = ", ".join(f"{kind} {count} sites sparse" for kind, count in way.sites.items())
            phases = ", ".join(f"{number} {phase}" for phase, number in way.phases.items())
            lines.append(f"{way.way}: {sites}; {phases}; caches {way.cache_gb:.2f} GB")
        lines += [f"{way.way}: some calls ran dense: {reason}" for reason in way.fallbacks]
    lines.append(
        f"densities as set: attention {config.attention.density:g} + {config.attention.random_density:g} random, "
        f"MLP {config.mlp.density:g} + {config.mlp.random_density:g} random; a step is all of its calls"
    )
    return "\n".join(lines)


def plot(figures: Sequence[Figures], path: Path) -> None:
    """Bars of seconds, split by phase. Raises BenchError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise BenchError("--plot needs matplotlib: pip install matplotlib") from missing
    sheet = Figure(figsize=(8, 0.5 * len(figures) + 1), layout="constrained")
    axes = sheet.subplots()
    names = [f"{way.way} ({way.kernel})" for way in figures]
    left = [0.0] * len(figures)
    for phase in PHASES:
        # a measured total has no split of its own: the composed one is scaled to it
        parts = [way.phases.get(phase, 0) * way.ms.get(phase, 0.0) for way in figures]
        wholes = [sum(way.phases.get(p, 0) * way.ms.get(p, 0.0) for p in PHASES) or 1.0 for way in figures]
        widths = [way.total_s * part / whole for way, part, whole in zip(figures, parts, wholes, strict=True)]
        if any(widths):
            axes.barh(names, widths, left=left, color=COLORS.get(phase), label=phase)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("seconds a generation")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.savefig(path, dpi=150)


def _subject(arguments: argparse.Namespace, config: Config) -> tuple[Subject | None, int, int]:
    """The named model, if it is one; how many of its blocks are measured and how many it has, to extrapolate."""
    subject = SUBJECTS.get(arguments.model)
    if arguments.extrapolate is None:
        return subject, 0, 0
    if subject is None or arguments.blocks or arguments.whole or arguments.extrapolate < 1:
        known = ", ".join(SUBJECTS)
        raise BenchError(f"--extrapolate takes 1 or more, one of {known}, and neither --blocks nor --whole")
    if config.mlp.enabled and config.mlp.dense_layers != config.attention.dense_layers:
        raise BenchError("--extrapolate takes attention.dense_layers and mlp.dense_layers that are the same")
    return few(subject, arguments.extrapolate)


def _maker(
    arguments: argparse.Namespace, subject: Subject | None, resolve: Resolve, device: torch.device, dtype: torch.dtype
) -> Callable[[], Built]:
    if subject is not None:
        return lambda: build(subject, arguments.size, arguments.blocks, device, dtype, arguments.seed)
    if ":" not in arguments.model:
        known = ", ".join(SUBJECTS)
        raise BenchError(f"no model {arguments.model!r}; there are {known}, or give MODULE:FACTORY for your own")
    if arguments.size or arguments.blocks:
        raise UsageError("--size and --blocks go with a named model; a factory chooses its own")
    return lambda: own(partial(resolve, arguments.model), device)


def _heads(ratio: Mapping[str, float]) -> dict[str, float]:
    """One column where shipped and best dense are the same."""
    if ratio["over_best_dense"] == ratio["over_as_shipped"]:
        return {"over dense": ratio["over_best_dense"]}
    return {"over best dense": ratio["over_best_dense"], "over as shipped": ratio["over_as_shipped"]}


def _add_missing(parser: argparse._ActionsContainer, name: str, **how: Any) -> None:
    if name not in parser._option_string_actions:
        parser.add_argument(name, **how)
