"""The two products of a column-sparse MLP: how first.cu and second.cu are compiled and launched."""

import ctypes
from ctypes import c_int, c_longlong, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from chipmunk_fx.kernels import devices
from chipmunk_fx.kernels.hopper import nvrtc, tuning
from chipmunk_fx.kernels.hopper.instructions import ELEMENTS, activation_of, multiply, preamble
from chipmunk_fx.kernels.hopper.packing import Rows
from chipmunk_fx.kernels.hopper.tuning import SPAN, ProductSettings
from chipmunk_fx.kernels.triton.launching import copyable
from chipmunk_fx.ops.fp8 import DTYPE as FP8

PARTS = ("primitives.cuh", "cluster.cuh", "products.cuh")
SECOND = (*PARTS, "addition.cuh")


class First(ctypes.Structure):
    """The parameter of exchange_listed; first.cu says what its fields mean."""

    _fields_ = [
        *((name, c_void_p) for name in ("x", "w1", "wu")),
        *((name, c_longlong) for name in ("w1_row", "wu_row")),
        *((name, c_void_p) for name in ("b1", "bu", "lists", "hidden", "change", "means", "mean")),
        *((name, c_void_p) for name in ("row_scales", "scales", "change_scale")),
        *((name, c_int) for name in ("rows", "steps", "neurons", "groups", "listed", "parts", "batches", "tiles")),
    ]


_SIZES = [(name, c_int) for name in ("rows", "width", "groups", "listed", "parts", "batches", "tiles")]
_POINTERS = [(name, c_void_p) for name in ("change", "weights", "order", "lists", "out", "result")]


class Second(ctypes.Structure):
    """The parameter of add_listed; second.cu says what its fields mean."""

    _fields_ = [*_POINTERS, *_SIZES]


class SecondInFp8(ctypes.Structure):
    """The same; second_fp8.cu says what its fields mean."""

    _fields_ = [*_POINTERS, ("scale", c_void_p), ("change_scale", c_void_p), *_SIZES]


def products(
    rows: Rows, w1: Tensor, b1: Tensor | None, wu: Tensor | None, bu: Tensor | None, w1_fp8: Tensor | None,
    scales: Tensor | None, change_scale: Tensor | None, order: Tensor | None, hidden: Tensor, lists: Tensor, mean: Tensor,
    means: Tensor, by_neuron: Tensor, out: Tensor, result: Tensor, *, activation: str, group_rows: int,
) -> None:  # fmt: skip
    """As `chipmunk_fx.kernels.triton.mlp.products`, for what the backend takes; rows: as `pool` has them."""
    if w1_fp8 is None:
        weights = (copyable(w1), None if wu is None else copyable(wu))
    else:
        weights = (w1_fp8[0], None if wu is None else w1_fp8[1])
    in_fp8 = (scales, change_scale)
    change = _first(rows, *weights, b1, bu, *in_fp8, hidden, lists, mean, means, out.shape[1], activation, group_rows)
    _second(change, by_neuron, *in_fp8, order, lists, out, result, group_rows)


def _first(
    rows: Rows, w1: Tensor, wu: Tensor | None, b1: Tensor | None, bu: Tensor | None, scales: Tensor | None,
    change_scale: Tensor | None, hidden: Tensor, lists: Tensor, mean: Tensor, means: Tensor, count: int, activation: str,
    group_rows: int,
) -> Tensor:  # fmt: skip
    """Writes hidden and mean; returns the changes as second.cu wants them. count: of rows."""
    batch, groups, listed = lists.shape
    settings = tuning.first_settings(
        ELEMENTS[hidden.dtype], group_rows, batch * groups, listed, activation, wu is not None, scales is not None,
        devices.units(hidden.device),
    )  # fmt: skip
    stages, values = -(-listed // settings.depth), settings.depth * settings.rows
    dtype = hidden.dtype if scales is None else FP8
    change = hidden.new_empty(batch * groups, group_rows // settings.rows, stages, values, dtype=dtype)
    tiles = settings.clusters(batch * groups * group_rows, listed)
    problem = First(
        rows.values.data_ptr(), w1.data_ptr(), _pointer(wu), _pitch(w1), _pitch(wu), _pointer(b1), _pointer(bu),
        lists.data_ptr(), hidden.data_ptr(), change.data_ptr(), means.data_ptr(), mean.data_ptr(), _pointer(rows.scales),
        _pointer(scales), _pointer(change_scale), count, rows.values.shape[2], w1.shape[0], groups, listed,
        change.shape[1], batch * groups, tiles,
    )  # fmt: skip
    _launch("exchange_listed", settings, "first.cu", tiles, problem, hidden.device)
    return change


def _second(
    change: Tensor, by_neuron: Tensor, scales: Tensor | None, change_scale: Tensor | None, order: Tensor | None, lists: Tensor,
    out: Tensor, result: Tensor, group_rows: int,
) -> None:  # fmt: skip
    """Adds to out, and writes result."""
    batch, groups, listed = lists.shape
    rows, width = out.shape[1:]
    fp8 = scales is not None
    settings = tuning.second_settings(
        ELEMENTS[result.dtype], group_rows, batch * groups, width, fp8, devices.units(out.device)
    )
    tiles = settings.clusters(batch * groups * group_rows, width)
    pointers = (
        change.data_ptr(), by_neuron.data_ptr(), _pointer(order), lists.data_ptr(), out.data_ptr(), result.data_ptr()
    )  # fmt: skip
    sizes = rows, width, groups, listed, group_rows // settings.rows, batch * groups, tiles
    scaled = () if scales is None else (scales[-1:].data_ptr(), _pointer(change_scale))
    problem = (SecondInFp8 if fp8 else Second)(*pointers, *scaled, *sizes)
    _launch("add_listed", settings, "second_fp8.cu" if fp8 else "second.cu", tiles, problem, out.device)


def source(settings: ProductSettings, file: str) -> str:
    """The whole of the CUDA C++ of "first.cu", "second.cu" or "second_fp8.cu"."""
    first = settings.activation is not None
    names = ("consumers", "columns", "buffers", "cluster", *(("gated", "fp8", "depth") if first else ()))
    sizes = {name: getattr(settings, name) for name in names} | {"span": SPAN}
    turned = settings.fp8 and not first
    element, wide = "e4m3" if settings.fp8 else settings.element, settings.rows if turned else settings.columns
    return "\n".join(
        [
            preamble(settings.element, **sizes),
            multiply("multiply", element, wide, left_in_registers=turned, inner_apart=not first),
            *((Path(__file__).parent / name).read_text() for name in (PARTS if first else SECOND)),
            activation_of(settings.activation, settings.element) if settings.activation else "",
            (Path(__file__).parent / file).read_text(),
        ]
    )


def _launch(
    name: str, settings: ProductSettings, file: str, tiles: int, problem: ctypes.Structure, device: torch.device
) -> None:
    kernel = nvrtc.kernel(name, source, device.index, settings, file, cluster=settings.cluster)
    kernel.launch(tiles, problem, device)


def _pitch(x: Tensor | None) -> int:
    """Bytes from one row to the next."""
    return 0 if x is None else x.stride(0) * x.itemsize


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
