"""Selection of keys and of neurons: how select.cu and neurons.cu are compiled and launched, and which calls they take."""

import ctypes
from ctypes import c_int, c_longlong, c_uint, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from chipmunk_fx.kernels.hopper import nvrtc, tuning
from chipmunk_fx.kernels.hopper.tuning import RUN, SelectSettings
from chipmunk_fx.kernels.triton import selection as plain
from chipmunk_fx.kernels.triton.launching import seeds

LEAST = 4096  # keys, from which on it is faster: H100, 552 rows of 4352 0.051 ms, Triton 0.085


class Rules(ctypes.Structure):
    """What both kernels are told; lists.cuh says what its fields mean."""

    _fields_ = [
        *((name, c_void_p) for name in ("lists", "clock")),
        *((name, c_int) for name in ("rows", "columns", "total", "drawn", "first")),
        *((name, c_uint) for name in ("seed", "site")),
    ]


class Keys(ctypes.Structure):
    """The parameter of select_keys; select.cu says what its fields mean."""

    _fields_ = [
        ("rules", Rules),
        *((name, c_void_p) for name in ("codes", "always", "valid", "spare")),
        ("pitch", c_longlong),
        *((name, c_int) for name in ("rows_a_batch", "always_rows", "spare_rows")),
    ]


class Neurons(ctypes.Structure):
    """The parameter of select_neurons; neurons.cu says what its fields mean."""

    _fields_ = [("rules", Rules), *((name, c_void_p) for name in ("means", "mean"))]


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
    problem = Keys(
        _rules(lists, scores, clock, drawn, seed, site, first), scores.data_ptr(),
        *(None if x is None else x.data_ptr() for x in (always, valid, spare)), scores.stride(0), rows_a_batch,
        1 if always is None else always.shape[0], 1 if spare is None else spare.shape[0],
    )  # fmt: skip
    settings = SelectSettings()
    kernel = nvrtc.kernel("select_keys", source, scores.device.index, settings, "select.cu", resident=settings.blocks)
    kernel.launch(lists.shape[0], problem, scores.device)


def takes(scores: Tensor, minus: Tensor | None) -> bool:
    """Codes of long rows, each beginning where a thread can read."""
    aligned = scores.data_ptr() % (2 * RUN) == 0 and scores.stride(0) % RUN == 0
    return minus is None and scores.dtype == torch.uint16 and scores.shape[1] >= LEAST and aligned


def select_neurons(
    lists: Tensor, means: Tensor, mean: Tensor, clock: Tensor, *, drawn: int, seed: int, site: int
) -> None:
    """As `chipmunk_fx.kernels.triton.selection.select` of |means - mean| where `renewed`, which serves rows no cluster holds."""
    settings = tuning.neuron_settings(means.shape[1])
    if settings is None or (means.data_ptr() | mean.data_ptr()) % 16:
        return plain.select(lists, means, mean, clock, drawn=drawn, seed=seed, site=site, renewed=True)
    rules = _rules(lists, means, clock, drawn, seed, site)
    problem = Neurons(rules, means.data_ptr(), mean.data_ptr())
    kernel = nvrtc.kernel(
        "select_neurons", source, means.device.index, settings, "neurons.cu", cluster=settings.cluster
    )
    kernel.launch(lists.shape[0], problem, means.device)


def _rules(lists: Tensor, scores: Tensor, clock: Tensor, drawn: int, seed: int, site: int, first: int = 0) -> Rules:
    return Rules(lists.data_ptr(), clock.data_ptr(), *lists.shape, scores.shape[1], drawn, first, *seeds(seed, site))


def source(settings: SelectSettings, file: str) -> str:
    """The whole of the CUDA C++ of "select.cu" or "neurons.cu"."""
    sizes = (f"{name} = {getattr(settings, name.lower())}" for name in ("THREADS", "BLOCKS", "CLUSTER"))
    parts = ((Path(__file__).parent / name).read_text() for name in ("cluster.cuh", "lists.cuh", file))
    return "\n".join([f"constexpr int {', '.join(sizes)};", *parts])
