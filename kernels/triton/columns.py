"""Attention of groups of rows over the columns that each group lists: the kernel of both phases.

One program takes one tile of the rows of one group, keeps q, the running maximum, sum and result of the online softmax
(arXiv 2205.14135) and lets the listed keys and values pass by, gathered row by row.
"""

import triton
import triton.language as tl
from torch import Tensor

from chipmunk_fx.kernels.triton import tuning
from chipmunk_fx.kernels.triton.numeric import cast, in_order, multiply_add

LOG2E = 1.4426950408889634


def attend_columns(
    q: Tensor, k: Tensor, v: Tensor, order: Tensor | None, lists: Tensor, rest: Tensor, share: Tensor, out: Tensor,
    lse: Tensor | None = None, *, scale: float, group_rows: int, power: float = 0.0, short: bool,
) -> None:  # fmt: skip
    """Without lse: out = rest + share * (softmax over lists). With it: share and rest from out.

    q, out [B, H, N, D], k and v [B, Hk, M, D] of any strides with D next to each other, order int32 [P] or None,
    lists int32 [B, H, G, K], rest [B, H, N, D], share and lse fp32 [B, H, N], all contiguous. Rows that order leaves out
    are not touched. short: lists may hold M, which stands for no column.
    """
    batch, heads, rows, width = q.shape
    groups, columns = lists.shape[2:]
    tile = tuning.attention_tile(width, group_rows, q.element_size(), tuning.device_of(q))
    grid = (groups * triton.cdiv(group_rows, tile.rows), batch * heads)
    _attend_columns[grid](
        q, k, v, order, lists, rest, share, out, lse,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        heads, heads // k.shape[1], rows, rows if order is None else order.shape[0], k.shape[2], groups, columns,
        scale * LOG2E, power,
        WIDTH=width, WIDE=tuning.padded(width), GROUP=group_rows, ROWS=tile.rows, COLUMNS=tile.columns, SHORT=short,
        **tile.launch,
    )  # fmt: skip


@triton.jit
def _attend_columns(
    q, k, v, order, lists, rest, share, out, lse,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_n,
    heads, shared_by, rows, grouped, keys, groups, columns, scale, power,
    WIDTH: tl.constexpr, WIDE: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    SHORT: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = (GROUP + ROWS - 1) // ROWS
    group = tl.program_id(0) // TILES
    head = tl.program_id(1)
    b = (head // heads).to(tl.int64)
    h = (head % heads).to(tl.int64)
    # [ROWS] places in the group, and the rows that they stand for
    place = (tl.program_id(0) % TILES) * ROWS + tl.arange(0, ROWS)
    row = group * GROUP + place
    live = (place < GROUP) & (row < grouped)
    row = in_order(order, row, live)
    d = tl.arange(0, WIDE)
    inside = d[None, :] < WIDTH

    k += b * k_b + h // shared_by * k_h
    v += b * v_b + h // shared_by * v_h
    lists += (head.to(tl.int64) * groups + group) * columns
    queries = tl.load(q + b * q_b + h * q_h + row[:, None] * q_n + d[None, :], mask=live[:, None] & inside, other=0.0)
    top = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, WIDE], tl.float32)
    if SHORT:
        columns = _listed(lists, columns, keys)
    whole = columns // COLUMNS * COLUMNS
    for first in range(0, whole, COLUMNS):
        column = tl.load(lists + first + tl.arange(0, COLUMNS))
        top, total, acc = _pass(
            queries, k, v, column, k_n, v_n, keys, scale, top, total, acc, WIDTH, WIDE, ROWS, COLUMNS, False
        )
    for first in range(whole, columns, COLUMNS):
        place_ = first + tl.arange(0, COLUMNS)
        column = tl.load(lists + place_, mask=place_ < columns, other=keys)
        top, total, acc = _pass(
            queries, k, v, column, k_n, v_n, keys, scale, top, total, acc, WIDTH, WIDE, ROWS, COLUMNS, True
        )
    # a group without any column attends to nothing: 0
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]

    kept = head.to(tl.int64) * rows + row
    mask = live[:, None] & inside
    rest += kept[:, None] * WIDTH + d[None, :]
    out += b * o_b + h * o_h + row[:, None] * o_n + d[None, :]
    if lse is None:
        weight = tl.load(share + kept, mask=live, other=0.0)
        old = tl.load(rest, mask=mask, other=0.0).to(tl.float32)
        tl.store(out, cast(old + weight[:, None] * acc, out.dtype.element_ty), mask=mask)
    else:
        dense = tl.load(lse + kept, mask=live, other=0.0) * 1.4426950408889634
        some = tl.log2(tl.where(total > 0, total, 1.0)) + top * scale
        weight = tl.where(total > 0, tl.minimum(tl.exp2(power * (some - dense)), 1.0), 0.0)
        tl.store(share + kept, weight, mask=live)
        all_ = tl.load(out, mask=mask, other=0.0).to(tl.float32)
        tl.store(rest, cast(all_ - weight[:, None] * acc, rest.dtype.element_ty), mask=mask)


@triton.jit
def _listed(list_, places, keys):
    """How many places of an ascending list hold columns; those behind hold `keys`."""
    low = 0
    high = tl.maximum(places, 0)
    while low < high:
        middle = (low + high) // 2
        found = tl.load(list_ + middle) < keys
        low = tl.where(found, middle + 1, low)
        high = tl.where(found, high, middle)
    return low


@triton.jit
def _pass(
    q, k, v, column, k_n, v_n, keys, scale, top, total, acc,
    WIDTH: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One tile of listed columns: the new maximum (before scaling), sum and result of each row."""
    d = tl.arange(0, WIDE)
    live = column < keys
    place = (tl.where(live, column, 0) if MASKED else column).to(tl.int64)
    keys_ = _gather(k, place * k_n, live, d, WIDTH, WIDE, MASKED)
    values = _gather(v, place * v_n, live, d, WIDTH, WIDE, MASKED)
    s = multiply_add(q, tl.trans(keys_), tl.zeros([ROWS, COLUMNS], tl.float32))
    if MASKED:
        s = tl.where(live[None, :], s, float("-inf"))
    new = tl.maximum(top, tl.max(s, 1))
    p = tl.exp2(s * scale - (new * scale)[:, None])
    fade = tl.exp2((top - new) * scale)
    total = total * fade + tl.sum(p, 1)
    acc = multiply_add(cast(p, values.dtype), values, acc * fade[:, None])
    return new, total, acc


@triton.jit
def _gather(x, offset, live, d, WIDTH: tl.constexpr, WIDE: tl.constexpr, MASKED: tl.constexpr):
    """[COLUMNS, WIDE] rows of x at `offset`, 0 where not live."""
    pointer = x + offset[:, None] + d[None, :]
    if MASKED:
        return tl.load(pointer, mask=live[:, None] & (d[None, :] < WIDTH), other=0.0)
    elif WIDTH != WIDE:
        return tl.load(pointer, mask=d[None, :] < WIDTH, other=0.0)
    else:
        return tl.load(pointer)
