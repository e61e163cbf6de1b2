"""Column masses: the attention that each key receives from the sampled rows of each group.

Keys are the rows of the products, so that the sum over a group's rows runs along a thread's own values. Scores never
leave the registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from chipmunk_fx.kernels.triton import tuning
from chipmunk_fx.kernels.triton.numeric import in_order, multiply_add
from chipmunk_fx.kernels.triton.selection import coded

LOG2E = 1.4426950408889634


def column_masses(
    q: Tensor, k: Tensor, order: Tensor | None, lse: Tensor, heads: range, groups: range, *,
    scale: float, group_rows: int, stride: int,
) -> Tensor:  # fmt: skip
    """uint16 [len(heads), len(groups), M], lines apart: sum over the sampled rows of each group of exp(scale q_i.k_j - lse_i),

    as the codes of selection.coded. Which rows: as `chipmunk_fx.ops.groups.sampled_rows`.

    q [B, H, N, D], k [B, Hk, M, D], order int32 [P] or None, lse fp32 contiguous [B, H, N]; heads: a run of the B * H heads.
    """
    (_, per_batch, rows, width), keys = q.shape, k.shape[2]
    masses = empty(heads, groups, keys, q.device)
    sampled = triton.cdiv(group_rows, stride)
    device = tuning.device_of(q)
    tile = tuning.mass_tile(width, sampled, q.element_size(), device)
    thirds = tuning.in_thirds(sampled)
    slots = min(sampled // 3 if thirds else tuning.padded(sampled, 1), tile.rows)
    at_once = tile.rows // slots
    grouped = rows if order is None else order.shape[0]
    # a program for each run of keys, so many that every multiprocessor has several
    tiles = triton.cdiv(len(groups), at_once)
    blocks = triton.cdiv(keys, tile.columns)
    runs = min(blocks, triton.cdiv(8 * device.units, tiles * len(heads)))
    run = triton.cdiv(blocks, runs) * tile.columns
    _column_masses[(tiles, triton.cdiv(keys, run), len(heads))](
        q, k, order, lse, masses, *q.stride()[:3], *k.stride()[:3],
        per_batch, per_batch // k.shape[1], rows, grouped, keys, masses.shape[2], run,
        heads.start, groups.start, groups.stop, stride, scale * LOG2E,
        WIDTH=width, WIDE=tuning.padded(width), GROUP=group_rows, SAMPLED=sampled, SLOTS=slots, AT_ONCE=at_once,
        COLUMNS=tile.columns, HELD=3 if thirds else 1, **tile.launch,
    )  # fmt: skip
    return masses[..., :keys]


def empty(heads: range, groups: range, keys: int, device: torch.device) -> Tensor:
    """For the codes [len(heads), len(groups), M or a few more]: lines begin at whole vectors."""
    return torch.empty(len(heads), len(groups), triton.cdiv(keys, 16) * 16, dtype=torch.uint16, device=device)


@triton.jit(do_not_specialize=["first_head", "first_group", "last_group"])
def _column_masses(
    q, k, order, lse, masses, q_b, q_h, q_n, k_b, k_h, k_n,
    heads, shared_by, rows, grouped, keys, pitch, run, first_head, first_group, last_group, stride, scale,
    WIDTH: tl.constexpr, WIDE: tl.constexpr, GROUP: tl.constexpr, SAMPLED: tl.constexpr, SLOTS: tl.constexpr,
    AT_ONCE: tl.constexpr, COLUMNS: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    head = first_head + tl.program_id(2)
    b = (head // heads).to(tl.int64)
    h = (head % heads).to(tl.int64)
    q += b * q_b + h * q_h
    k += b * k_b + h // shared_by * k_h
    lse += head.to(tl.int64) * rows
    slot = tl.arange(0, AT_ONCE * SLOTS)
    group = first_group + tl.program_id(0) * AT_ONCE + slot // SLOTS
    d = tl.arange(0, WIDE)
    written = first_group + tl.program_id(0) * AT_ONCE + tl.arange(0, AT_ONCE)
    target = masses + ((tl.program_id(2) * (last_group - first_group)).to(tl.int64) + written - first_group) * pitch

    PASSES: tl.constexpr = (SAMPLED + SLOTS - 1) // SLOTS
    queries, shift = _sample(
        q, order, lse, group, slot % SLOTS, q_n, grouped, last_group, stride, d, WIDTH, GROUP, SAMPLED
    )
    queries = tl.trans(queries)  # here, so that they are laid out for the products once
    if HELD == 3:  # all samples of a group are at hand
        second, second_shift = _sample(
            q, order, lse, group, SLOTS + slot % SLOTS, q_n, grouped, last_group, stride, d, WIDTH, GROUP, SAMPLED
        )
        third, third_shift = _sample(
            q, order, lse, group, 2 * SLOTS + slot % SLOTS, q_n, grouped, last_group, stride, d, WIDTH, GROUP, SAMPLED
        )
        second, third = tl.trans(second), tl.trans(third)
    first = tl.program_id(1) * run
    for at in range(first, tl.minimum(first + run, keys), COLUMNS):
        column = at + tl.arange(0, COLUMNS)
        keys_ = tl.load(
            k + column.to(tl.int64)[:, None] * k_n + d[None, :],
            mask=(column < keys)[:, None] & (d < WIDTH)[None, :], other=0.0,
        )  # fmt: skip
        weights = _weights(keys_, queries, shift, scale)
        if HELD == 3:
            weights += _weights(keys_, second, second_shift, scale)
            weights += _weights(keys_, third, third_shift, scale)
        # a group of more sampled rows than fit takes them in turn
        for part in tl.static_range(HELD, PASSES):
            more, shift_ = _sample(
                q, order, lse, group, part * SLOTS + slot % SLOTS, q_n, grouped, last_group, stride, d,
                WIDTH, GROUP, SAMPLED,
            )  # fmt: skip
            weights += _weights(keys_, tl.trans(more), shift_, scale)
        sums = tl.sum(tl.reshape(weights, [COLUMNS, AT_ONCE, SLOTS]), 2)
        mask = (written < last_group)[:, None] & (column < keys)[None, :]
        tl.store(target[:, None] + column[None, :], tl.trans(coded(sums)), mask=mask)


@triton.jit
def _sample(
    q, order, lse, group, sample, q_n, grouped, last_group, stride, d,
    WIDTH: tl.constexpr, GROUP: tl.constexpr, SAMPLED: tl.constexpr,
):  # fmt: skip
    """The sampled rows [AT_ONCE * SLOTS, WIDE] of q, and their log denominators to base 2, inf where there is no row."""
    row = group * GROUP + tl.minimum(sample * stride + 3 * sample % stride, GROUP - 1)
    live = (sample < SAMPLED) & (row < grouped) & (group < last_group)
    row = in_order(order, row, live)
    queries = tl.load(q + row[:, None] * q_n + d[None, :], mask=live[:, None] & (d < WIDTH)[None, :], other=0.0)
    return queries, tl.load(lse + row, mask=live, other=float("inf")) * 1.4426950408889634


@triton.jit
def _weights(keys, queries, shift, scale):
    """[COLUMNS, AT_ONCE * SLOTS]: softmax weights of the sampled rows."""
    s = multiply_add(keys, queries, tl.zeros([keys.shape[0], queries.shape[1]], tl.float32))
    return tl.exp2(s * scale - shift[None, :])
