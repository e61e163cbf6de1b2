"""Rows of x as the products of a sparse MLP step want them, in the order of groups: how pack.cu is compiled and launched."""

import ctypes
from ctypes import c_int, c_longlong, c_uint, c_void_p
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from chipmunk_fx.kernels.hopper import nvrtc, tuning
from chipmunk_fx.kernels.hopper.instructions import ELEMENTS, preamble
from chipmunk_fx.kernels.hopper.tuning import SPAN, PackSettings
from chipmunk_fx.kernels.triton.launching import copyable
from chipmunk_fx.ops.fp8 import DTYPE

PARTS = ("cluster.cuh", "pack.cu")
WORD = 8  # values of x that a thread reads at once


class Problem(ctypes.Structure):
    """The kernel's parameter; pack.cu says what its fields mean."""

    _fields_ = [
        ("x", c_void_p),
        ("x_batch", c_longlong),
        *((name, c_void_p) for name in ("order", "values", "means", "scales")),
        ("x_row", c_uint),
        *((name, c_int) for name in ("rows", "width", "groups", "parts", "steps", "tiles")),
    ]


@dataclass(frozen=True)
class Rows:
    """Rows of x, of a group in blocks of `block_rows`.

    values: [B G, blocks, steps, rows, SPAN bytes], in x's dtype or e4m3; pieces of 16 bytes of a line stand in the order of
    wgmma's swizzle over SPAN bytes. Rows that a last group lacks are left as they are. scales: fp32 [B, N] in the order of
    groups, what values of e4m3 are multiplied by.
    """

    values: Tensor
    scales: Tensor | None


def pool(x: Tensor, order: Tensor | None, group_rows: int, fp8: bool) -> tuple[Tensor, Rows]:
    """The mean row of each group, [B, G, C] in x's dtype, and the rows; of x [B, N, C], whose rows may lie apart.

    order: int32 [N] or None. fp8: each row over its scale, its largest magnitude over 448 (1 where that is 0), in e4m3.
    """
    x = copyable(x)
    batch, rows, width = x.shape
    settings = tuning.pack_settings(ELEMENTS[x.dtype], width, group_rows, fp8)
    groups, parts = -(-rows // group_rows), group_rows // settings.block
    dtype = DTYPE if fp8 else x.dtype
    steps = width * dtype.itemsize // SPAN
    shape = (batch * groups, parts, steps, settings.block, SPAN // dtype.itemsize)
    values = torch.empty(shape, dtype=dtype, device=x.device)
    means = torch.empty(batch, groups, width, dtype=x.dtype, device=x.device)
    scales = torch.empty(batch, rows, dtype=torch.float32, device=x.device) if fp8 else None
    problem = Problem(
        x.data_ptr(), x.stride(0) // WORD, None if order is None else order.data_ptr(), values.data_ptr(), means.data_ptr(),
        None if scales is None else scales.data_ptr(), x.stride(1) // WORD, rows, width, groups, parts, steps, batch * groups,
    )  # fmt: skip
    kernel = nvrtc.kernel(
        "pack_rows", source, x.device.index, settings, cluster=settings.cluster, resident=settings.resident
    )
    kernel.launch(batch * groups, problem, x.device)
    return means, Rows(values, scales)


def constants(settings: PackSettings) -> dict[str, int]:
    """What pack.cu is told, by name in small letters."""
    names = ("rows", "passes", "threads", "resident", "block", "span", "fp8", "cluster")
    return {name: int(getattr(settings, name)) for name in names}


def source(settings: PackSettings) -> str:
    """The whole of the CUDA C++."""
    here = Path(__file__).parent
    return "\n".join(
        [preamble(settings.element, **constants(settings)), *((here / name).read_text() for name in PARTS)]
    )
