"""The first product of a column-sparse MLP for the neurons that each group lists, and what it changes.

Neurons are the rows of the products, so that results lie as the cache keeps them: neuron by neuron, the rows of a group
next to each other. The epilogue adds the bias, applies the activation, exchanges the cached value for the new one and
leaves the difference for the second product.
"""

import triton
import triton.language as tl
from torch import Tensor

from chipmunk_fx.kernels.triton import tuning
from chipmunk_fx.kernels.triton.activations import activate
from chipmunk_fx.kernels.triton.numeric import cast, multiply_add


def exchange_listed(
    x: Tensor, w1: Tensor, b1: Tensor | None, wu: Tensor | None, bu: Tensor | None, order: Tensor | None, hidden: Tensor,
    lists: Tensor, mean: Tensor, means: Tensor, change: Tensor, *, activation: str, group_rows: int,
) -> None:  # fmt: skip
    """hidden and mean of the listed neurons take their new values; change = how much hidden changed.

    x [B, N, C], w1, wu [F, C], b1, bu [F], order int32 [N] or None, hidden [B, G, F, R], lists int32 [B, G, K],
    mean, means fp32 [B, G, F], change [B, G, K, R]; caches and change contiguous.
    """
    batch, rows, width = x.shape
    groups, columns = lists.shape[1:]
    tile = tuning.first_product_tile(group_rows, wu is not None, x.element_size(), tuning.device_of(x))
    tiles = triton.cdiv(group_rows, tile.rows)
    # groups first: neighbouring programs read neighbouring weights, since all lists ascend
    grid = (groups * tiles, triton.cdiv(columns, tile.columns), batch)
    _exchange_listed[grid](
        x, w1, b1, wu, bu, order, hidden, lists, mean, means, change,
        *x.stride()[:2], w1.stride(0), 0 if wu is None else wu.stride(0),
        rows, width, w1.shape[0], groups, columns, ACTIVATION=activation, GROUP=group_rows, ROWS=tile.rows,
        NEURONS=tile.columns, DEPTH=tile.depth, EVEN=width % tile.depth == 0, **tile.launch,
    )  # fmt: skip


@triton.jit
def _exchange_listed(
    x, w1, b1, wu, bu, order, hidden, lists, mean, means, change, x_b, x_n, w1_f, wu_f,
    rows, width, neurons, groups, columns,
    ACTIVATION: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, NEURONS: tl.constexpr, DEPTH: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = (GROUP + ROWS - 1) // ROWS
    group = tl.program_id(0) // TILES
    part = tl.program_id(0) % TILES
    b = tl.program_id(2).to(tl.int64)
    place = part * ROWS + tl.arange(0, ROWS)
    row = group * GROUP + place
    live = (place < GROUP) & (row < rows)
    row = tl.where(live, row, 0)
    if order is not None:
        row = tl.load(order + row)
    listed = tl.program_id(1) * NEURONS + tl.arange(0, NEURONS)
    present = listed < columns
    at = b * groups + group
    neuron = tl.load(lists + at * columns + listed, mask=present, other=0).to(tl.int64)

    c = tl.arange(0, DEPTH)
    lines = x + b * x_b + row.to(tl.int64)[:, None] * x_n + c[None, :]
    h = activate(linear(lines, w1, b1, w1_f, neuron, c, width, ROWS, NEURONS, DEPTH, EVEN), ACTIVATION)
    if wu is not None:
        h *= linear(lines, wu, bu, wu_f, neuron, c, width, ROWS, NEURONS, DEPTH, EVEN)

    mask = present[:, None] & live[None, :]
    cached = hidden + (at * neurons + neuron)[:, None] * GROUP + place[None, :]
    old = tl.load(cached, mask=mask, other=0.0).to(tl.float32)
    new = cast(h, hidden.dtype.element_ty)
    tl.store(cached, new, mask=mask)
    delta = cast(new.to(tl.float32) - old, change.dtype.element_ty)
    tl.store(change + (at * columns + listed)[:, None] * GROUP + place[None, :], delta, mask=mask)
    if part == 0:
        fresh = tl.load(means + at * neurons + neuron, mask=present)
        tl.store(mean + at * neurons + neuron, fresh, mask=present)


@triton.jit
def linear(
    lines, weight, bias, pitch, neuron, c, width,
    ROWS: tl.constexpr, NEURONS: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """[NEURONS, ROWS]: weight[neuron] times lines [ROWS, width] + bias; lines point to the first DEPTH values, at c, of each."""
    weights = weight + neuron[:, None] * pitch + c[None, :]
    acc = tl.zeros([NEURONS, ROWS], tl.float32)
    for first in range(0, width, DEPTH):
        if EVEN:
            a = tl.load(weights + first)
            y = tl.load(lines + first)
        else:
            a = tl.load(weights + first, mask=(first + c < width)[None, :], other=0.0)
            y = tl.load(lines + first, mask=(first + c < width)[None, :], other=0.0)
        acc = multiply_add(a, tl.trans(y), acc)
    if bias is not None:
        acc += tl.load(bias + neuron)[:, None].to(tl.float32)
    return acc
