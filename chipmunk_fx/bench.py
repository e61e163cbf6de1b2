"""How fast the operators are, against the dense kernels that are there, at published shapes and over a sweep.

FLOPs count only the work asked for: 4 B H rows columns D for attention, 4 rows neurons C for an MLP. The ideal speed-up of a
sparse step is the inverse of its density, that of a refresh is 1.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch.nn.attention import SDPBackend, sdpa_kernel

from chipmunk_fx.arguments import count_of, device_of, seconds_of, share_of
from chipmunk_fx.config import AttentionConfig, ScheduleConfig
from chipmunk_fx.errors import BenchError
from chipmunk_fx.kernels import choose, group_rows, refreshes_in_parts
from chipmunk_fx.ops import flash4
from chipmunk_fx.ops.cases import AttentionCase, MlpCase, arguments, call
from chipmunk_fx.state.slots import attention_slots

STRIDE = AttentionConfig().mass_stride
RENEW_EVERY = ScheduleConfig().refresh_every
DENSITIES = (0.03, 0.06, 0.12, 0.25, 0.5)
ROWS = tuple(1 << i for i in range(10, 18))
Timed = Callable[[Callable[[], Any]], float]  # milliseconds of a call
DENSE = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


@dataclass(frozen=True)
class Shape:
    """A site: heads and their width for attention; width, neurons for an MLP of as wide a result. columns: computed ones.

    kept: the refresh of attention, or the sparse step of an MLP, keeps its lists; `gated` and `fp8` as of an MLP; first: the
    refresh is a generation's first, else others were before.
    """

    name: str
    kind: str
    rows: int
    columns: int
    heads: int = 24
    width: int = 128
    neurons: int = 0
    stride: int = STRIDE
    kept: bool = False
    gated: bool = False
    fp8: bool = False
    first: bool = False

    @property
    def total(self) -> int:
        return self.rows if self.kind == "attention" else self.neurons

    @property
    def sizes(self) -> tuple[int, ...]:
        """As a site of a plan has them."""
        if self.kind == "attention":
            return 1, self.heads, self.rows, self.rows, self.width
        return 1, self.rows, self.width, self.neurons, self.width

    @property
    def density(self) -> float:
        return self.columns / self.total

    @property
    def dense_flops(self) -> int:
        products = 2 * self.heads if self.kind == "attention" else 3 if self.gated else 2
        return 2 * products * self.rows * self.total * self.width

    def case(self, group_rows: int) -> AttentionCase | MlpCase:
        if self.kind == "attention":
            n, k = self.rows, self.columns
            return AttentionCase(
                n, n, self.width, group_rows, k, heads=self.heads, mass_stride=self.stride, random_density=0.01
            )
        return MlpCase(
            (1, self.rows), self.width, self.neurons, group_rows, self.columns, result=self.width, gated=self.gated,
            activation="silu" if self.gated else "gelu_tanh", fp8=self.fp8,
        )  # fmt: skip


def _published() -> Iterator[Shape]:
    """Those of FLUX, Wan and HunyuanVideo, and what may be chosen about them."""
    for shape in (
        Shape("flux", "attention", 4352, 896),
        Shape("wan", "attention", 75600, 5376, heads=40),
        Shape("hunyuan", "attention", 119056, 8064),
    ):
        yield shape
        yield replace(shape, name=f"{shape.name}, stride 8", stride=8)
        yield replace(shape, name=f"{shape.name}, lists kept", kept=True)
        yield replace(shape, name=f"{shape.name}, first refresh", first=True)
    for rows, columns in ((4352, 3712), (4352, 1984), (3840, 3712)):
        shape = Shape(f"flux, {rows} rows", "mlp", rows, columns, width=3072, neurons=12288)
        for fp8, kept in product((False, True), repeat=2):
            name = shape.name + ", fp8" * fp8 + ", lists kept" * kept
            yield replace(shape, name=name, fp8=fp8, kept=kept)
        yield replace(shape, name=f"{shape.name}, gated", gated=True)


PUBLISHED = tuple(_published())


@dataclass(frozen=True)
class Row:
    """One operator at one shape. density: of the lists; by: the backend; dense_by: the fastest dense kernel; share: of the
    ideal speed-up."""

    shape: str
    op: str
    rows: int
    density: float
    by: str
    ms: float
    tflops: float
    dense_by: str
    dense_ms: float
    speed_up: float
    share: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`parser` is that of `bench kernels`."""
    add = parser.add_argument
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", type=device_of, choices=("cuda", "cpu"), default=device, help="default: cuda if there is one")
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    add("--only", choices=("published", "sweep"), help="the published shapes or the sweep (default: both)")
    add("--rows", type=count_of, nargs="+", metavar="N", help="of the sweep (default: 1024 to 131072)")
    add("--density", type=share_of, nargs="+", metavar="SHARE", help="of the sweep (default: 0.03 to 0.5)")
    add("--rest", type=seconds_of, default=0.0, metavar="SECONDS",
        help="idle before each figure, of which three calls are timed: on a cool card (default: 0)")  # fmt: skip
    add("--json", nargs="?", const=True, type=Path, metavar="FILE", help="print JSON, or write it there too")
    add("--plot", type=Path, metavar="PNG", help="draw the sweep there")


def sweep(rows: Sequence[int] = ROWS, densities: Sequence[float] = DENSITIES) -> Iterator[Shape]:
    """Both kinds at every density and number of rows; long sequences have fewer heads, which changes no ratio."""
    for n in rows:
        for density in densities:
            keys, neurons = (16 * math.ceil(density * total / 16) for total in (n, 12288))
            yield Shape("sweep", "attention", n, keys, heads=24 if n <= 16384 else 8)
            yield Shape("sweep", "mlp", n, neurons, width=3072, neurons=12288)


def measure(
    shapes: Iterable[Shape], dtype: torch.dtype, device: str, seconds: float = 0.1, rest: float = 0.0
) -> Iterator[Row]:
    """Time refresh and sparse step of every shape beside its dense form. seconds, rest: as of `milliseconds`."""
    timed = partial(milliseconds, device=torch.device(device), seconds=seconds, rest=rest)
    dense: dict[tuple, tuple[float, str]] = {}
    for shape in shapes:
        with torch.no_grad():
            rows = group_rows(shape.kind, torch.device(device), dtype, shape.sizes)
            values = shape.case(rows).values(dtype, device)
            if shape.kind == "attention":  # lists as they are kept between steps
                sizes = (1, shape.heads, shape.rows, shape.rows, shape.width, dtype)
                kept = attention_slots(*sizes, group_rows=rows, columns=shape.columns, device=device)[2]
                values["lists"] = torch.empty(kept.shape, dtype=kept.dtype, device=device)
            _refresh_again(shape, values, rows, dtype)
            site = (shape.kind, shape.rows, shape.heads, shape.width, shape.neurons, shape.gated)
            if site not in dense:
                dense[site] = min(_dense(shape, values, timed))
            for phase in ("refresh", "sparse"):  # in this order: the refresh fills the caches
                op = f"{shape.kind}_{phase}"
                values["clock"][1] = int(op != "mlp_refresh" or shape.first)
                if shape.kept and op != "mlp_refresh":
                    _keep_lists(op, values)
                yield _row(shape, op, values, *dense[site], timed)


def _refresh_again(shape: Shape, values: dict[str, Any], group_rows: int, dtype: torch.dtype) -> None:
    """Has a refresh been before, if the one to be measured is not the first and makes use of that."""
    if shape.kind == "mlp" and not shape.first:
        return _run("mlp_refresh", values)
    device = values["clock"].device
    if shape.first or not refreshes_in_parts(device, dtype, shape.sizes, group_rows, shape.density):
        return
    values["lse"] = torch.empty_like(values["share"])
    _run("attention_refresh", values)
    values["known"] = torch.ones(1, dtype=torch.bool)


def _keep_lists(op: str, values: dict[str, Any]) -> None:
    """Makes lists once, then has `op` keep them."""
    _run(op, values)
    if op == "mlp_sparse":
        values["clock"][1] = 0
    values["renew"] = False


def _run(op: str, values: Mapping[str, Any]) -> Any:
    args, kwargs = call(op, values)
    return getattr(torch.ops.chipmunk, op)(*args, **kwargs)


def _row(shape: Shape, op: str, values: dict[str, Any], dense_ms: float, dense_by: str, timed: Timed) -> Row:
    by = choose(op, arguments(op, values))[1] if values["clock"].is_cuda else "reference"
    steps = [values]
    if shape.kind == "mlp":  # x moves from step to step: what has not changed multiplies zeros
        steps.append(values | {"x": torch.randn_like(values["x"])})
    ms = timed(lambda: [_run(op, step) for step in steps]) / len(steps)
    computed = shape.density if op.endswith("sparse") else 1.0
    return Row(
        shape.name, op, shape.rows, shape.density, by, ms, shape.dense_flops * computed / ms / 1e9,
        dense_by, dense_ms, dense_ms / ms, dense_ms / ms * computed,
    )  # fmt: skip


def _dense(shape: Shape, values: dict[str, Any], timed: Timed) -> Iterator[tuple[float, str]]:
    """(ms, name) of each dense kernel that takes the shape."""
    device = values["clock"].device
    if shape.kind == "mlp":
        x, w1, b1, wu, bu, w2, b2 = (values[name] for name in ("x", "w1", "b1", "wu", "bu", "w2", "b2"))
        name = "cuBLAS" if device.type == "cuda" else "torch"

        def linears() -> torch.Tensor:
            h = F.linear(x, w1, b1)
            h = F.gelu(h, approximate="tanh") if wu is None else F.silu(h) * F.linear(x, wu, bu)
            return F.linear(h, w2, b2)

        yield timed(linears), name
        return
    q, k, v, scale = (values[name] for name in ("q", "k", "v", "scale"))
    for backend in DENSE if device.type == "cuda" else (None,):
        with sdpa_kernel(backend) if backend else nullcontext():
            try:
                yield (
                    timed(lambda: F.scaled_dot_product_attention(q, k, v, scale=scale)),
                    backend.name.lower().removesuffix("_attention") if backend else "sdpa",
                )
            except RuntimeError:  # not built in, or not for this card or dtype
                continue
    if flash4.pays(capability(device), q.dtype, shape.width, flash4.ROWS) and flash4.works(q, k):
        yield timed(lambda: flash4.attend(q, k, v, scale)), "flash4"


def capability(device: torch.device) -> tuple[int, int]:
    """Of a GPU; of none elsewhere."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def milliseconds(function: Callable[[], Any], device: torch.device, seconds: float = 0.1, rest: float = 0.0) -> float:
    """Median time of a call; on a GPU of the replays of a graph of it, so that launches do not count.

    seconds: spent on calls, about. rest: seconds idle before, after which three calls are timed, whatever `seconds` says: later
    ones find a GPU at its power limit.
    """
    if device.type != "cuda":
        function()
        return _median(lambda: _host_ms(function), seconds, rest)
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        function()
        function()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        function()
    graph.replay()

    def replayed() -> float:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop)

    return _median(replayed, seconds, rest)


def _host_ms(function: Callable[[], Any]) -> float:
    began = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - began)


def _median(sample: Callable[[], float], seconds: float, rest: float) -> float:
    time.sleep(rest)
    taken = [sample() for _ in range(3)]
    if not rest:
        taken += [sample() for _ in range(min(100, int(1e3 * seconds / statistics.median(taken))))]
    return statistics.median(taken)


def steps_speed_up(rows: Sequence[Row]) -> dict[tuple[str, int, float], float]:
    """(kind, rows, density) -> speed-up of ten steps, of which one is a refresh, over ten dense ones."""
    ms = {(row.op, row.rows, row.density): row for row in rows}
    return {
        (row.op.removesuffix("_sparse"), row.rows, row.density): RENEW_EVERY
        * row.dense_ms
        / ((RENEW_EVERY - 1) * row.ms + ms[row.op.replace("sparse", "refresh"), row.rows, row.density].ms)
        for row in rows
        if row.op.endswith("sparse")
    }


def table(rows: Sequence[Row]) -> str:
    """One line an operator and shape."""
    heads = {
        "shape": "shape", "op": "operator", "rows": "rows", "density": "density", "by": "by", "ms": "ms",
        "tflops": "TFLOP/s", "dense_by": "dense", "dense_ms": "ms", "speed_up": "speed-up", "share": "of ideal",
    }  # fmt: skip
    digits = ("", "", "", ".3f", "", ".4g", ".3g", "", ".4g", ".2f", ".2f")
    return tabulate([asdict(row) for row in rows], headers=heads, floatfmt=digits)


def to_json(rows: Sequence[Row], device: str, dtype: torch.dtype) -> str:
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    what = {"device": name, "torch": torch.__version__, "dtype": str(dtype).removeprefix("torch.")}
    return json.dumps(what | {"rows": [asdict(row) for row in rows]}, indent=1)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Speed-up of ten steps over the rows of the sweep, a line a density. Raises BenchError without matplotlib or a sweep."""
    if find_spec("matplotlib") is None:
        raise BenchError("--plot needs matplotlib: pip install matplotlib")
    speed_ups = steps_speed_up([row for row in rows if row.shape == "sweep"])
    if not speed_ups:
        raise BenchError("--plot shows the sweep, which was not measured; leave out --only")
    pyplot: Any = import_module("matplotlib.pyplot")
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, kind in zip(axes, ("attention", "mlp"), strict=True):
        mine = {(n, round(d, 2)): s for (k, n, d), s in speed_ups.items() if k == kind}
        for density in sorted({d for _, d in mine}):
            points = sorted((n, s) for (n, d), s in mine.items() if d == density)
            axis.plot(*zip(*points, strict=True), marker="o", label=f"density {density:g}")
        axis.axhline(1, color="black", linewidth=0.5)
        axis.set(title=kind, xlabel="rows", xscale="log", yscale="log")
        axis.legend()
    axes[0].set_ylabel("speed-up of ten steps over dense")
    figure.tight_layout()
    figure.savefig(path)
