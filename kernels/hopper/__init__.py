"""The operators on Hopper GPUs (compute capability 9.0), where products with listed columns and neurons are CUDA C++.

Everything else about them is as in kernels/triton. Nothing is compiled, and no library loaded, until an operator runs.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from chipmunk_fx.kernels import devices, triton

name = "hopper"

CAPABILITY = (9, 0)
DTYPES = (torch.bfloat16, torch.float16)
WIDTHS = (64, 128)
GROUP_ROWS = (128, 192)  # and their multiples
LEAST_WIDTH = 512  # of x: in fp8 a stage more than there are buffers
FP8_DTYPES = (torch.bfloat16,)  # fp16 keeps more bits than sums of products in fp8 have


def supports(op: str, arguments: Mapping[str, Any]) -> str | None:
    """None where the kernels take the call, otherwise the value that they do not take and those that they do."""
    if op == "cache_watch":
        return _unwatched(**arguments)
    attention = op.startswith("attention")
    x, group_rows = arguments["q" if attention else "x"], arguments["group_rows"]
    if refused := _elsewhere(x.device):
        return refused
    if x.dtype not in DTYPES:
        return f"{x.dtype}, allowed are {', '.join(map(str, DTYPES))}"
    if refused := refused_width(attention, x.shape[-1], x.shape[-1] if attention else arguments["w2"].shape[0]):
        return refused
    if all(group_rows % rows for rows in GROUP_ROWS):
        return f"groups of {group_rows} rows, allowed are multiples of {' and of '.join(map(str, GROUP_ROWS))}"
    if arguments.get("w1_fp8") is not None and x.dtype not in FP8_DTYPES:
        return f"weights in fp8 with {x.dtype}, allowed is {', '.join(map(str, FP8_DTYPES))}"
    return triton.refused(op, arguments)


def refused_width(attention: bool, width: int, result: int) -> str | None:
    """Why heads, or an MLP's inputs, that are `width` wide and their `result` are not taken; None where they are."""
    if attention and width not in WIDTHS:
        return f"head width {width}, allowed are {', '.join(map(str, WIDTHS))}"
    if not attention and (width < LEAST_WIDTH or width % 64):
        return f"width {width}, allowed are multiples of 64 from {LEAST_WIDTH} on"
    if not attention and result % 64:
        return f"a result {result} wide, allowed are multiples of 64"
    return None


def _elsewhere(device: torch.device) -> str | None:
    """Why the kernels do not run on `device`; None where they do."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"device {device.type}, allowed is cuda"
    if devices.capability(device) != CAPABILITY:
        return f"compute capability {devices.capability(device)}, allowed is {CAPABILITY}"
    if _nvrtc() is None:
        return f"no NVRTC for CUDA {torch.version.cuda}, needed is that of the package nvidia-cuda-nvrtc"
    return None


def _unwatched(cache: Tensor, broken: Tensor, columns: int) -> str | None:
    """Why a cache is not watched here; None where it is."""
    if refused := _elsewhere(cache.device):
        return refused
    from chipmunk_fx.kernels.hopper.watching import suits

    if cache.dtype != torch.float32:
        return f"a cache of {cache.dtype}, allowed is {torch.float32}"
    return None if suits(cache, columns) else "rows that are not in pieces of 16 bytes"


def attention_refresh(**arguments: Any) -> Tensor:
    """As `chipmunk_fx.ops.attention.attention_refresh`."""
    from chipmunk_fx.kernels.hopper.refresh import refresh

    return refresh(**arguments)


def attention_sparse(**arguments: Any) -> Tensor:
    """As `chipmunk_fx.ops.attention.attention_sparse`."""
    from chipmunk_fx.kernels.hopper.columns import attend_columns
    from chipmunk_fx.kernels.triton import attention

    return attention.sparse(**arguments, over_columns=attend_columns)


def mlp_refresh(**arguments: Any) -> Tensor:
    """As `chipmunk_fx.ops.mlp.mlp_refresh`."""
    from chipmunk_fx.kernels.triton import mlp

    return mlp.refresh(**arguments)


def mlp_sparse(**arguments: Any) -> Tensor:
    """As `chipmunk_fx.ops.mlp.mlp_sparse`."""
    from chipmunk_fx.kernels.hopper.mlp import products
    from chipmunk_fx.kernels.hopper.packing import pool
    from chipmunk_fx.kernels.hopper.selection import select_neurons
    from chipmunk_fx.kernels.triton import mlp

    return mlp.sparse(**arguments, steps=(pool, select_neurons, products))


def cache_watch(**arguments: Any) -> None:
    """As `chipmunk_fx.ops.transfer.cache_watch`."""
    from chipmunk_fx.kernels.hopper.watching import watch

    watch(**arguments)


def _nvrtc() -> Any:
    from chipmunk_fx.kernels.hopper import nvrtc

    return nvrtc.library()
