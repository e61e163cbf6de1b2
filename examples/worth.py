"""What each setting is worth: PSNR of the bundled model's pictures to dense ones, against the work that was done.

    python examples/worth.py                                   # every setting, eight pictures at once
    python examples/worth.py --only defaults additive          # some of them
    python examples/worth.py --seconds defaults additive       # instead: how long steps of each phase take, one picture at a time

The pictures are made op by op, with every site sparse (gate "off"), so that the table is about the method and not about
one machine. `--seconds` compiles the same with Inductor and takes the median step of each phase; what a picture takes is put
together from these and from the phases of its steps. Lines of JSON are added to the output file: settings measured
elsewhere join the table, and the last figure counts.
"""

import argparse
import json
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from common import default_dtype, psnr
from flux import BUNDLED, DTYPES, Photographs
from measure import Run, run_dense, run_sparse
from photos import NAMES
from tabulate import tabulate
from torch import Tensor

import chipmunk_fx
from chipmunk_fx.bench_measure import SKIPPED
from chipmunk_fx.runtime.summary import Summary
from chipmunk_fx.schedule import Phase

STEPS, PICTURES = 50, 8
ALONE = {"attention.enabled": False, "mlp.enabled": False}
FLUX = {"preset": "flux"}
DENSE_MLP = {"mlp.enabled": False}
LISTS = {"schedule.refresh_steps": "R", "schedule.skip_steps": ".", "schedule.dense_steps": "D"}
THRESHOLDS = (0.03, 0.05, 0.08, 0.1, 0.12, 0.14, 0.16, 0.2)
UNTOUCHED = ("dense", "skip")  # steps that are the same whatever is sparse in others
TENTH = {"attention.density": 0.1, **DENSE_MLP}
TWENTIETH = {"attention.density": 0.05, **DENSE_MLP}
ENDS = {"schedule.dense_steps": [*range(8), *range(44, STEPS)]}
QUARTERS = {**ENDS, **DENSE_MLP, "schedule.refresh_every": 4}
VIDEO = {"HunyuanVideo": "hunyuan", "Wan": "wan"}
FRONT = {"schedule.refresh_steps": [0, 1, 2, 3, 4, 5, 6, 8, 12, 20, 30, 40]}


def skipping(steps: Sequence[int], **other: Any) -> dict[str, Any]:
    return {"schedule.skip_steps": list(steps), **other}


def spread(count: int) -> list[int]:
    """So many of the 36 steps from 8 to 43, evenly apart."""
    return sorted({8 + int((k + 0.5) * 36 / count) for k in range(count)})


def between(pattern: str, **other: Any) -> dict[str, Any]:
    """`pattern` (R refresh, s sparse, . skipped, D dense) over and over between 8 dense steps and 6."""
    steps = 8 * "D" + (36 * pattern)[:36] + 6 * "D"
    lists = {name: [i for i, letter in enumerate(steps) if letter == of] for name, of in LISTS.items()}
    return {**lists, **other}


def few(dense: Sequence[int], refresh: Sequence[int], sparse: Sequence[int], **other: Any) -> dict[str, Any]:
    """These steps; all others skipped."""
    skipped = sorted({*range(STEPS)} - {*dense, *refresh, *sparse})
    return skipping(skipped, **{"schedule.dense_steps": [*dense], "schedule.refresh_steps": [*refresh]}, **other)


SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "defaults": {},
    "raster order": {"tokens.order": "raster"},
    "additive": {"attention.combine": "additive"},
    "nothing random": {"attention.random_density": 0.0, "mlp.random_density": 0.0},
    "lists kept at refreshes": {"attention.renew_lists": False},
    # At 256x256 these three spend what the defaults do: the density makes up for it.
    "masses from all rows": {"attention.mass_stride": 1, "attention.density": 0.1275},
    "masses from one row in 8": {"attention.mass_stride": 8, "attention.density": 0.171},
    "text rows dense": {"attention.text_rows": "dense", "attention.density": 0.162},
    "local window 0.02": {"attention.local_window": 0.02},
    "local voxels 1": {"attention.local_voxels": 1},
    "MLP dense": {"mlp.enabled": False},
    "attention dense": {"attention.enabled": False},
    "attention at 0.1, MLP dense": {"attention.density": 0.1, "mlp.enabled": False},
    "the same in raster order": {"attention.density": 0.1, "mlp.enabled": False, "tokens.order": "raster"},
    "published FLUX": FLUX,
    "published FLUX, published skips": skipping(SKIPPED, **FLUX),
    "defaults, published skips": skipping(SKIPPED),
    "published skips alone": skipping(SKIPPED, **ALONE),
    **{f"{count} of steps 8 to 43 alone": skipping(spread(count), **ALONE) for count in (15, 20, 25, 30)},
    **{f"skip threshold {limit:g} alone": {"schedule.skip_threshold": limit, **ALONE} for limit in THRESHOLDS},
    "defaults, skip threshold 0.12": {"schedule.skip_threshold": 0.12},
    "more refreshes at the front": FRONT,
    "the same, skip threshold 0.12": {**FRONT, "schedule.skip_threshold": 0.12},
    **{f"{pattern} between dense steps": between(pattern, **DENSE_MLP) for pattern in ("R.s.", "R..s..", "R.s.s.s.")},
    **{f"{pattern} between dense steps, alone": between(pattern, **ALONE) for pattern in ("D.", "D..", "D...")},
    "R.s. between dense steps, MLP too": between("R.s."),
    "Rss between dense steps": between("Rss", **DENSE_MLP),
    "Rsssss between dense steps at 0.1": between("Rsssss", **TENTH),
    "the same in raster order, too": between("Rsssss", **TENTH, **{"tokens.order": "raster"}),
    **{f"published {name}": {"preset": preset} for name, preset in VIDEO.items()},
    **{f"published {name}, published skips": skipping(SKIPPED, preset=preset) for name, preset in VIDEO.items()},
    "13 steps at 0.05": few((0, 1, 2, 3, 4), (6, 18), (9, 13, 25, 33, 42, 48), **TWENTIETH),
    "published FLUX in fp8": {**FLUX, "mlp.fp8": True},
    "defaults in fp8": {"mlp.fp8": True},
    **{
        f"skip threshold {limit:g} between dense steps": {**QUARTERS, "schedule.skip_threshold": limit}
        for limit in (0.05, 0.08)
    },
    **{
        f"skip threshold {limit:g} between dense steps, alone": {**ENDS, **ALONE, "schedule.skip_threshold": limit}
        for limit in (0.05, 0.08)
    },
}


def main(arguments: Sequence[str] | None = None) -> None:
    given = make_parser().parse_args(arguments)
    sampler = bundled(given.device, given.images, given.size, given.dtype)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        for row in seconds(sampler, given.seconds) if given.seconds else quality(sampler, given.only or SETTINGS):
            print(json.dumps(row), flush=True)
            with given.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
    rows = read(given.out)
    print(table(rows))
    if given.plot:
        plot(rows, given.plot)


def bundled(device: str, pictures: int = PICTURES, side: int = 256, dtype: str | None = None) -> Photographs:
    asked = {"size": (side, side), "prompt": None, "classes": NAMES[:pictures], "images": pictures, "seed": 0}
    return Photographs(
        BUNDLED, argparse.Namespace(**asked, guidance=None, device=device, dtype=dtype or default_dtype(device))
    )


def quality(sampler: Photographs, names: Iterable[str]) -> Iterable[dict[str, Any]]:
    """One row a setting: PSNR to the dense pictures from the same noise, and operations as a share of dense."""
    everything = range(len(sampler.names))
    dense = sampler.batch(sampler.transformer, everything, STEPS)
    for name in names:
        options = {"gate": "off", "lowering": "eager", **SETTINGS[name]}
        torch._dynamo.reset()
        model: Any = torch.compile(sampler.transformer, backend="chipmunk", options=options)
        # which steps a threshold skips is each picture's own affair
        batches = [[i] for i in everything] if "schedule.skip_threshold" in options else [everything]
        made: list[Tensor] = []
        summaries: list[Summary] = []
        for indices in batches:
            made += sampler.batch(model, indices, STEPS)
            summaries.append(chipmunk_fx.summary(model))
        decibels = [psnr(a, b) for a, b in zip(dense, made, strict=True)]
        yield {
            "name": name,
            "psnr": statistics.fmean(decibels),
            "least": min(decibels),
            "operations": statistics.fmean(summary.flops_ratio for summary in summaries),
            "skipped": statistics.fmean(summary.phases.get(0, []).count(Phase.SKIP) for summary in summaries),
            "steps": phases_of(summaries),
        }


def phases_of(summaries: Sequence[Summary]) -> dict[str, float]:
    """Steps of each phase in a picture, the mean over several."""
    total = sum((Counter(summary.phases.get(0, [])) for summary in summaries), Counter[str]())
    return {phase: count / len(summaries) for phase, count in total.items()}


def seconds(sampler: Photographs, names: Sequence[str]) -> Iterable[dict[str, Any]]:
    """One row a setting: the median milliseconds of a step of each phase, and how many steps of each there were."""
    sampler.names = sampler.names[:2]
    dense = run_dense(sampler, STEPS, sampler.device, "inductor")
    yield {"name": "dense", "ms": milliseconds(dense), "timed": {"dense": STEPS}}
    for name in names:
        torch._dynamo.reset()
        run, summary = run_sparse(sampler, STEPS, sampler.device, {"gate": "off", **SETTINGS[name]})
        yield {"name": name, "ms": milliseconds(run), "timed": phases_of([summary])}


def milliseconds(run: Run) -> dict[str, float]:
    return {phase: 1000 * (run.median(phase) or 0) for phase in dict(run.steps)}


def read(path: Path) -> list[dict[str, Any]]:
    """What was measured of each setting, in order of first measurement; `seconds` of a picture where its steps were timed."""
    rows: dict[str, dict[str, Any]] = {}
    timed: dict[str, dict[str, float]] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        rows[row["name"]] = rows.get(row["name"], {}) | row
        timed[computed(row["name"])] = timed.get(computed(row["name"]), {}) | row.get("ms", {})
    every = {phase: [ms[phase] for row in rows.values() if phase in (ms := row.get("ms", {}))] for phase in UNTOUCHED}
    alike = {phase: statistics.median(ms) for phase, ms in every.items() if ms}
    return [row | taken(row, timed[computed(row["name"])] | alike) for row in rows.values()]


def computed(name: str) -> str:
    """The same for settings that differ in their schedule alone: a step of a phase takes them as long."""
    return str(sorted(item for item in SETTINGS.get(name, {}).items() if not item[0].startswith("schedule.")))


def taken(row: Mapping[str, Any], ms: Mapping[str, float]) -> dict[str, float]:
    """Seconds of a picture's steps: those of the pictures that were compared, each as long as the median of its phase."""
    steps = row.get("steps", row.get("timed", {}))
    known = steps and steps.keys() <= ms.keys()
    return {"seconds": sum(count * ms[phase] for phase, count in steps.items()) / 1000} if known else {}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    heads = ("name", "psnr", "least", "operations", "skipped", "seconds")
    cells = [[row.get(head, "") for head in heads] for row in rows]
    return tabulate(cells, headers=heads, tablefmt="github", floatfmt=("", ".1f", ".1f", ".3f", ".0f", ".1f"))


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """PSNR against seconds a picture, of the rows whose steps were timed; where there are none, against operations."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    shown = [row for row in rows if "psnr" in row]
    if timed := [row for row in shown if "seconds" in row]:
        shown = timed
    cost, unit = ("seconds", "s") if timed else ("operations", "share of dense")
    named: list[tuple[float, float]] = []
    wide, high = (max(row[key] for row in shown) - min(row[key] for row in shown) for key in (cost, "psnr"))
    for row in shown:
        colour = "tab:orange" if "alone" in row["name"] else "tab:blue"  # nothing sparse, something sparse
        marker = "^" if "threshold" in row["name"] else "s" if row["skipped"] else "o"
        axes.plot(row[cost], row["psnr"], marker=marker, color=colour)
        x, y = row[cost], row["psnr"]
        if not any(-0.3 * wide < x - a < 0.3 * wide and abs(y - b) < 0.025 * high for a, b in named):
            axes.annotate(row["name"], (x, y), xytext=(4, 3), textcoords="offset points", size=6)
            named.append((x, y))  # names would lie on each other; the table has all of them
    axes.set_xlabel(f"{cost} a picture, {unit}")
    axes.set_ylabel("PSNR to dense, dB")
    axes.grid(alpha=0.3)
    figure.savefig(path)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", nargs="+", choices=tuple(SETTINGS), metavar="NAME", help=f"of {', '.join(SETTINGS)}")
    add(
        "--seconds",
        nargs="+",
        choices=tuple(SETTINGS),
        metavar="NAME",
        help="time these in place of comparing pictures",
    )
    add("--images", type=int, default=PICTURES, help=f"number of pictures, at most {len(NAMES)}; default: {PICTURES}")
    add("--size", type=int, default=256, help="pixels along an edge; default: 256")
    add("--dtype", choices=tuple(DTYPES), help="default: bf16 where the device multiplies it, else fp32")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda if there is one")
    add("--out", type=Path, default=Path("build/worth.jsonl"), metavar="FILE", help="default: build/worth.jsonl")
    add("--plot", type=Path, metavar="FILE", help="also draw PSNR against seconds or operations")
    return parser


if __name__ == "__main__":
    main()
