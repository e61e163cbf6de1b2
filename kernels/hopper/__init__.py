"""The attention operators on Hopper GPUs (compute capability 9.0), where their kernel over listed columns is CUDA C++.

Everything else about them is as in kernels/triton. Nothing is compiled, and no library loaded, until an operator runs.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from chipmunk_fx.kernels import triton

name = "hopper"

CAPABILITY = (9, 0)
DTYPES = (torch.bfloat16, torch.float16)
WIDTHS = (64, 128)
GROUP_ROWS = (128, 192)  # and their multiples


def supports(op: str, arguments: Mapping[str, Any]) -> str | None:
    """None where the kernel takes the call, otherwise the value that it does not take and those that it does."""
    q, group_rows = arguments["q"], arguments["group_rows"]
    if q.device.type != "cuda" or torch.version.hip is not None:
        return f"device {q.device.type}, allowed is cuda"
    if torch.cuda.get_device_capability(q.device) != CAPABILITY:
        return f"compute capability {torch.cuda.get_device_capability(q.device)}, allowed is {CAPABILITY}"
    if q.dtype not in DTYPES:
        return f"{q.dtype}, allowed are {', '.join(map(str, DTYPES))}"
    if q.shape[-1] not in WIDTHS:
        return f"head width {q.shape[-1]}, allowed are {', '.join(map(str, WIDTHS))}"
    if all(group_rows % rows for rows in GROUP_ROWS):
        return f"groups of {group_rows} rows, allowed are multiples of {' and of '.join(map(str, GROUP_ROWS))}"
    if _nvrtc() is None:
        return f"no NVRTC for CUDA {torch.version.cuda}, needed is that of the package nvidia-cuda-nvrtc"
    return triton.supports(op, arguments)


def attention_refresh(**arguments: Any) -> Tensor:
    """As `chipmunk_fx.ops.attention.attention_refresh`."""
    from chipmunk_fx.kernels.hopper.columns import attend_columns
    from chipmunk_fx.kernels.triton import attention

    return attention.refresh(**arguments, over_columns=attend_columns)


def attention_sparse(**arguments: Any) -> Tensor:
    """As `chipmunk_fx.ops.attention.attention_sparse`."""
    from chipmunk_fx.kernels.hopper.columns import attend_columns
    from chipmunk_fx.kernels.triton import attention

    return attention.sparse(**arguments, over_columns=attend_columns)


def _nvrtc() -> Any:
    from chipmunk_fx.kernels.hopper import nvrtc

    return nvrtc.library()
