"""flash-attn-4 as dense attention, where it is installed: on Hopper the fastest over long sequences.

Its kernels are compiled at the first call of a process, which takes some seconds.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from chipmunk_fx.log import logger

CAPABILITY = (9, 0)
DTYPES = (torch.bfloat16, torch.float16)
WIDTHS = (64, 128)
# H200, bf16, width 128, ms beside cuDNN: 24 heads of 4352 rows 0.445 and 0.395; 40 of 75,600 172 and 203; 24 of 119,056 267
# and 308. In between they are even at about this length.
ROWS = 16384


def takes(q: Tensor, k: Tensor, valid: Tensor | None) -> bool:
    """Whether the call is one for flash-attn-4: all keys valid, long, and left to us by the user.

    An `sdpa_kernel` that allows one of PyTorch's two kernels for Hopper and not the other is a choice, which is kept.
    """
    if valid is not None or not suits(q, k) or q.device.index != torch.cuda.current_device():
        return False
    chosen = not (torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.cudnn_sdp_enabled())
    return not chosen and works(q, k)


def suits(q: Tensor, k: Tensor) -> bool:
    """Whether it would be faster for such tensors, installed or not."""
    if not q.is_cuda:
        return False
    capability = torch.cuda.get_device_capability(q.device)
    return pays(capability, q.dtype, q.shape[-1], min(q.shape[2], k.shape[2]))


def pays(capability: tuple[int, int], dtype: torch.dtype, width: int, rows: int) -> bool:
    """Whether it is faster than what PyTorch brings. rows: of queries or of keys, the fewer."""
    return capability == CAPABILITY and dtype in DTYPES and width in WIDTHS and rows >= ROWS


def installed() -> bool:
    return _imported() is not None


def works(q: Tensor, k: Tensor) -> bool:
    """Whether flash-attn-4 is installed and takes tensors like these. A failure is said once."""
    return _tried(q.device, q.dtype, q.shape[-1], q.shape[1] // k.shape[1])


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """As `chipmunk_fx.ops.dense.attend`, where it `works`."""
    function = _imported()
    assert function is not None
    # tokens come before heads in its arguments; heads of keys may be fewer
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = function(q, k, v, softmax_scale=scale, return_lse=True)
    return out.transpose(1, 2), lse


@cache
def _tried(device: torch.device, dtype: torch.dtype, width: int, share: int) -> bool:
    """Whether it computes a few rows, which compiles what serves longer ones. share: heads of queries a head of keys."""
    if not installed():
        return False
    q = torch.zeros(1, share, 128, width, dtype=dtype, device=device)
    try:
        attend(q, q[:, :1], q[:, :1], 1.0)
    except torch.OutOfMemoryError:
        raise
    except Exception as problem:  # of a compiler, a driver, another version's signature
        logger("runtime").warning("flash-attn-4 failed, PyTorch's attention takes over: %s", problem)
        return False
    return True


@cache
def _imported() -> Callable[..., Any] | None:
    try:
        if find_spec("flash_attn.cute") is None:
            return None
        return import_module("flash_attn.cute").flash_attn_func
    except ModuleNotFoundError as missing:
        if missing.name == "flash_attn":
            return None
        problem: Exception = missing
    except Exception as failed:
        problem = failed
    logger("runtime").warning("flash-attn-4 cannot be imported, PyTorch's attention is used: %s", problem)
    return None
