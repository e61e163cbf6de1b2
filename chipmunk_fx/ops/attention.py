"""Column-sparse attention in plain PyTorch: the meaning of the two attention ops, and what a CPU runs.

"Chipmunk: Training-Free Acceleration of Diffusion Transformers with Dynamic Column-Sparse Deltas" (arXiv 2506.03275);
the weight `share` and the sampled masses are this project's. Names: B batch, H heads, N rows, M keys, D head width,
P rows that the groups cover, R rows in a group, G groups, K columns that a group computes. Keys may have
fewer heads than queries.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from chipmunk_fx.ops.dense import attend
from chipmunk_fx.ops.groups import Span, group_count, groups_at_once, left_out, put, sampled_rows, spans, take
from chipmunk_fx.ops.selection import random_count, select, spare_places, stream, substream


def attention_refresh(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    order: Tensor | None,
    always: Tensor | None,
    valid: Tensor | None,
    clock: Tensor,
    rest: Tensor,
    share: Tensor,
    lists: Tensor,
    lse: Tensor | None,
    *,
    scale: float,
    group_rows: int,
    random_density: float,
    power: float,
    mass_stride: int,
    renew: bool,
    again: bool,
    ragged: bool,
    seed: int,
    site: int,
    sdpa: str,
) -> Tensor:
    """Dense attention, and everything that `attention_sparse` needs on later steps.

    o, lse   = softmax(scale q k^T) v over all valid keys, with its log denominators
    m[g, j]  = sum over the rows i of group g that are sampled, one in mass_stride, of exp(scale q_i.k_j - lse_i);
               `again`, where `lse` is kept: with that of the refresh before
    lists[g] = the `always` columns and those of the largest m, then ceil(random_density M) random ones; `ragged`: a group
               with fewer `always` columns than another has as many places less, and M in the last ones
    share    = exp(power (lse over lists - lse)), at most 1
    rest     = o - share * (softmax over lists)

    Without `renew` the lists stay as they are, and no masses are taken.
    Arguments as in kernels/README.md. Returns o, [B, H, N, D]; writes rest, share, lse and, with `renew`, lists.
    """
    total, columns = k.shape[2], lists.shape[-1]
    key = stream(seed, site, clock[0])
    drawn = random_count(total, random_density, columns)
    positions = _positions(q, order, rest, share)
    spare = spare_places(always, valid, lists.shape[-1]) if ragged and always is not None else None
    out, now = attend(q, k, v, scale, valid, sdpa)
    out = _tokens_first(out)
    weighed_by = lse if again and lse is not None else now
    for index, (b, h) in enumerate(product(range(q.shape[0]), range(q.shape[1]))):
        head = _head(q, k, v, valid, b, h, positions, scale, group_rows, ragged)
        if renew:
            # with every column computed the masses decide nothing
            masses = (
                head.masses(weighed_by[b, h], mass_stride) if columns < total else now.new_zeros(lists.shape[2], total)
            )
            less = None if spare is None else spare[b % len(spare)]
            lists[b, h] = select(masses, columns, drawn, substream(key, index), always, head.valid, less)
        for span in head.spans(columns):
            part, part_lse = head.selected(lists[b, h], span)
            weight = (part_lse - take(now[b, h], positions, span)).mul_(power).exp_().nan_to_num_(0).clamp_(max=1)
            part = part.float().mul_(weight.unsqueeze(-1))
            put(share[b, h], positions, span, weight)
            put(rest[b, h], positions, span, take(out[b, h], positions, span) - part)
    if lse is not None:
        lse.copy_(now)
    return out


def attention_sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    order: Tensor | None,
    valid: Tensor | None,
    rest: Tensor,
    share: Tensor,
    lists: Tensor,
    *,
    scale: float,
    group_rows: int,
    ragged: bool,
    sdpa: str,
) -> Tensor:
    """o[row] = rest[row] + share[row] * softmax(scale q_row k[list]^T) v[list]; rows that `order` omits are dense.

    Arguments as in kernels/README.md. Returns o, [B, H, N, D]; writes nothing else.
    """
    out = _empty_tokens_first(q)
    positions = None if order is None else order.long()
    for b, h in product(range(q.shape[0]), range(q.shape[1])):
        head = _head(q, k, v, valid, b, h, positions, scale, group_rows, ragged)
        for span in head.spans(lists.shape[-1]):
            part, _ = head.selected(lists[b, h], span)
            weight = take(share[b, h], positions, span).unsqueeze(-1)
            put(out[b, h], positions, span, part.float().mul_(weight).add_(take(rest[b, h], positions, span)))
    if order is not None and order.shape[0] < q.shape[2]:
        rows = left_out(order, q.shape[2])
        out.index_copy_(2, rows, attend(q.index_select(2, rows), k, v, scale, valid, sdpa)[0])
    return out


def attention_dense(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, *, scale: float, sdpa: str) -> Tensor:
    """softmax(scale q k^T) v over the valid keys. Arguments as in kernels/README.md; returns o, [B, H, N, D]."""
    return _tokens_first(attend(q, k, v, scale, valid, sdpa)[0])


@dataclass(frozen=True)
class Head:
    """One head of one batch entry: q [N, D], k and v [M, D], valid bool [M] or None for all keys.

    positions: int64 [P] or None for all rows as they come. short: lists may hold M, which stands for no column.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    valid: Tensor | None
    positions: Tensor | None
    scale: float
    group_rows: int
    short: bool

    def spans(self, columns: int) -> Iterator[Span]:
        """Spans whose gathered keys and values stay in cache."""
        return self._spans(2 * columns * self.k.shape[1] * self.k.element_size())

    def selected(self, lists: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        """Attention of a span's rows over the columns of their groups: [count, height, D], fp32 [count, height]."""
        some = lists[span.groups]
        total = self.k.shape[0]
        columns = (some.clamp(max=total - 1) if self.short else some).reshape(-1)
        keys, values = (x.index_select(0, columns).view(*some.shape, -1).unsqueeze(1) for x in (self.k, self.v))
        present = some < total if self.short else None
        out, lse = attend(take(self.q, self.positions, span).unsqueeze(1), keys, values, self.scale, present)
        return out.squeeze(1), lse.squeeze(1)

    def masses(self, lse: Tensor, stride: int) -> Tensor:
        """fp32 [G, M]: the share of attention that each key receives from the sampled rows of a group. lse: [N]."""
        sampled, total = math.ceil(self.group_rows / stride), self.k.shape[0]
        bytes_a_group = sampled * total  # scores pass through once: four times the space of gathered operands will do
        held = min(groups_at_once(self.q.device, bytes_a_group), self.groups) * sampled
        products = self.q.new_empty(held, total)
        scores = products if products.dtype == torch.float32 else lse.new_empty(held, total)
        masses = lse.new_empty(self.groups, total)
        for span in self._spans(bytes_a_group):
            samples = sampled_rows(self.group_rows, stride, span.height, self.q.device)
            rows = take(self.q, self.positions, span).index_select(1, samples)
            shift = take(lse, self.positions, span).index_select(1, samples).reshape(-1, 1).neg()
            count = shift.shape[0]
            torch.mm(rows.reshape(count, -1), self.k.mT, out=products[:count])
            if scores is not products:
                scores[:count].copy_(products[:count])
            shares = torch.add(shift, scores[:count], alpha=self.scale, out=scores[:count]).exp_()
            torch.sum(shares.view(span.count, -1, total), 1, out=masses[span.groups])
        return masses  # of keys that are not valid too: selection passes over them

    @property
    def rows(self) -> int:
        return self.q.shape[0] if self.positions is None else self.positions.shape[0]

    @property
    def groups(self) -> int:
        return group_count(self.rows, self.group_rows)

    def _spans(self, bytes_a_group: int) -> Iterator[Span]:
        return spans(self.rows, self.group_rows, groups_at_once(self.q.device, bytes_a_group))


def _head(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    b: int,
    h: int,
    positions: Tensor | None,
    scale: float,
    rows: int,
    ragged: bool,
) -> Head:
    group, short = h // (q.shape[1] // k.shape[1]), ragged or valid is not None
    return Head(q[b, h], k[b, group], v[b, group], None if valid is None else valid[b], positions, scale, rows, short)


def _positions(q: Tensor, order: Tensor | None, rest: Tensor, share: Tensor) -> Tensor | None:
    """`order` as an index; what is cached of rows that it omits, dense on every step, becomes zero."""
    if order is None:
        return None
    if order.shape[0] < q.shape[2]:
        rest.zero_()
        share.zero_()
    return order.long()


def _empty_tokens_first(q: Tensor) -> Tensor:
    """[B, H, N, D] over contiguous [B, N, H, D], so that the transpose and reshape after attention are free."""
    batch, heads, rows, width = q.shape
    return q.new_empty(batch, rows, heads, width).transpose(1, 2)


def _tokens_first(x: Tensor) -> Tensor:
    out = _empty_tokens_first(x)
    return x if x.stride() == out.stride() else out.copy_(x)
