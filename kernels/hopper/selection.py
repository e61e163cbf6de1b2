"""Selection of keys: how select.cu is compiled and launched, and which calls it takes."""

import ctypes
from ctypes import c_int, c_longlong, c_uint, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from chipmunk_fx.kernels.hopper import nvrtc
from chipmunk_fx.kernels.hopper.tuning import SelectSettings
from chipmunk_fx.kernels.triton import selection as plain
from chipmunk_fx.kernels.triton.launching import seeds

SETTINGS = SelectSettings()
RUN = 16  # codes that a thread reads at once
LEAST = 4096  # keys, from which on it is faster: H100, 552 rows of 4352 0.051 ms, Triton 0.085


class Problem(ctypes.Structure):
    """The kernel's parameter; select.cu says what its fields mean."""

    _fields_ = [
        *((name, c_void_p) for name in ("lists", "codes", "always", "valid", "spare", "clock")),
        ("pitch", c_longlong),
        *((name, c_int) for name in ("rows", "columns", "keys", "drawn", "first", "rows_a_batch")),
        *((name, c_int) for name in ("always_rows", "spare_rows")),
        *((name, c_uint) for name in ("seed", "site")),
    ]


def select(
    lists: Tensor, scores: Tensor, minus: Tensor | None, clock: Tensor, *, drawn: int, seed: int, site: int,
    first: int = 0, always: Tensor | None = None, valid: Tensor | None = None, spare: Tensor | None = None,
    rows_a_batch: int = 1,
) -> None:  # fmt: skip
    """As `chipmunk_fx.kernels.triton.selection.select`, which serves what this kernel does not take: it takes codes."""
    if not takes(scores, minus):
        return plain.select(
            lists, scores, minus, clock, drawn=drawn, seed=seed, site=site, first=first, always=always, valid=valid,
            spare=spare, rows_a_batch=rows_a_batch,
        )  # fmt: skip
    (rows, columns), keys = lists.shape, scores.shape[1]
    problem = Problem(
        lists.data_ptr(), scores.data_ptr(), *(None if x is None else x.data_ptr() for x in (always, valid, spare)),
        clock.data_ptr(), scores.stride(0), rows, columns, keys, drawn, first, rows_a_batch,
        1 if always is None else always.shape[0], 1 if spare is None else spare.shape[0], *seeds(seed, site),
    )  # fmt: skip
    kernel = nvrtc.kernel("select_keys", source, scores.device.index, SETTINGS, resident=SETTINGS.blocks)
    kernel.launch(rows, problem, scores.device)


def takes(scores: Tensor, minus: Tensor | None) -> bool:
    """Codes of long rows, each beginning where a thread can read."""
    aligned = scores.data_ptr() % (2 * RUN) == 0 and scores.stride(0) % RUN == 0
    return minus is None and scores.dtype == torch.uint16 and scores.shape[1] >= LEAST and aligned


def source(settings: SelectSettings) -> str:
    """The whole of the CUDA C++."""
    sizes = f"constexpr int THREADS = {settings.threads}, BLOCKS = {settings.blocks};\n"
    return sizes + (Path(__file__).parent / "select.cu").read_text()
