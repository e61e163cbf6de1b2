"""The command line: what would be made sparse in a model, how far apart pictures are, how fast the kernels are."""

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import yaml
from tabulate import tabulate

import chipmunk_fx
from chipmunk_fx import bench, images
from chipmunk_fx.errors import ChipmunkError
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


class UsageError(ChipmunkError, ValueError):
    """Arguments that argparse lets through and that still cannot be followed."""


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
        "--size", type=_size, metavar="HxW[xF]", help="pixels and frames for --model (default: as published)"
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

    about = "time every operator beside the dense kernels that are there"
    timing = commands.add_parser("bench", help=about, description=about)
    timing.add_argument("what", choices=("kernels",))
    timing.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    timing.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    timing.add_argument(
        "--only", choices=("published", "sweep"), help="the published shapes or the sweep (default: both)"
    )
    timing.add_argument("--rows", type=int, nargs="+", metavar="N", help="of the sweep (default: 1024 to 131072)")
    timing.add_argument("--density", type=float, nargs="+", metavar="SHARE", help="of the sweep (default: 0.03 to 0.5)")
    timing.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    timing.add_argument("--plot", type=Path, metavar="PNG", help="draw the sweep there")
    timing.set_defaults(run=_bench)
    return parser


def _explain(arguments: argparse.Namespace) -> None:
    options = dict(_option(text) for text in arguments.option)
    if arguments.model:
        model, inputs = from_folder(arguments.model, arguments.size)
    else:
        model, inputs = _factory(arguments.factory)()
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
        rows.extend(bench.measure(_progress(shapes, "bench"), dtype, arguments.device))
    finally:  # what was measured before an interruption counts
        print(bench.table(rows))
        if arguments.json:
            bench.write_json(rows, arguments.json, arguments.device, dtype)
    if arguments.plot:
        bench.plot(rows, arguments.plot)


def _size(text: str) -> tuple[int, ...]:
    """HxW or HxWxF; a ValueError is argparse's way to refuse it."""
    size = tuple(int(part) for part in text.split("x"))
    if len(size) not in (2, 3) or min(size) < 1:
        raise ValueError(text)
    return size


def _option(text: str) -> tuple[str, Any]:
    """Split NAME=VALUE; the value is read as YAML, so that numbers, true, null and lists are what they look like."""
    name, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"--option {text!r} has no '='; write it as NAME=VALUE")
    return name, yaml.safe_load(value)


def _factory(path: str) -> Any:
    module_name, colon, name = path.partition(":")
    if not (module_name and colon and name):
        raise UsageError(f"{path!r} is not of the form MODULE:FACTORY, for example my_models:flux")
    top = module_name.partition(".")[0]
    if not (_import_from_here(top) or find_spec(top)):
        raise UsageError(f"no module {top!r} among the installed ones or in {Path.cwd()}")
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as cause:
        if not cause.name or not module_name.startswith(cause.name):
            raise
        raise UsageError(f"no module {cause.name!r}") from cause
    if not callable(factory := getattr(module, name, None)):
        raise UsageError(f"{module_name} has no function {name!r}")
    return factory


def _import_from_here(top: str) -> bool:
    """Import a module of the current folder, where a console script does not look. The folder is not added to
    sys.path: what else lies there may bear the name of an installed library."""
    spec = PathFinder.find_spec(top, [str(Path.cwd())])
    if spec is None or top in sys.modules:
        return top in sys.modules
    module = sys.modules[top] = module_from_spec(spec)
    if spec.loader:  # a folder without __init__.py has none
        spec.loader.exec_module(module)
    return True


def _progress(items: list[Any], label: str) -> Iterable[Any]:
    """A progress bar on a terminal, where tqdm is installed (it is no dependency of the package)."""
    if find_spec("tqdm") is None:
        return items
    return import_module("tqdm").tqdm(items, desc=label, leave=False, disable=None)


def _compare(arguments: argparse.Namespace) -> None:
    pairs = _pairs(arguments.first, arguments.second)
    lpips = images.lpips_metric()
    metrics = {"psnr": images.psnr, "ssim": images.ssim} | ({"lpips": lpips} if lpips else {})
    rows = []
    for first, second in _progress(pairs, "compare"):
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
