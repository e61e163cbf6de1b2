"""The two MLP operators: which kernels run, in which order, over how much at a time."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from chipmunk_fx.kernels.triton.first import exchange_listed
from chipmunk_fx.kernels.triton.fp8 import store_scales
from chipmunk_fx.kernels.triton.launching import inner_contiguous, on_device_of
from chipmunk_fx.kernels.triton.means import first_product
from chipmunk_fx.kernels.triton.pooling import group_means, store_activations
from chipmunk_fx.kernels.triton.second import add_listed
from chipmunk_fx.kernels.triton.selection import select
from chipmunk_fx.kernels.triton.weights import store_weights
from chipmunk_fx.ops.selection import random_count


def refresh(
    *, x: Tensor, w1: Tensor, b1: Tensor | None, wu: Tensor | None, bu: Tensor | None, w2: Tensor, b2: Tensor | None,
    order: Tensor | None, clock: Tensor, hidden: Tensor, out: Tensor, mean: Tensor, lists: Tensor,
    by_neuron: Tensor, w1_fp8: Tensor | None, scales: Tensor | None, change_scale: Tensor | None, activation: str,
    group_rows: int,
) -> Tensor:  # fmt: skip
    """As `chipmunk_fx.ops.mlp.mlp_refresh`: dense products by the vendor's library, on rows in their own order."""
    with on_device_of(x):
        rows = inner_contiguous(_batches(x))
        most = largest = None
        if scales is not None:  # of weights, and of hidden values
            most, largest = scales.new_zeros(len(scales) + 1).split([len(scales), 1])
        store_weights(w1, wu, w2, w1_fp8, by_neuron, scales, most, clock)
        results = []
        for entry, *kept in zip(rows, hidden, mean, lists, strict=True):
            h = F.linear(entry, w1, b1)
            up = None if wu is None else F.linear(entry, wu, bu)
            store_activations(h, up, *kept, order, activation=activation, group_rows=group_rows, most=largest)
            results.append(F.linear(h, w2, b2))
        if change_scale is not None and largest is not None:
            store_scales(largest, change_scale, room=2)  # as `scale_of_changes`
        result = results[0].unsqueeze(0) if len(results) == 1 else torch.stack(results)
        out.copy_(result)
        return result.view(*x.shape[:-1], out.shape[-1])


def sparse(
    *, x: Tensor, w1: Tensor, b1: Tensor | None, wu: Tensor | None, bu: Tensor | None, w2: Tensor, b2: Tensor | None,
    order: Tensor | None, clock: Tensor, hidden: Tensor, out: Tensor, mean: Tensor, lists: Tensor,
    by_neuron: Tensor, w1_fp8: Tensor | None, scales: Tensor | None, change_scale: Tensor | None, activation: str,
    group_rows: int, random_density: float, seed: int, site: int,
    steps: tuple[Callable[..., tuple[Tensor, Any]], Callable[..., None], Callable[..., None]] | None = None,
) -> Tensor:  # fmt: skip
    """As `chipmunk_fx.ops.mlp.mlp_sparse`. steps: called in place of `pool`, `choose` and `products`."""
    pooling, choosing, multiplying = steps or (pool, choose, products)
    neurons, columns = w1.shape[0], lists.shape[-1]
    if columns == neurons:
        return refresh(
            x=x, w1=w1, b1=b1, wu=wu, bu=bu, w2=w2, b2=b2, order=order, clock=clock, hidden=hidden, out=out, mean=mean,
            lists=lists, by_neuron=by_neuron, w1_fp8=w1_fp8, scales=scales, change_scale=change_scale, activation=activation,
            group_rows=group_rows,
        )  # fmt: skip
    with on_device_of(x):
        rows = inner_contiguous(_batches(x))
        w1, wu = inner_contiguous(w1), None if wu is None else inner_contiguous(wu)
        b1, bu = (None if t is None else inner_contiguous(t) for t in (b1, bu))
        averages, prepared = pooling(rows, order, group_rows, w1_fp8 is not None)
        means = first_product(averages, w1, b1, wu, bu, activation, kept=(clock, mean))
        choosing(
            lists.view(-1, columns), means.view(-1, neurons), mean.view(-1, neurons), clock,
            drawn=random_count(neurons, random_density, columns), seed=seed, site=site,
        )  # fmt: skip
        result = torch.empty(*x.shape[:-1], out.shape[-1], dtype=x.dtype, device=x.device)
        multiplying(
            prepared, w1, b1, wu, bu, w1_fp8, scales, change_scale, order, hidden, lists, mean, means, by_neuron, out,
            result, activation=activation, group_rows=group_rows,
        )  # fmt: skip
        return result


def pool(rows: Tensor, order: Tensor | None, group_rows: int, fp8: bool) -> tuple[Tensor, Tensor]:
    """The mean row of each group, [B, G, C], and what `products` takes as rows. fp8: not here."""
    return group_means(rows, order, group_rows), rows


choose = partial(select, renewed=True)


def products(
    rows: Tensor, w1: Tensor, b1: Tensor | None, wu: Tensor | None, bu: Tensor | None, w1_fp8: Tensor | None,
    scales: Tensor | None, change_scale: Tensor | None, order: Tensor | None, hidden: Tensor, lists: Tensor, mean: Tensor,
    means: Tensor, by_neuron: Tensor, out: Tensor, result: Tensor, *, activation: str, group_rows: int,
) -> None:  # fmt: skip
    """Of the listed neurons: hidden and mean take their new values, out what these change; result = out in x's dtype.

    rows [B, N, C], w1, wu [F, C], b1, bu [F], each with neighbouring values of a row; hidden [B, G, F, R], lists [B, G, K],
    mean and means [B, G, F], by_neuron [F, C2], out and result [B, N, C2]. w1_fp8 and both scales: not here.
    """
    change = hidden.new_empty(*lists.shape, group_rows)
    exchange_listed(
        rows, w1, b1, wu, bu, order, hidden, lists, mean, means, change, activation=activation, group_rows=group_rows
    )
    add_listed(change, by_neuron, order, lists, out, result, group_rows)


def _batches(x: Tensor) -> Tensor:
    """[B, N, C]; two dimensions are one entry."""
    return x.flatten(1, -2) if x.ndim > 2 else x.unsqueeze(0)
