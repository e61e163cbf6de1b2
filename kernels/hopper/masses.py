"""Column masses: how masses.cu is compiled and launched, and which calls it takes."""

import ctypes
from ctypes import c_float, c_int, c_longlong, c_void_p
from pathlib import Path

from torch import Tensor

from chipmunk_fx.kernels import devices
from chipmunk_fx.kernels.hopper import nvrtc, tuning
from chipmunk_fx.kernels.hopper.columns import LOG2E, strides
from chipmunk_fx.kernels.hopper.instructions import ELEMENTS, multiply, preamble
from chipmunk_fx.kernels.hopper.tuning import MassSettings
from chipmunk_fx.kernels.triton import masses as plain
from chipmunk_fx.kernels.triton.launching import copyable
from chipmunk_fx.kernels.triton.selection import LEAST_EXPONENT

PARTS = ("primitives.cuh", "rows.cuh", "masses.cu")


class Problem(ctypes.Structure):
    """The kernel's parameter; masses.cu says what its fields mean."""

    _fields_ = [
        *((name, c_void_p) for name in ("q", "k")),
        *((f"{name}_{axis}", c_longlong) for name in ("q", "k") for axis in ("batch", "head", "row")),
        *((name, c_void_p) for name in ("order", "lse", "masses")),
        *((name, c_int) for name in ("heads", "shared_by", "rows", "grouped", "keys", "pitch")),
        *((name, c_int) for name in ("first_head", "first_group", "groups", "group_rows", "stride")),
        *((name, c_int) for name in ("run", "runs", "parts", "tiles")),
        ("scale", c_float),
    ]


def column_masses(
    q: Tensor, k: Tensor, order: Tensor | None, lse: Tensor, heads: range, groups: range, *,
    scale: float, group_rows: int, stride: int,
) -> Tensor:  # fmt: skip
    """As `chipmunk_fx.kernels.triton.masses.column_masses`, which serves the samples that this kernel does not take."""
    settings = tuning.mass_settings(ELEMENTS[q.dtype], q.shape[3], -(-group_rows // stride))
    if settings is None:
        return plain.column_masses(q, k, order, lse, heads, groups, scale=scale, group_rows=group_rows, stride=stride)
    q, k = copyable(q), copyable(k)
    (_, per_batch, rows, _), keys = q.shape, k.shape[2]
    masses = plain.empty(heads, groups, keys, q.device)
    parts = -(-len(groups) // (settings.consumers * settings.groups))
    run = tuning.mass_run(len(heads) * parts, keys, devices.units(q.device))
    runs = -(-keys // run)
    tiles = len(heads) * parts * runs
    problem = Problem(
        q.data_ptr(), k.data_ptr(), *strides(q), *strides(k),
        None if order is None else order.data_ptr(), lse.data_ptr(), masses.data_ptr(),
        per_batch, per_batch // k.shape[1], rows, rows if order is None else order.shape[0], keys, masses.shape[2],
        heads.start, groups.start, len(groups), group_rows, stride, run, runs, parts, tiles, scale * LOG2E,
    )  # fmt: skip
    nvrtc.kernel("column_masses", source, q.device.index, settings).launch(tiles, problem, q.device)
    return masses[..., :keys]


def source(settings: MassSettings) -> str:
    """The whole of the CUDA C++."""
    sizes = {"width": settings.width, "consumers": settings.consumers, "sampled": settings.sampled}
    sizes |= {"groups": settings.groups, "buffers": settings.buffers, "least": LEAST_EXPONENT.value}
    products = multiply("multiply_keys", settings.element, settings.samples)
    here = Path(__file__).parent
    return "\n".join([preamble(settings.element, **sizes), products, *((here / name).read_text() for name in PARTS)])
