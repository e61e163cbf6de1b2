"""The two products of a column-sparse MLP: how first.cu and second.cu are compiled and launched."""

import ctypes
from ctypes import c_int, c_longlong, c_void_p
from functools import cache
from pathlib import Path

from torch import Tensor

from chipmunk_fx.kernels import devices
from chipmunk_fx.kernels.hopper import nvrtc, tuning
from chipmunk_fx.kernels.hopper.instructions import ELEMENTS, activation_of, multiply, preamble
from chipmunk_fx.kernels.hopper.tuning import ProductSettings
from chipmunk_fx.kernels.triton.launching import copyable

PARTS = ("primitives.cuh", "products.cuh")


class First(ctypes.Structure):
    """The parameter of exchange_listed; first.cu says what its fields mean."""

    _fields_ = [
        *((name, c_void_p) for name in ("x", "w1", "wu")),
        *((name, c_longlong) for name in ("x_batch", "x_row", "w1_row", "wu_row")),
        *((name, c_void_p) for name in ("b1", "bu", "order", "lists", "hidden", "change", "means", "mean")),
        *((name, c_int) for name in ("rows", "steps", "neurons", "groups", "listed", "parts", "batches", "tiles")),
    ]


class Second(ctypes.Structure):
    """The parameter of add_listed; second.cu says what its fields mean."""

    _fields_ = [
        *((name, c_void_p) for name in ("change", "weights", "order", "lists", "out", "result")),
        *((name, c_int) for name in ("rows", "width", "groups", "listed", "parts", "batches", "tiles")),
    ]


def exchange_listed(
    x: Tensor, w1: Tensor, b1: Tensor | None, wu: Tensor | None, bu: Tensor | None, order: Tensor | None, hidden: Tensor,
    lists: Tensor, mean: Tensor, means: Tensor, change: Tensor, *, activation: str, group_rows: int,
) -> None:  # fmt: skip
    """As `chipmunk_fx.kernels.triton.first.exchange_listed`, for what the backend takes."""
    x, w1, wu = copyable(x), copyable(w1), None if wu is None else copyable(wu)
    batch, groups, listed = lists.shape
    settings = tuning.first_settings(
        ELEMENTS[x.dtype],
        group_rows,
        batch * groups,
        x.shape[2],
        listed,
        activation,
        wu is not None,
        devices.units(x.device),
    )
    parts = group_rows // settings.rows
    tiles = batch * groups * parts * -(-listed // settings.neurons)
    problem = First(
        x.data_ptr(), w1.data_ptr(), _pointer(wu), *(2 * stride for stride in x.stride()[:2]), 2 * w1.stride(0),
        0 if wu is None else 2 * wu.stride(0), _pointer(b1), _pointer(bu), _pointer(order), lists.data_ptr(),
        hidden.data_ptr(), change.data_ptr(), means.data_ptr(), mean.data_ptr(),
        x.shape[1], x.shape[2] // 64, w1.shape[0], groups, listed, parts, batch * groups, tiles,
    )  # fmt: skip
    _kernel(settings, "first.cu", "exchange_listed", x.device.index).launch(tiles, problem, x.device)


def add_listed(
    change: Tensor, by_neuron: Tensor, order: Tensor | None, lists: Tensor, out: Tensor, result: Tensor, group_rows: int
) -> None:
    """As `chipmunk_fx.kernels.triton.second.add_listed`, for what the backend takes."""
    batch, groups, listed = lists.shape
    rows, width = out.shape[1:]
    settings = tuning.second_settings(
        ELEMENTS[change.dtype], group_rows, batch * groups, listed, width, devices.units(out.device)
    )
    parts = group_rows // settings.rows
    tiles = batch * groups * parts * (width // settings.columns)
    problem = Second(
        change.data_ptr(), by_neuron.data_ptr(), _pointer(order), lists.data_ptr(), out.data_ptr(), result.data_ptr(),
        rows, width, groups, listed, parts, batch * groups, tiles,
    )  # fmt: skip
    _kernel(settings, "second.cu", "add_listed", out.device.index).launch(tiles, problem, out.device)


def source(settings: ProductSettings, file: str) -> str:
    """The whole of the CUDA C++ of "first.cu" or "second.cu"."""
    first = settings.activation is not None
    sizes = {"consumers": settings.consumers, "columns": settings.columns, "buffers": settings.buffers}
    sizes |= {"gated": settings.gated} if first else {}
    return "\n".join(
        [
            preamble(settings.element, **sizes),
            multiply("multiply", settings.element, settings.columns, inner_apart=not first),
            *((Path(__file__).parent / name).read_text() for name in PARTS),
            activation_of(settings.activation, settings.element) if settings.activation else "",
            (Path(__file__).parent / file).read_text(),
        ]
    )


@cache
def _kernel(settings: ProductSettings, file: str, name: str, device: int) -> nvrtc.Kernel:
    """Compiled once a process, loaded once a device."""
    return nvrtc.load(_code(settings, file), name, settings.threads, settings.shared)


@cache
def _code(settings: ProductSettings, file: str) -> bytes:
    return nvrtc.compiled(source(settings, file), "sm_90a")


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
