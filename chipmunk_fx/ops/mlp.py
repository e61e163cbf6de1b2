"""Column-sparse MLP in plain PyTorch: the meaning of the two MLP ops, and what a CPU runs.

"Chipmunk: Training-Free Acceleration of Diffusion Transformers with Dynamic Column-Sparse Deltas" (arXiv 2506.03275).
Names: B batch, N rows, C width, F neurons, C2 width of the result, R rows in a group, G groups, K neurons computed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from chipmunk_fx.ops import fp8
from chipmunk_fx.ops.activations import activation as activation_named
from chipmunk_fx.ops.groups import Span, group_count, groups_at_once, put, spans, take
from chipmunk_fx.ops.selection import random_count, select, stream, substream


def mlp_refresh(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    wu: Tensor | None,
    bu: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    order: Tensor | None,
    clock: Tensor,
    hidden: Tensor,
    out: Tensor,
    mean: Tensor,
    lists: Tensor,
    by_neuron: Tensor,
    w1_fp8: Tensor | None,
    scales: Tensor | None,
    change_scale: Tensor | None,
    *,
    activation: str,
    group_rows: int,
) -> Tensor:
    """act(x w1^T + b1) [* (x wu^T + bu)] w2^T + b2, keeping what `mlp_sparse` builds on.

    hidden = the activations, neuron by neuron within a group; out = the result; mean = first product of each group's
    mean row; lists = the first K neurons (a sparse step that does not renew them stays defined); by_neuron = w2^T.
    Where the last three are given, `mlp_sparse` makes its products in fp8: w1_fp8 = w1 and wu, by_neuron = w2^T in it.
    Weights are written whatever clock[1] is; backends may keep those that are as before where it is 0.

    Arguments as in kernels/README.md. Returns out in x's dtype, [..., C2]; writes all from hidden on.
    """
    first = FirstProduct(w1, b1, wu, bu, activation_named(activation))
    positions = None if order is None else order.long()
    lists.copy_(torch.arange(lists.shape[-1], device=lists.device).expand_as(lists))
    largest = None
    if w1_fp8 is None or scales is None:
        by_neuron.copy_(w2.mT)
    else:
        fp8.store_weights(w1, wu, w2, w1_fp8, by_neuron, scales)
        largest = scales.new_zeros(())
    at_once = groups_at_once(x.device, group_rows * w1.shape[0] * x.element_size())
    for b, rows in enumerate(_batches(x, positions)):
        mean[b] = first.pooled(group_means(rows, group_rows))
        for span in spans(rows.shape[0], group_rows, at_once):
            values = first.dense(take(rows, None, span))
            if largest is not None:
                largest = torch.maximum(largest, values.abs().amax())
            hidden[b, span.groups, :, : span.height] = values.mT
            put(out[b], positions, span, F.linear(values, w2, b2))
    if change_scale is not None and largest is not None:
        change_scale.copy_(fp8.scale_of_changes(largest))
    return _result(x, out)


def mlp_sparse(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    wu: Tensor | None,
    bu: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    order: Tensor | None,
    clock: Tensor,
    hidden: Tensor,
    out: Tensor,
    mean: Tensor,
    lists: Tensor,
    by_neuron: Tensor,
    w1_fp8: Tensor | None,
    scales: Tensor | None,
    change_scale: Tensor | None,
    *,
    activation: str,
    group_rows: int,
    random_density: float,
    seed: int,
    site: int,
) -> Tensor:
    """Bring `out` up to date for the neurons whose group means changed most since they were last computed.

    where clock[1] is not 0:
        mean' = first product of each group's mean row
        lists = the neurons of the largest |mean' - mean|, then random ones; mean of these takes its new value
    hidden' = act(...) of the listed neurons
    out   += (hidden' - hidden) by_neuron[list];  hidden of the listed neurons takes its new values
    With all neurons listed that is a refresh. Where the last three are given, both products are made in fp8.

    Arguments as in kernels/README.md. Returns out in x's dtype, [..., C2]; writes hidden, out, mean and lists.
    """
    if lists.shape[-1] == w1.shape[0]:
        # nothing to leave out, and adding to `out` step by step would only gather rounding errors
        kept = (clock, hidden, out, mean, lists, by_neuron, w1_fp8, scales, change_scale)
        return mlp_refresh(x, w1, b1, wu, bu, w2, b2, order, *kept, activation=activation, group_rows=group_rows)
    first = FirstProduct(w1, b1, wu, bu, activation_named(activation), w1_fp8, scales)
    positions = None if order is None else order.long()
    key = stream(seed, site, clock[0])
    drawn = random_count(w1.shape[0], random_density, lists.shape[-1])
    widest = max(w1.shape[1], w2.shape[0])  # the two products gather one after the other
    item = x.element_size() if w1_fp8 is None else 4
    at_once = groups_at_once(x.device, lists.shape[-1] * widest * item)
    for b, rows in enumerate(_batches(x, positions)):
        renew(lists[b], mean[b], clock[1], lambda rows=rows: first.pooled(group_means(rows, group_rows)), drawn,
              substream(key, b))  # fmt: skip
        chosen = lists[b].long()
        for span in spans(rows.shape[0], group_rows, at_once):
            some = chosen[span.groups]
            change = exchange(hidden[b], span, some, first.sparse(take(rows, None, span), some))
            if scales is None or change_scale is None:
                weights = by_neuron.index_select(0, some.reshape(-1)).view(*some.shape, -1)
                _add(out[b], positions, span, torch.bmm(change.mT, weights))
            else:
                _add(out[b], positions, span, fp8.added(change, by_neuron, scales[-1], change_scale, some))
    return _result(x, out)


@dataclass(frozen=True)
class FirstProduct:
    """x -> act(x w1^T + b1), times x wu^T + bu where there is an up branch. w1, wu [F, C], b1, bu [F].

    w1_fp8 [P, F, C], scales [P]: w1 (and wu) in fp8, where the neurons chosen are to be computed so.
    """

    w1: Tensor
    b1: Tensor | None
    wu: Tensor | None
    bu: Tensor | None
    act: Callable[[Tensor], Tensor]
    w1_fp8: Tensor | None = None
    scales: Tensor | None = None

    def dense(self, rows: Tensor) -> Tensor:
        """Every neuron: [..., C] -> [..., F]."""
        values = self.act(F.linear(rows, self.w1, self.b1))
        return values if self.wu is None else values * F.linear(rows, self.wu, self.bu)

    def pooled(self, rows: Tensor) -> Tensor:
        """What tells how far a neuron has moved, fp32 [G, F]: without an up branch the value before the activation.

        Nothing is rounded to a narrow dtype: from one step to the next means move by little more than that would.
        """
        accurate = torch.promote_types(self.w1.dtype, torch.float32)
        w1, b1, wu, bu = (t if t is None else t.to(accurate) for t in (self.w1, self.b1, self.wu, self.bu))
        values = F.linear(rows.to(accurate), w1, b1)  # pyright: ignore[reportArgumentType]
        return (values if wu is None else self.act(values) * F.linear(rows.to(accurate), wu, bu)).float()

    def sparse(self, rows: Tensor, chosen: Tensor) -> Tensor:
        """The neurons chosen [g, K] of rows [g, R, C], neuron by neuron: [g, K, R]."""
        values = self.act(self._product(0, self.w1, self.b1, rows, chosen))
        return values if self.wu is None else values.mul_(self._product(1, self.wu, self.bu, rows, chosen))

    def _product(self, part: int, weight: Tensor, bias: Tensor | None, rows: Tensor, chosen: Tensor) -> Tensor:
        if self.w1_fp8 is None or self.scales is None:
            return _product(weight, bias, rows, chosen)
        return fp8.product(self.w1_fp8[part], self.scales[part], bias, rows, chosen)


def _product(weight: Tensor, bias: Tensor | None, rows: Tensor, chosen: Tensor) -> Tensor:
    flat = chosen.reshape(-1)
    gathered = weight.index_select(0, flat).view(*chosen.shape, -1)
    if bias is None:
        return torch.bmm(gathered, rows.mT)
    return torch.baddbmm(bias.index_select(0, flat).view(*chosen.shape, 1), gathered, rows.mT)


def group_means(rows: Tensor, group_rows: int) -> Tensor:
    """fp32 [G, C]: the mean row of each group of rows [N, C] in group order."""
    parts = spans(rows.shape[0], group_rows, group_count(rows.shape[0], group_rows))
    return torch.cat([take(rows, None, span).mean(1, dtype=torch.float32) for span in parts])


def renew(lists: Tensor, mean: Tensor, wanted: Tensor, means: Callable[[], Tensor], drawn: int, key: Tensor) -> None:
    """New lists [G, K] by how far means() [G, F] are from mean, and mean of the listed, where `wanted` (0-d) is not 0.

    On an accelerator nothing is read back.
    """
    on_host = wanted.device.type == "cpu"
    if on_host and not wanted.item():
        return
    moved = means()
    new = select((moved - mean).abs_(), lists.shape[-1], drawn, key)
    lists.copy_(new if on_host else torch.where(wanted != 0, new, lists))
    chosen = lists.long()
    fresh = moved.gather(1, chosen)
    mean.scatter_(1, chosen, fresh if on_host else torch.where(wanted != 0, fresh, mean.gather(1, chosen)))


def exchange(hidden: Tensor, span: Span, chosen: Tensor, values: Tensor) -> Tensor:
    """Store values [g, K, height] of the chosen neurons in hidden [G, F, R]; returns how much they changed."""
    groups, neurons, _ = hidden.shape
    base = torch.arange(span.first, span.first + span.count, device=hidden.device) * neurons
    index = (chosen + base.unsqueeze(1)).reshape(-1)
    stored = hidden.view(groups * neurons, -1)[:, : span.height]
    change = values - stored.index_select(0, index).view_as(values)
    stored.index_copy_(0, index, values.flatten(0, 1))
    return change


def _batches(x: Tensor, positions: Tensor | None) -> Iterator[Tensor]:
    """x [..., C] as [N, C] for each batch entry, in group order; two dimensions are one entry."""
    batches = x.flatten(1, -2) if x.ndim > 2 else x.unsqueeze(0)
    return (rows if positions is None else rows.index_select(0, positions) for rows in batches)


def _add(out: Tensor, positions: Tensor | None, span: Span, rows: Tensor) -> None:
    rows = rows.flatten(0, 1)
    if positions is None:
        out[span.rows] += rows
    else:
        out.index_add_(0, positions[span.rows], rows.to(out.dtype))


def _result(x: Tensor, out: Tensor) -> Tensor:
    return out.to(x.dtype, copy=True).view(*x.shape[:-1], out.shape[-1])
