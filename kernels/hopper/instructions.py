"""The part of the kernel's source that depends on its settings: sizes, conversions and wgmma instructions."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """What a kernel is compiled for. element: "bf16" or "f16"; the rest as at the top of columns.cu."""

    element: str
    width: int
    consumers: int
    columns: int
    buffers: int

    @property
    def rows(self) -> int:
        """Of a group, that one thread block works on at once."""
        return 64 * self.consumers

    @property
    def threads(self) -> int:
        return 128 * (self.consumers + 1)

    @property
    def shared(self) -> int:
        """Bytes of shared memory."""
        return 2 * self.width * (self.rows + self.buffers * self.columns) + 16 * (self.buffers + self.consumers)


def preamble(settings: Settings) -> str:
    """CUDA C++ that comes before all else."""
    element, width, columns = settings.element, settings.width, settings.columns
    sizes = ("width", "consumers", "columns", "buffers")
    return "\n".join(
        [
            *(f"constexpr int {name.upper()} = {getattr(settings, name)};" for name in sizes),
            _PACK.replace("ELEMENT", element),
            _UNPACK[element],
            _multiply("multiply_keys", element, columns, left_in_registers=False),
            _multiply("multiply_values", element, width, left_in_registers=True),
        ]
    )


# pack: two fp32 to the nearest, x in the low half; low and high: back. volatile, or packing moves ahead of a wait for
# products that still read the registers it packs into.
_PACK = """
__device__ __forceinline__ unsigned int pack(float x, float y) {
    unsigned int z;
    asm volatile("cvt.rn.ELEMENTx2.f32 %0, %1, %2;" : "=r"(z) : "f"(y), "f"(x));
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


def _multiply(name: str, element: str, n: int, *, left_in_registers: bool) -> str:
    """d [64, n] = a b, or d + a b where `add`: 16 long, d in the registers of a warpgroup, b in shared memory.

    a in shared memory too: b is [n, 16]. a in registers, as four words of each thread: b is [16, n].
    """
    count, words = n // 2, 4 if left_in_registers else 1
    results = ", ".join(f"%{i}" for i in range(count))
    left = ", ".join(f"%{count + i}" for i in range(words))
    kind, letter = ("unsigned int", "r") if left_in_registers else ("unsigned long long", "l")
    parameters = ", ".join(f"{kind} a{i}" for i in range(words))
    inputs = ", ".join(f'"{letter}"(a{i})' for i in range(words))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    # signs of a and b, then which of them run along the product's outer dimension first
    a, flags = (f"{{{left}}}", "1, 1, 1") if left_in_registers else (left, "1, 1, 0, 0")
    return f"""
__device__ __forceinline__ void {name}(float (&d)[{count}], {parameters}, unsigned long long b, bool add) {{
    asm volatile(
        "{{ .reg .pred add; setp.ne.b32 add, %{count + words + 1}, 0;\\n"
        "wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{element}.{element} {{{results}}}, "
        "{a}, %{count + words}, add, {flags}; }}"
        : {outputs} : {inputs}, "l"(b), "r"((int)add));
}}
"""
