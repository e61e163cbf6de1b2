"""Inside a kernel: products and casts as Triton's interpreter, too, does them right, and rows in the order of groups."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def multiply_add(a, b, acc):
    """acc + a b, in fp32; fp32 operands are not rounded to tf32."""
    if a.dtype == tl.float32:
        # tile by tile, which rounds less than one long chain of sums; a plain addition would be merged into the product
        return tl.fma(tl.dot(a, b, input_precision="ieee"), tl.full(acc.shape, 1, tl.float32), acc)
    if INTERPRETED:  # where bf16 is kept, and multiplied, as its bits
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """x fp32 as `dtype`, to the nearest."""
    if INTERPRETED and dtype == tl.bfloat16:  # which would drop the last bits
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = bits.to(tl.float32, bitcast=True)
    if (
        INTERPRETED and dtype == tl.float8e4nv
    ):  # whose carry into the exponent it would lose; below 2^-6 multiples of 2^-9
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -1048576
        small = ((x * 512 + 12582912) - 12582912) / 512
        x = tl.where(tl.abs(x) < 0.015625, small, tl.where(x == x, bits.to(tl.float32, bitcast=True), x))
    return x.to(dtype)


@triton.jit
def in_order(order, place, live):
    """int64: the rows that stand at `place` of the order of groups (None: they are in it), where `live`."""
    row = place
    if order is not None:
        row = tl.load(order + place, mask=live, other=0)
    return row.to(tl.int64)
