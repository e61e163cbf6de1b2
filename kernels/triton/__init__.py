"""Triton kernels for the four sparse operators, the watch over their caches and rotary embedding: any GPU that Triton
serves, and its interpreter on a CPU.

Nothing here imports triton until an operator runs; README.md beside this file describes the kernels.
"""

from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from chipmunk_fx.kernels import devices
from chipmunk_fx.kernels.triton.tuning import padded

name = "triton"

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDEST = 256  # head width: wider tiles do not fit the registers
WIDEST_TOKEN = 16384  # values of all heads that one program norms together, their number and width rounded up
MOST_BATCHES = 65535  # CUDA's bound on the second axis of a grid


def supports(op: str, arguments: Mapping[str, Any]) -> str | None:
    """None where the kernels take the call, otherwise the value that they do not take and those that they do."""
    if arguments.get("w1_fp8") is not None:
        return "weights in fp8, allowed is the dtype of x"
    return refused(op, arguments)


def refused(op: str, arguments: Mapping[str, Any]) -> str | None:
    """As `supports`, whatever the first product of an MLP is made in."""
    if not _installed():
        return "triton is not installed"
    attention = op.startswith("attention")
    x = _subject(op, arguments)
    if x.device.type != "cuda" and not _interpreted():
        return f"device {x.device.type}, allowed are cuda and, with TRITON_INTERPRET=1, cpu"
    if x.dtype not in DTYPES:
        return f"{x.dtype}, allowed are {', '.join(map(str, DTYPES))}"
    if x.dtype == torch.bfloat16 and x.is_cuda and not devices.multiplies_bf16(x.device):
        return f"{x.dtype} on {torch.cuda.get_device_name(x.device)}, which has no products in it"
    if op == "rotary" and (x.shape[-1] % 2 or x.shape[-1] > WIDEST):
        return f"head width {x.shape[-1]}, allowed are even ones to {WIDEST}"
    if op == "rotary" and (values := _normed_together(arguments)) > WIDEST_TOKEN:
        return f"norms of {values} values, allowed are up to {WIDEST_TOKEN}"
    if op == "rotary" and x.shape[0] > MOST_BATCHES:
        return f"a batch of {x.shape[0]}, allowed are up to {MOST_BATCHES}"
    if op in ("cache_watch", "rotary"):
        return None
    if mixed := {v.dtype for v in _operands(op, arguments)} - {x.dtype}:
        return f"{x.dtype} together with {', '.join(map(str, mixed))}, allowed is one dtype"
    if arguments["group_rows"] % 16:
        return f"groups of {arguments['group_rows']} rows, allowed are multiples of 16"
    if attention and x.shape[-1] > WIDEST:
        return f"head width {x.shape[-1]}, allowed are 1 to {WIDEST}"
    if attention and arguments["scale"] <= 0:
        return f"scale {arguments['scale']}, allowed are positive ones"
    if not attention and arguments["activation"] not in _activations():
        return f"activation {arguments['activation']}, allowed are {', '.join(_activations())}"
    return None


def attention_refresh(**arguments: Any) -> Tensor:
    """As `chipmunk_fx.ops.attention.attention_refresh`."""
    from chipmunk_fx.kernels.triton import attention

    return attention.refresh(**arguments)


def attention_sparse(**arguments: Any) -> Tensor:
    """As `chipmunk_fx.ops.attention.attention_sparse`."""
    from chipmunk_fx.kernels.triton import attention

    return attention.sparse(**arguments)


def mlp_refresh(**arguments: Any) -> Tensor:
    """As `chipmunk_fx.ops.mlp.mlp_refresh`."""
    from chipmunk_fx.kernels.triton import mlp

    return mlp.refresh(**arguments)


def mlp_sparse(**arguments: Any) -> Tensor:
    """As `chipmunk_fx.ops.mlp.mlp_sparse`."""
    from chipmunk_fx.kernels.triton import mlp

    return mlp.sparse(**arguments)


def cache_watch(**arguments: Any) -> None:
    """As `chipmunk_fx.ops.transfer.cache_watch`."""
    from chipmunk_fx.kernels.triton import watching

    watching.watch(**arguments)


def rotary(**arguments: Any) -> Tensor:
    """As `chipmunk_fx.ops.rotary.rotary`."""
    from chipmunk_fx.kernels.triton import rotation

    return rotation.rotate(**arguments)


def pack_bits(lists: Tensor, bits: Tensor, keys: int) -> None:
    """As `chipmunk_fx.ops.packing.Bits.pack`."""
    from chipmunk_fx.kernels.triton import packing

    packing.pack(lists, bits, keys)


def unpack_bits(bits: Tensor, lists: Tensor, keys: int) -> None:
    """As `chipmunk_fx.ops.packing.Bits.unpack`."""
    from chipmunk_fx.kernels.triton import packing

    packing.unpack(bits, lists, keys)


def _subject(op: str, arguments: Mapping[str, Any]) -> Tensor:
    """The argument that the others follow."""
    if op == "rotary":
        return arguments["parts"][0]
    return arguments["cache" if op == "cache_watch" else "q" if op.startswith("attention") else "x"]


def _normed_together(arguments: Mapping[str, Any]) -> int:
    """The most values of a norm, as they are held: powers of two of heads and of columns."""
    weights = [len(weight) for weight in arguments["weights"] if weight is not None]
    width = arguments["parts"][0].shape[-1]
    return padded(max(weights, default=0) // width, 1) * padded(width)


def _operands(op: str, arguments: Mapping[str, Any]) -> list[Tensor]:
    names = ("k", "v", "rest") if op.startswith("attention") else ("w1", "b1", "wu", "bu", "w2", "b2", "hidden")
    return [arguments[n] for n in names if arguments[n] is not None]


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


def _interpreted() -> bool:
    import triton

    return triton.knobs.runtime.interpret


def _activations() -> tuple[str, ...]:
    from chipmunk_fx.kernels.triton.activations import NAMES

    return NAMES
