"""Kernel backends: faster implementations of the operators in chipmunk_fx.ops, tried in order on CUDA tensors.

A backend says per call whether it takes it, and if not, why. What no backend takes runs as plain PyTorch. README.md
beside this file specifies the operators and tells how to add a backend.
"""

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor

from chipmunk_fx.kernels import hopper, triton
from chipmunk_fx.kernels.hopper.tuning import in_parts
from chipmunk_fx.ops import flash4
from chipmunk_fx.ops.groups import GROUP_ROWS
from chipmunk_fx.ops.library import NAMESPACE, REFERENCE, implementation
from chipmunk_fx.ops.packing import PLAIN, Bits


class Backend(Protocol):
    """A folder beside this file: a module with these two names, and one function for each operator it implements.

    The functions are named like the operators and take their arguments by name.
    """

    name: str

    def supports(self, op: str, arguments: Mapping[str, Any]) -> str | None:
        """None where the backend takes the call, otherwise the reason why not."""
        ...


BACKENDS: tuple[Backend, ...] = (hopper, triton)


# Rows of a group that kernels/hopper likes best. H200: sparse attention of 40 heads of 75,600 rows, 5376 columns, 14.1 ms with
# 192 rows, 16.4 with 128; sparse MLP of 4352 rows, 3712 of 12288 neurons, 0.54 and 0.57.
HOPPER_GROUP_ROWS = 192


def group_rows(kind: str, device: torch.device, dtype: torch.dtype, sizes: Sequence[int]) -> int:
    """Rows of a group where the user leaves them to us. kind, sizes: those of a chipmunk_fx.graph.plan.Site."""
    return HOPPER_GROUP_ROWS if on_hopper(kind, device, dtype, sizes) else GROUP_ROWS


def on_hopper(kind: str, device: torch.device, dtype: torch.dtype, sizes: Sequence[int]) -> bool:
    """Whether kernels/hopper takes such sites in groups of its size."""
    if device.type != "cuda" or not torch.cuda.is_available() or torch.version.hip is not None:
        return False
    attention = kind == "attention"
    refused = hopper.refused_width(attention, width=sizes[4 if attention else 2], result=sizes[4])
    suits = dtype in hopper.DTYPES and refused is None
    return suits and torch.cuda.get_device_capability(device) == hopper.CAPABILITY and hopper._nvrtc() is not None


def refreshes_in_parts(
    device: torch.device, dtype: torch.dtype, sizes: Sequence[int], group_rows: int, density: float
) -> bool:
    """Whether such an attention is refreshed faster where its lists can be chosen before it is computed."""
    if all(group_rows % rows for rows in hopper.GROUP_ROWS) or not on_hopper("attention", device, dtype, sizes):
        return False
    best = flash4.pays(hopper.CAPABILITY, dtype, sizes[4], min(sizes[2:4])) and flash4.installed()
    return in_parts(group_rows, density, best)


def refused_in_fp8(device: torch.device, dtype: torch.dtype, sizes: Sequence[int], group_rows: int) -> str | None:
    """Why sparse steps of such an MLP cannot make their products in fp8; None where they can. A CPU emulates it."""
    if device.type == "cpu":
        return None
    in_groups = any(group_rows % rows == 0 for rows in hopper.GROUP_ROWS)
    if not in_groups or dtype not in hopper.FP8_DTYPES or not on_hopper("mlp", device, dtype, sizes):
        return "only the Hopper kernels have it, in groups of 128 or 192 rows of bf16 and multiples of 64 wide"
    return None


def choose(
    op: str, arguments: Mapping[str, Any], backends: Sequence[Backend] = BACKENDS
) -> tuple[Callable[..., Tensor], str, tuple[str, ...]]:
    """What runs a call of `op`: the function, the name of its backend, and what those before it said against it.

    arguments: the call's, by name. The last resort is called "reference".
    """
    refused: list[str] = []
    for backend in backends:
        function = getattr(backend, op, None)
        reason = f"does not implement {op}" if function is None else backend.supports(op, arguments)
        if function is not None and reason is None:
            return function, backend.name, tuple(refused)
        refused.append(f"{backend.name}: {reason}")
    return REFERENCE[op], "reference", tuple(refused)


def _register() -> torch.library.Library:
    # kept alive by the module: its implementations vanish with it
    library = torch.library.Library(NAMESPACE, "IMPL")
    bits = PLAIN if find_spec("triton") is None else Bits(triton.pack_bits, triton.unpack_bits)
    for op in REFERENCE:
        library.impl(op, implementation(op, lambda op, arguments: choose(op, arguments)[0], bits), "CUDA")
    return library


# Where the repository is on the path, diffusers takes this folder for the distribution of its name, and imports it again.
LIBRARY = _register() if __name__ == "chipmunk_fx.kernels" else None
