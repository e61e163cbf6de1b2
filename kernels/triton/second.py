"""The second product of a column-sparse MLP: the changes of the listed neurons, times their weights, onto the output."""

import triton
import triton.language as tl
from torch import Tensor

from chipmunk_fx.kernels.triton import tuning
from chipmunk_fx.kernels.triton.numeric import cast, in_order, multiply_add


def add_listed(
    change: Tensor, by_neuron: Tensor, order: Tensor | None, lists: Tensor, out: Tensor, result: Tensor, group_rows: int
) -> None:
    """out += change^T by_neuron[lists], result = out.

    change [B, G, K, R], by_neuron [F, C2], order int32 [N] or None, lists int32 [B, G, K], out fp32 and result
    [B, N, C2]; all but by_neuron contiguous.
    """
    batch, groups, columns = lists.shape
    rows, width = out.shape[1:]
    tile = tuning.second_product_tile(group_rows, change.element_size(), tuning.device_of(out))
    grid = (groups * triton.cdiv(group_rows, tile.rows), triton.cdiv(width, tile.columns), batch)
    _add_listed[grid](
        change, by_neuron, order, lists, out, result, by_neuron.stride(0), rows, width, groups, columns,
        GROUP=group_rows, ROWS=tile.rows, WIDTHS=tile.columns, DEPTH=tile.depth, EVEN=columns % tile.depth == 0,
        WHOLE=width % tile.columns == 0, **tile.launch,
    )  # fmt: skip


@triton.jit
def _add_listed(
    change, by_neuron, order, lists, out, result, w_f, rows, width, groups, columns,
    GROUP: tl.constexpr, ROWS: tl.constexpr, WIDTHS: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = (GROUP + ROWS - 1) // ROWS
    group = tl.program_id(0) // TILES
    place = (tl.program_id(0) % TILES) * ROWS + tl.arange(0, ROWS)
    b = tl.program_id(2).to(tl.int64)
    row = group * GROUP + place
    live = (place < GROUP) & (row < rows)
    row = in_order(order, row, live)
    c = tl.program_id(1) * WIDTHS + tl.arange(0, WIDTHS)
    inside = c < width
    at = b * groups + group
    lists += at * columns
    change += at * columns * GROUP
    acc = tl.zeros([ROWS, WIDTHS], tl.float32)
    for first in range(0, columns, DEPTH):
        listed = first + tl.arange(0, DEPTH)
        # [DEPTH, ROWS] changes and [DEPTH, WIDTHS] weights; the tail of a short group holds anything
        if EVEN:
            neuron = tl.load(lists + listed)
            delta = tl.load(change + listed[:, None] * GROUP + place[None, :], mask=live[None, :], other=0.0)
        else:
            present = listed < columns
            neuron = tl.load(lists + listed, mask=present, other=0)
            mask = present[:, None] & live[None, :]
            delta = tl.load(change + listed[:, None] * GROUP + place[None, :], mask=mask, other=0.0)
        pointer = by_neuron + neuron.to(tl.int64)[:, None] * w_f + c[None, :]
        weights = tl.load(pointer) if WHOLE else tl.load(pointer, mask=inside[None, :], other=0.0)
        acc = multiply_add(tl.trans(delta), weights, acc)

    place = (b * rows + row)[:, None] * width + c[None, :]
    mask = live[:, None] & inside[None, :]
    acc += tl.load(out + place, mask=mask, other=0.0)
    tl.store(out + place, acc, mask=mask)
    tl.store(result + place, cast(acc, result.dtype.element_ty), mask=mask)
