"""Rows of x as the products of a sparse MLP step want them: in the order of groups, blocks as they lie in shared memory."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from chipmunk_fx.kernels.hopper.tuning import SPAN, block_rows
from chipmunk_fx.kernels.triton.fp8 import in_fp8
from chipmunk_fx.kernels.triton.numeric import cast, in_order
from chipmunk_fx.ops.fp8 import DTYPE, LARGEST


@dataclass(frozen=True)
class Rows:
    """Rows of x, of a group in blocks of `block_rows`.

    values: [B G, blocks, steps, rows, SPAN bytes], in x's dtype or e4m3; pieces of 16 bytes of a line stand in the order of
    wgmma's swizzle over SPAN bytes. Rows that a last group lacks are left as they are. scales: fp32 [B, N] in the order of
    groups, what values of e4m3 are multiplied by.
    """

    values: Tensor
    scales: Tensor | None


def pool(x: Tensor, order: Tensor | None, group_rows: int, fp8: bool) -> tuple[Tensor, Rows]:
    """The mean row of each group, [B, G, C] in x's dtype, and the rows; of x [B, N, C], whose rows may lie apart.

    order: int32 [N] or None. fp8: each row over its scale, its largest magnitude over 448 (1 where that is 0), in e4m3.
    """
    batch, rows, width = x.shape
    groups, block = triton.cdiv(rows, group_rows), block_rows(group_rows)
    dtype = DTYPE if fp8 else x.dtype
    shape = (batch * groups, group_rows // block, width * dtype.itemsize // SPAN, block, SPAN // dtype.itemsize)
    values = torch.empty(shape, dtype=dtype, device=x.device)
    means = torch.empty(batch, groups, width, dtype=x.dtype, device=x.device)
    largest = torch.zeros(batch, rows, dtype=torch.float32, device=x.device) if fp8 else None
    _pool[(width // 64, groups, batch)](
        x, order, means, largest, values, *x.stride()[:2], rows, width, groups,
        GROUP=group_rows, BLOCK=block, ROWS=32, PIECES=SPAN // 16, num_warps=2,
    )  # fmt: skip
    if not fp8:
        return means, Rows(values, None)
    scales = torch.empty_like(largest)
    _quantise[(triton.cdiv(rows, 16), 4, batch)](
        x, order, largest, scales, values, *x.stride()[:2], rows, values.shape[2], groups * group_rows,
        LARGEST=LARGEST, BLOCK=block, ROWS=16, PIECES=SPAN // 16,
    )  # fmt: skip
    return means, Rows(values, scales)


@triton.jit
def _pool(
    x, order, means, largest, values, x_b, x_n, rows, width, groups,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """64 columns of a group: their means, and either the values packed or their share in the largest of each row."""
    group = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    piece = tl.arange(0, 8)
    column = tl.program_id(0) * 64 + (piece * 8)[:, None] + tl.arange(0, 8)[None, :]
    height = tl.minimum(GROUP, rows - group * GROUP)
    packed = values + (b * groups + group) * GROUP * width
    sums = tl.zeros([ROWS, 8, 8], tl.float32)
    for first in range(0, height, ROWS):
        place = first + tl.arange(0, ROWS)
        live = place < height
        row = in_order(order, group * GROUP + place, live)
        some = tl.load(x + b * x_b + row[:, None, None] * x_n + column[None], mask=live[:, None, None], other=0.0)
        sums += some.to(tl.float32)
        if largest is None:
            step = tl.program_id(0) * (8 // PIECES) + piece // PIECES
            target = packed + _target(place, step, piece % PIECES, width // (8 * PIECES), BLOCK, PIECES, 8)
            tl.store(target, some, mask=live[:, None, None])
        else:
            # of magnitudes the bits order as they do; a NaN's are above all
            bits = (some.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF).to(tl.int32)
            most = tl.max(tl.max(bits, 2), 1)
            at = (largest + b * rows + group * GROUP + place).to(tl.pointer_type(tl.int32), bitcast=True)
            tl.atomic_max(at, most, mask=live, sem="relaxed")
    mean = tl.sum(sums, 0) / height
    tl.store(means + (b * groups + group) * width + column, cast(mean, means.dtype.element_ty))


@triton.jit
def _quantise(
    x, order, largest, scales, values, x_b, x_n, rows, steps, places,
    LARGEST: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """A quarter of the columns of ROWS rows."""
    b = tl.program_id(2).to(tl.int64)
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = place < rows
    row = in_order(order, place, live)
    most = tl.load(largest + b * rows + place, mask=live, other=0.0)
    scale = most * (1 / LARGEST)
    scale = tl.where(scale == 0, 1.0, scale)
    if tl.program_id(1) == 0:
        tl.store(scales + b * rows + place, scale, mask=live)
    piece = tl.arange(0, PIECES)
    inner = (piece * 16)[:, None] + tl.arange(0, 16)[None, :]
    packed = values + b * places * steps * (PIECES * 16)
    for step in range(tl.program_id(1), steps, tl.num_programs(1)):
        source = x + b * x_b + row[:, None, None] * x_n + step * (PIECES * 16) + inner[None]
        some = tl.load(source, mask=live[:, None, None], other=0.0).to(tl.float32)
        target = packed + _target(place, step + piece * 0, piece, steps, BLOCK, PIECES, 16)
        tl.store(target, in_fp8(some, scale[:, None, None], values.dtype.element_ty, LARGEST), mask=live[:, None, None])


@triton.jit
def _target(place, step, piece, steps, BLOCK: tl.constexpr, PIECES: tl.constexpr, VALUES: tl.constexpr):
    """[places, pieces, VALUES]: where pieces [pieces] of steps [pieces] of the rows at `place` [places] lie."""
    line = place % BLOCK
    start = (place // BLOCK).to(tl.int64) * steps * (BLOCK * PIECES * VALUES) + line * (PIECES * VALUES)
    swizzled = piece[None, :] ^ (line // (8 // PIECES) % PIECES)[:, None]
    there = start[:, None] + step[None, :] * (BLOCK * PIECES * VALUES) + swizzled * VALUES
    return there[:, :, None] + tl.arange(0, VALUES)[None, None, :]
