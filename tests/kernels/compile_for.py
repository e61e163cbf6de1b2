"""Compile every Triton kernel ahead of time for one target, as the operators would launch it there; run without a GPU.

    python tests/kernels/compile_for.py sm_90 [full]

Prints one line a kernel: name, dtype, warps, bytes of shared memory. Launches are recorded instead of run, so that what is
compiled is what the operators ask for. Must not share a process with the interpreter.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import chipmunk_fx.kernels.triton as backend
from chipmunk_fx.kernels.triton import tuning
from chipmunk_fx.kernels.triton.fp8 import store_scales
from chipmunk_fx.kernels.triton.pooling import store_activations
from chipmunk_fx.kernels.triton.weights import store_weights
from chipmunk_fx.ops.cases import AttentionCase, MlpCase, arguments
from chipmunk_fx.ops.packing import line_bytes

TARGETS = {  # what programs are compiled for, and what tile sizes depend on there
    "sm_80": (GPUTarget("cuda", 80, 32), tuning.Device(shared=166_912, units=108)),
    "sm_86": (GPUTarget("cuda", 86, 32), tuning.Device(shared=101_376, units=84)),
    "sm_89": (GPUTarget("cuda", 89, 32), tuning.Device(shared=101_376, units=128)),
    "sm_90": (GPUTarget("cuda", 90, 32), tuning.Device(shared=232_448, units=132)),
    "sm_100": (GPUTarget("cuda", 100, 32), tuning.Device(shared=232_448, units=148)),
    "sm_120": (GPUTarget("cuda", 120, 32), tuning.Device(shared=101_376, units=170)),
    "gfx942": (GPUTarget("hip", "gfx942", 64), tuning.Device(shared=65_536, units=304, hip=True)),
}
TYPES = {
    torch.uint8: "*u8",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
    torch.uint16: "*u16",
}
_WIDE = AttentionCase(rows=256, keys=256, width=128, group_rows=128, columns=128, heads=1, mass_stride=4)
_LONG = AttentionCase(rows=192, keys=16400, width=64, group_rows=192, columns=1600, heads=1, mass_stride=4)
_FLUX = MlpCase(lead=(1, 256), width=128, neurons=512, group_rows=128, columns=128, result=128)
# numbers that are 1 are constants of a kernel
_ONE = replace(_WIDE, keys=16400, columns=1, random_density=1e-5, present=(200,))
CASES = (
    (torch.bfloat16, _WIDE),
    (torch.bfloat16, _ONE),
    (torch.bfloat16, _LONG),
    (torch.bfloat16, _FLUX),
)
MORE_CASES = (
    (torch.bfloat16, replace(_WIDE, random_density=0.001, near=40)),
    (torch.bfloat16, replace(_FLUX, columns=1, random_density=0.001)),
    (torch.float16, replace(_WIDE, width=64, group_rows=64, present=(200,), fixed=8, grouped=256)),
    (torch.float32, replace(_WIDE, width=72, columns=40, group_rows=48)),
    (torch.bfloat16, replace(_WIDE, width=256, group_rows=192, mass_stride=1)),
    (torch.float16, replace(_FLUX, gated=True, activation="gelu", width=72, columns=40, ordered=True)),
    (torch.float32, replace(_FLUX, activation="silu")),
)


@dataclass(frozen=True)
class Launch:
    """One call kernel[grid](*args, **options) with what it is specialised for."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    options: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Launch":
        values = dict(zip(kernel.arg_names, args, strict=False))
        values |= {name: kwargs.pop(name) for name in list(kwargs) if name in kernel.arg_names}
        signature, constants, aligned = {}, {}, []
        for index, parameter in enumerate(kernel.params):
            value = values[parameter.name]
            if isinstance(value, Tensor):
                signature[parameter.name] = TYPES[value.dtype]
            elif parameter.is_constexpr or value is None or (value == 1 and not parameter.do_not_specialize):
                signature[parameter.name], constants[parameter.name] = "constexpr", value
                continue
            else:
                signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, Tensor) or (
                isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize
            ):
                aligned.append(index)
        return cls(kernel, tuple(signature.items()), tuple(constants.items()), tuple(aligned), tuple(kwargs.items()))

    def compiled(self, target: GPUTarget) -> Any:
        divisible = {(index,): [["tt.divisibility", 16]] for index in self.aligned}
        source = ASTSource(self.kernel, dict(self.signature), dict(self.constants), divisible)
        return triton.compile(source, target=target, options=dict(self.options))


def launches(
    device: tuning.Device, cases: Sequence[tuple[torch.dtype, AttentionCase | MlpCase]], hopper: bool
) -> Iterator[Launch]:
    """Every kernel that the operators launch on `cases`, each once; with those that come before Hopper's products."""
    seen: dict[Launch, None] = {}

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        seen[Launch.of(kernel, args, kwargs)] = None

    tuning.device_of = lambda x: device
    JITFunction.run = record
    for dtype, case in cases:
        values = case.values(dtype)
        for op in ("attention_refresh", "attention_sparse") if "q" in values else ("mlp_refresh", "mlp_sparse"):
            getattr(backend, op)(**arguments(op, values))
        backend.cache_watch(
            cache=values["rest" if "q" in values else "out"], broken=torch.zeros(1, dtype=torch.bool), columns=64
        )
        if isinstance(case, AttentionCase):
            for paired in (True, False):
                one = {"parts": [values["q"]], "weights": [values["q"][0, 0, 0]], "cos": [values["q"].float()[:1, :1]]}
                backend.rotary(**one, sin=one["cos"], eps=1e-6, dim=2, paired=paired)
                heads = values["q"].expand(-1, 40, -1, -1)  # normed over all of them, an angle for each pair
                half = {name: [one["cos"][0][..., ::2]] for name in ("cos", "sin")}
                weights = [heads[0, :, 0].flatten()]
                backend.rotary(parts=[heads], weights=weights, **half, eps=1e-6, dim=2, paired=paired)
            lists = values["lists"].flatten(0, 2)
            bits = torch.zeros(len(lists), line_bytes(case.keys), dtype=torch.uint8)
            backend.pack_bits(lists, bits, case.keys)
            backend.unpack_bits(bits, lists, case.keys)
        elif hopper and dtype != torch.float32:
            w1, w2, clock = (values[name] for name in ("w1", "w2", "clock"))
            first, second = (torch.empty(w.shape, dtype=torch.float8_e4m3fn) for w in (w1, w2.mT))
            store_weights(w1, None, w2, first.unsqueeze(0), second, torch.zeros(2), torch.zeros(2), clock)
            store_scales(torch.zeros(1), torch.zeros(1), room=2)
            h = torch.zeros(256, len(w1), dtype=dtype)
            kept = [values[name][0] for name in ("hidden", "mean", "lists")]
            store_activations(h, None, *kept, None, activation="gelu", group_rows=128, most=torch.zeros(1))
    return iter(seen)


def main(name: str, full: bool) -> int:
    target, device = TARGETS[name]
    too_large = 0
    for launch in launches(device, CASES + MORE_CASES if full else CASES, hopper=name == "sm_90"):
        metadata: Any = launch.compiled(target).metadata
        dtype = next(kind for _, kind in launch.signature if kind.startswith("*"))
        print(f"{name} {launch.kernel.__name__} {dtype[1:]} {metadata.num_warps} warps {metadata.shared} bytes")
        too_large += metadata.shared > device.shared
    return int(too_large > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], "full" in sys.argv[2:]))
