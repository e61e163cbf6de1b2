"""The part of a kernel's source that depends on its settings: sizes, conversions and wgmma instructions."""

import torch

ELEMENTS = {torch.bfloat16: "bf16", torch.float16: "f16"}


def preamble(element: str, **constants: int | bool) -> str:
    """CUDA C++ that comes before all else. element: "bf16" or "f16"; constants: by name in small letters."""
    sizes = (f"constexpr int {name.upper()} = {int(value)};" for name, value in constants.items())
    return "\n".join([*sizes, _PACK.replace("ELEMENT", element), _UNPACK[element]])


# pack: two fp32 to the nearest, x in the low half; low and high: back. volatile, or packing moves ahead of a wait for
# products that still read the registers it packs into. pack8: two in e4m3, to the nearest or, too large, the largest. minus and
# times: of two pairs, rounded.
_PACK = """
__device__ __forceinline__ unsigned int pack(float x, float y) {
    unsigned int z;
    asm volatile("cvt.rn.ELEMENTx2.f32 %0, %1, %2;" : "=r"(z) : "f"(y), "f"(x));
    return z;
}
__device__ __forceinline__ unsigned int minus(unsigned int x, unsigned int y) {
    unsigned int z;
    asm("sub.rn.ELEMENTx2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
    return z;
}
__device__ __forceinline__ unsigned int times(unsigned int x, unsigned int y) {
    unsigned int z;
    asm("mul.rn.ELEMENTx2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
    return z;
}
__device__ __forceinline__ unsigned int pack8(float x, float y) {
    unsigned short z;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(z) : "f"(y), "f"(x));
    return z;
}
"""
_UNPACK = {
    "bf16": """
__device__ __forceinline__ float low(unsigned int x) { return __uint_as_float(x << 16); }
__device__ __forceinline__ float high(unsigned int x) { return __uint_as_float(x & 0xFFFF0000); }
""",
    "f16": """
__device__ __forceinline__ float low(unsigned int x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"((unsigned short)x));
    return y;
}
__device__ __forceinline__ float high(unsigned int x) { return low(x >> 16); }
""",
}


def multiply(name: str, element: str, n: int, *, left_in_registers: bool = False, inner_apart: bool = False) -> str:
    """A function `name`: d [64, n] = a b, or d + a b where `add`: 32 bytes of the inner dimension (16 values, of "e4m3" 32), d in
    the registers of a warpgroup, b in shared memory.

    a in shared memory too: a [64, 16] and b [n, 16], or with `inner_apart` a [16, 64] and b [16, n]. a in registers, as
    four words of each thread: b [16, n], of "e4m3" [n, 32].
    """
    count, words = n // 2, 4 if left_in_registers else 1
    results = ", ".join(f"%{i}" for i in range(count))
    left = ", ".join(f"%{count + i}" for i in range(words))
    kind, letter = ("unsigned int", "r") if left_in_registers else ("unsigned long long", "l")
    parameters = ", ".join(f"{kind} a{i}" for i in range(words))
    inputs = ", ".join(f'"{letter}"(a{i})' for i in range(words))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    # signs of a and b, then which of them run along the product's outer dimension first
    outer = "" if element == "e4m3" else ", 1" if left_in_registers else ", 1, 1" if inner_apart else ", 0, 0"
    depth = 32 if element == "e4m3" else 16
    a, flags = f"{{{left}}}" if left_in_registers else left, f"1, 1{outer}"
    return f"""
__device__ __forceinline__ void {name}(float (&d)[{count}], {parameters}, unsigned long long b, bool add) {{
    asm volatile(
        "{{ .reg .pred add; setp.ne.b32 add, %{count + words + 1}, 0;\\n"
        "wgmma.mma_async.sync.aligned.m64n{n}k{depth}.f32.{element}.{element} {{{results}}}, "
        "{a}, %{count + words}, add, {flags}; }}"
        : {outputs} : {inputs}, "l"(b), "r"((int)add));
}}
"""


# tanh.approx errs by 2^-11 of the result: half of a bf16 rounding error, but as much as one of fp16
_TANH = {
    "bf16": 'asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));',
    "f16": "y = 1 - __fdividef(2, 1 + exp2_(2 * LOG2E * x));",
}
_FORMULAS = {
    "gelu": "0.5f * x * (1 + erff(x * 0.7071067811865476f))",
    "gelu_tanh": "x * fmaf(0.5f, tanh_(x * fmaf(0.035677408136300125f, x * x, 0.7978845608028654f)), 0.5f)",
    "quick_gelu": "x * sigmoid(1.702f * x)",
    "silu": "x * sigmoid(x)",
    "relu": "fmaxf(x, 0)",
    "relu2": "fmaxf(x, 0) * fmaxf(x, 0)",
    "sigmoid": "sigmoid(x)",
    "tanh": "tanh_(x)",
    "identity": "x",
}
ACTIVATIONS = tuple(_FORMULAS)


def activation_of(name: str, element: str) -> str:
    """The function `activate` of one number, as `chipmunk_fx.ops.activations` has it by that name."""
    return f"""
__device__ __forceinline__ float tanh_(float x) {{
    float y;
    {_TANH[element]}
    return y;
}}
__device__ __forceinline__ float sigmoid(float x) {{ return fmaf(0.5f, tanh_(0.5f * x), 0.5f); }}
__device__ __forceinline__ float activate(float x) {{ return {_FORMULAS[name]}; }}
"""
