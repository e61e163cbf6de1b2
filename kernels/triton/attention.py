"""The two attention operators: which kernels run, in which order, over how much at a time."""

from collections.abc import Callable

import torch
from torch import Tensor

from chipmunk_fx.kernels.triton.columns import attend_columns
from chipmunk_fx.kernels.triton.launching import inner_contiguous, on_device_of
from chipmunk_fx.kernels.triton.masses import column_masses
from chipmunk_fx.kernels.triton.selection import select
from chipmunk_fx.ops.dense import attend
from chipmunk_fx.ops.groups import left_out
from chipmunk_fx.ops.selection import random_count, spare_places

MASS_BYTES = 1 << 30  # of column masses held at once


def refresh(
    *, q: Tensor, k: Tensor, v: Tensor, order: Tensor | None, always: Tensor | None, valid: Tensor | None, clock: Tensor,
    rest: Tensor, share: Tensor, lists: Tensor, lse: Tensor | None, scale: float, group_rows: int, random_density: float,
    power: float, mass_stride: int, renew: bool, again: bool, ragged: bool, seed: int, site: int, sdpa: str,
    masses_of: Callable[..., Tensor] = column_masses, choose: Callable[..., None] = select,
    over_columns: Callable[..., None] = attend_columns,
) -> Tensor:  # fmt: skip
    """As `chipmunk_fx.ops.attention.attention_refresh`. masses_of, choose, over_columns: called like their defaults."""
    with on_device_of(q):
        q, k, v = (inner_contiguous(x) for x in (q, k, v))
        dense, now = attend(q, k, v, scale, valid, sdpa)
        out = tokens_first(dense)
        now = now.contiguous()
        if renew:
            renew_lists(
                q, k, order, always, valid, clock, lists, lse if again and lse is not None else now,
                scale=scale, group_rows=group_rows, random_density=random_density, mass_stride=mass_stride,
                ragged=ragged, seed=seed, site=site, masses_of=masses_of, choose=choose,
            )  # fmt: skip
        clear_left_out(q, order, rest, share)
        over_columns(
            q, k, v, order, lists, rest, share, out, now,
            scale=scale, group_rows=group_rows, power=power, short=ragged or valid is not None,
        )  # fmt: skip
        if lse is not None:
            lse.copy_(now)
        return out


def renew_lists(
    q: Tensor, k: Tensor, order: Tensor | None, always: Tensor | None, valid: Tensor | None, clock: Tensor, lists: Tensor,
    lse: Tensor, *, scale: float, group_rows: int, random_density: float, mass_stride: int, ragged: bool, seed: int, site: int,
    masses_of: Callable[..., Tensor], choose: Callable[..., None],
) -> None:  # fmt: skip
    """Write the lists of a refresh: from column masses with these logarithms of rows' denominators, or all keys."""
    total, columns = k.shape[2], lists.shape[3]
    if columns == total:
        every = torch.arange(total, dtype=torch.int32, device=q.device)
        if valid is not None:
            every = every.masked_fill(~valid, total).sort(-1).values[:, None, None]
        lists.copy_(every.expand_as(lists))
        return
    drawn = random_count(total, random_density, columns)
    spare = spare_places(always, valid, columns).int() if ragged and always is not None else None
    # where keys are cut to a span its lines lie apart
    always = None if always is None else always.contiguous()
    for heads, groups in _chunks(lists, total):
        masses = masses_of(q, k, order, lse, heads, groups, scale=scale, group_rows=group_rows, stride=mass_stride)
        some = lists.flatten(0, 1)[heads.start : heads.stop, groups.start : groups.stop]
        # a chunk of several heads has all their groups: its lists are neighbours either way
        choose(
            some.view(-1, columns), masses.flatten(0, 1), None, clock, drawn=drawn, seed=seed, site=site,
            first=heads.start * lists.shape[2] + groups.start, always=always, valid=valid, spare=spare,
            rows_a_batch=lists.shape[1] * lists.shape[2],
        )  # fmt: skip


def clear_left_out(q: Tensor, order: Tensor | None, rest: Tensor, share: Tensor) -> None:
    """Zeros in what is kept of rows that the order leaves out, before the others are written."""
    if order is not None and order.shape[0] < q.shape[2]:
        rest.zero_()
        share.zero_()


def sparse(
    *, q: Tensor, k: Tensor, v: Tensor, order: Tensor | None, valid: Tensor | None, rest: Tensor, share: Tensor,
    lists: Tensor, scale: float, group_rows: int, ragged: bool, sdpa: str,
    over_columns: Callable[..., None] = attend_columns,
) -> Tensor:  # fmt: skip
    """As `chipmunk_fx.ops.attention.attention_sparse`. over_columns: called like `attend_columns`."""
    with on_device_of(q):
        q, k, v = (inner_contiguous(x) for x in (q, k, v))
        out = empty_tokens_first(q)
        over_columns(
            q, k, v, order, lists, rest, share, out,
            scale=scale, group_rows=group_rows, short=ragged or valid is not None,
        )  # fmt: skip
        attend_left_out(q, k, v, order, valid, out, scale, sdpa)
        return out


def attend_left_out(
    q: Tensor, k: Tensor, v: Tensor, order: Tensor | None, valid: Tensor | None, out: Tensor, scale: float, sdpa: str
) -> None:
    """Write dense attention of the rows that the order leaves out."""
    if order is not None and order.shape[0] < q.shape[2]:
        rows = left_out(order, q.shape[2])
        out.index_copy_(2, rows, attend(q.index_select(2, rows), k, v, scale, valid, sdpa)[0])


def _chunks(lists: Tensor, keys: int) -> list[tuple[range, range]]:
    """Runs of heads, or of groups of one head, whose column masses fit the space allowed."""
    batch, heads, groups, _ = lists.shape
    lines = max(1, MASS_BYTES // (2 * keys))
    if lines >= groups:
        some = lines // groups
        return [(range(h, min(h + some, batch * heads)), range(groups)) for h in range(0, batch * heads, some)]
    parts = [range(g, min(g + lines, groups)) for g in range(0, groups, lines)]
    return [(range(h, h + 1), part) for h in range(batch * heads) for part in parts]


def tokens_first(x: Tensor) -> Tensor:
    """x [B, H, N, D] over contiguous [B, N, H, D]; itself where it is so already."""
    out = empty_tokens_first(x)
    return x if x.stride() == out.stride() else out.copy_(x)


def empty_tokens_first(q: Tensor) -> Tensor:
    """[B, H, N, D] over contiguous [B, N, H, D]."""
    batch, heads, rows, width = q.shape
    return q.new_empty(batch, rows, heads, width).transpose(1, 2)
