"""Attention of groups of rows over listed columns: how columns.cu is compiled and launched."""

import ctypes
from ctypes import c_float, c_int, c_longlong, c_void_p
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from chipmunk_fx.kernels import devices
from chipmunk_fx.kernels.hopper import nvrtc, tuning
from chipmunk_fx.kernels.hopper.instructions import ELEMENTS, multiply, preamble
from chipmunk_fx.kernels.hopper.tuning import Settings
from chipmunk_fx.kernels.triton.launching import copyable

LOG2E = 1.4426950408889634
PARTS = ("primitives.cuh", "rows.cuh", "gather.cuh", "softmax.cuh", "columns.cu")


class Problem(ctypes.Structure):
    """The kernel's parameter; columns.cu says what its fields mean."""

    _fields_ = [
        *((name, c_void_p) for name in ("q", "k", "v")),
        *((f"{name}_{axis}", c_longlong) for name in ("q", "k", "v") for axis in ("batch", "head", "row")),
        *((name, c_void_p) for name in ("old", "result")),
        *((f"{name}_{axis}", c_longlong) for name in ("old", "result") for axis in ("batch", "head", "row")),
        *((name, c_void_p) for name in ("order", "lists", "share", "lse")),
        *((name, c_int) for name in ("heads", "shared_by", "rows", "grouped", "keys", "groups", "columns")),
        *((name, c_int) for name in ("parts", "whole", "tasks", "group_rows")),
        *((name, c_float) for name in ("scale", "power")),
        ("padded", c_int),
    ]


def attend_columns(
    q: Tensor, k: Tensor, v: Tensor, order: Tensor | None, lists: Tensor, rest: Tensor, share: Tensor, out: Tensor,
    lse: Tensor | None = None, *, scale: float, group_rows: int, power: float = 0.0, short: bool,
) -> None:  # fmt: skip
    """As `chipmunk_fx.kernels.triton.columns.attend_columns`, for what the backend takes."""
    settings = tuning.columns_settings(ELEMENTS[q.dtype], q.shape[3], group_rows)
    old, result = (rest, out) if lse is None else (out, rest)
    _launch(settings, q, k, v, order, lists, old, result, share, lse, scale, group_rows, power, short)


def attend_in_parts(
    q: Tensor, k: Tensor, v: Tensor, order: Tensor | None, lists: Tensor, rest: Tensor, share: Tensor, out: Tensor,
    lse: Tensor, *, scale: float, group_rows: int, power: float, short: bool,
) -> None:  # fmt: skip
    """Write out, rest, share and lse of a refresh whose lists are known, without a dense kernel: attention over the keys that
    each group's list lacks, then over those it has, which the kernel merges. Arguments as of `attend_columns`."""
    settings = tuning.columns_settings(ELEMENTS[q.dtype], q.shape[3], group_rows)
    last = share, lse, scale, group_rows, power, short
    _launch(replace(settings, others=True), q, k, v, order, lists, rest, rest, *last)
    _launch(replace(settings, merging=True), q, k, v, order, lists, rest, out, *last)


def _launch(
    settings: Settings, q: Tensor, k: Tensor, v: Tensor, order: Tensor | None, lists: Tensor, old: Tensor, result: Tensor,
    share: Tensor, lse: Tensor | None, scale: float, group_rows: int, power: float, short: bool,
) -> None:  # fmt: skip
    q, k, v = (copyable(x) for x in (q, k, v))
    batch, heads, rows, _ = q.shape
    parts = group_rows // settings.rows
    tiles = batch * heads * lists.shape[2] * parts
    whole = tuning.whole_tiles(tiles, settings.consumers, devices.units(q.device))
    tasks = whole + settings.consumers * (tiles - whole)
    problem = Problem(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), *strides(q), *strides(k), *strides(v),
        old.data_ptr(), result.data_ptr(), *strides(old), *strides(result),
        None if order is None else order.data_ptr(), lists.data_ptr(), share.data_ptr(),
        None if lse is None else lse.data_ptr(),
        heads, heads // k.shape[1], rows, rows if order is None else order.shape[0], k.shape[2], *lists.shape[2:],
        parts, whole, tasks, group_rows, scale * LOG2E, power, short,
    )  # fmt: skip
    nvrtc.kernel("attend_columns", source, q.device.index, settings).launch(tasks, problem, q.device)


def source(settings: Settings) -> str:
    """The whole of the CUDA C++."""
    element, width, columns = settings.element, settings.width, settings.columns
    sizes = {"width": width, "consumers": settings.consumers, "columns": columns, "buffers": settings.buffers}
    sizes |= {"others": settings.others, "merging": settings.merging}
    products = (
        multiply("multiply_keys", element, columns),
        multiply("multiply_values", element, width, left_in_registers=True),
    )
    here = Path(__file__).parent
    return "\n".join([preamble(element, **sizes), *products, *((here / name).read_text() for name in PARTS)])


def strides(x: Tensor) -> tuple[int, ...]:
    """In bytes, of batch, heads and rows."""
    return tuple(stride * x.element_size() for stride in x.stride()[:3])
