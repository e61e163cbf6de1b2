"""The command line: what would be made sparse in a model, how far apart pictures are, how fast the kernels are."""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch
from tabulate import tabulate

import chipmunk_fx
from chipmunk_fx import bench, bench_model, images
from chipmunk_fx.arguments import made_by, option_of, size_of
from chipmunk_fx.errors import ChipmunkError, UsageError
from chipmunk_fx.log import progress
from chipmunk_fx.pretrained import from_folder


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, or 2 where the arguments do not fit."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except ChipmunkError as problem:
        print(f"{parser.prog} {arguments.command}: {problem}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="chipmunk-fx", description=__doc__)
    parser.add_argument("--version", action="version", version=f"%(prog)s {chipmunk_fx.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    about = "list the attention and MLP sites of a model, and what happens to each; compiles nothing"
    explain = commands.add_parser("explain", help=about, description=about)
    source = explain.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "factory",
        nargs="?",
        metavar="MODULE:FACTORY",
        help="a function without arguments, in a module here or installed, that returns (model, keyword inputs)",
    )
    source.add_argument(
        "--model", type=Path, metavar="PATH", help="a folder saved by diffusers, of a transformer or a whole pipeline"
    )
    explain.add_argument(
        "--size", type=size_of, metavar="HxW[xF]", help="pixels and frames for --model (default: the model's usual)"
    )
    explain.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting as in torch.compile's options, for example attention.density=0.1; may be repeated",
    )
    explain.set_defaults(run=_explain)

    about = "PSNR, SSIM and, where lpips is installed, LPIPS of two pictures or of two folders, paired by file name"
    compare = commands.add_parser("compare", help=about, description=about)
    compare.add_argument("first", type=Path, metavar="A.png|DIR")
    compare.add_argument("second", type=Path, metavar="B.png|DIR")
    compare.add_argument(
        "--diff", type=Path, metavar="D.png|DIR", help="also draw where they differ: red over the first picture in grey"
    )
    compare.set_defaults(run=_compare)

    for command in (explain, compare):
        command.add_argument("--json", action="store_true", help="print JSON in place of a table")

    about = "how fast the operators are, or whole models, beside what else there is"
    timing = commands.add_parser("bench", help=about, description=about)
    subjects = timing.add_subparsers(dest="what", required=True, metavar="kernels|model")
    about = "time every operator beside the dense kernels that are there"
    kernels = subjects.add_parser("kernels", help=about, description=about)
    bench.add_arguments(kernels)
    kernels.set_defaults(run=_bench)
    about = "dense, sparse, sparse with skipped steps, and skipped steps alone: ms by phase and a generation's time"
    model = subjects.add_parser("model", help=about, description=about)
    bench_model.add_arguments(model)
    model.set_defaults(run=lambda arguments: bench_model.run(arguments, made_by))
    return parser


def _explain(arguments: argparse.Namespace) -> None:
    options = dict(option_of(text) for text in arguments.option)
    if arguments.model:
        model, inputs = from_folder(arguments.model, arguments.size)
    else:
        if arguments.size:
            raise UsageError("--size goes with --model; a factory chooses the size of its inputs")
        model, inputs = made_by(arguments.factory)
    with torch.no_grad():
        report = chipmunk_fx.explain(model, config=options or None, **inputs)
    print(report.to_json() if arguments.json else report)


def _bench(arguments: argparse.Namespace) -> None:
    published = () if arguments.only == "sweep" else bench.PUBLISHED
    swept = (
        ()
        if arguments.only == "published"
        else bench.sweep(arguments.rows or bench.ROWS, arguments.density or bench.DENSITIES)
    )
    shapes = [*published, *swept]
    dtype = getattr(torch, arguments.dtype)
    rows: list[bench.Row] = []
    try:
        rows.extend(bench.measure(progress(shapes, "bench"), dtype, arguments.device, rest=arguments.rest))
    finally:  # what was measured before an interruption counts
        text = bench.to_json(rows, arguments.device, dtype)
        print(text if arguments.json is True else bench.table(rows))
        if isinstance(arguments.json, Path):
            arguments.json.write_text(text + "\n")
    if arguments.plot:
        bench.plot(rows, arguments.plot)


def _compare(arguments: argparse.Namespace) -> None:
    pairs = _pairs(arguments.first, arguments.second)
    lpips = images.lpips_metric()
    metrics = {"psnr": images.psnr, "ssim": images.ssim} | ({"lpips": lpips} if lpips else {})
    rows = []
    for first, second in progress(pairs, "compare"):
        a, b = images.load(first), images.load(second)
        if arguments.diff:
            images.save(images.difference(a, b), _drawn(arguments, first))
        rows.append({"picture": first.name} | {name: metric(a, b) for name, metric in metrics.items()})
    if len(rows) > 1:
        rows.append({"picture": "mean"} | {name: fmean(row[name] for row in rows) for name in metrics})
    if arguments.json:  # JSON has no infinity: the PSNR of equal pictures is null
        finite = [{key: None if value == math.inf else value for key, value in row.items()} for row in rows]
        print(json.dumps(finite, indent=2))
    else:
        heads = {"picture": "picture", "psnr": "PSNR (dB)", "ssim": "SSIM", "lpips": "LPIPS"}
        print(tabulate(rows, headers=heads, floatfmt=("", ".2f", ".4f", ".4f")))


def _drawn(arguments: argparse.Namespace, picture: Path) -> Path:
    """Where the difference of a pair is drawn: --diff itself, or a file in it for each pair of two folders."""
    if not arguments.first.is_dir():
        return arguments.diff
    if arguments.diff.is_file():
        raise UsageError(f"--diff {arguments.diff} is a file; two folders need a folder")
    arguments.diff.mkdir(parents=True, exist_ok=True)
    return arguments.diff / picture.with_suffix(".png").name


def _pairs(first: Path, second: Path) -> list[tuple[Path, Path]]:
    """The pictures to compare: the two files, or all files of equal name in the two folders."""
    for path in (first, second):
        if not path.exists():
            raise UsageError(f"{path} does not exist; give two pictures or two folders")
    if first.is_dir() != second.is_dir():
        raise UsageError(f"{first} and {second} are a picture and a folder; give two pictures or two folders")
    if not first.is_dir():
        return [(first, second)]
    names, others = _pictures(first), _pictures(second)
    if not names or names != others:
        alone = ", ".join(sorted(names ^ others)) or "none of them has any picture"
        raise UsageError(f"{first} and {second} do not hold pictures of the same names: {alone}")
    return [(first / name, second / name) for name in sorted(names)]


def _pictures(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix.lower() in images.SUFFIXES}


if __name__ == "__main__":
    sys.exit(main())
