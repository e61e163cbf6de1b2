"""A refresh of attention that needs no dense kernel: where lists can be known beforehand, all keys are those and the rest.

After a dense kernel the listed part is computed once more. Lists are known if they are kept, or chosen by column masses that
are weighed by the denominators of the refresh before.
"""

from typing import Any

import torch
from torch import Tensor

from chipmunk_fx.kernels.hopper import tuning
from chipmunk_fx.kernels.hopper.columns import attend_columns, attend_in_parts
from chipmunk_fx.kernels.hopper.masses import column_masses
from chipmunk_fx.kernels.hopper.selection import select
from chipmunk_fx.kernels.triton import attention
from chipmunk_fx.kernels.triton.launching import inner_contiguous, on_device_of
from chipmunk_fx.ops import flash4
from chipmunk_fx.ops.dense import left_open


def refresh(**arguments: Any) -> Tensor:
    """As `chipmunk_fx.ops.attention.attention_refresh`."""
    if in_parts(arguments):
        return _refresh(**arguments)
    return attention.refresh(**arguments, masses_of=column_masses, choose=select, over_columns=attend_columns)


def in_parts(arguments: dict[str, Any]) -> bool:
    """Whether lists can be known before attention is computed, no kernel is asked for, and the dense one would take longer."""
    q, k, lists = (arguments[name] for name in ("q", "k", "lists"))
    known = not arguments["renew"] or (arguments["again"] and arguments["lse"] is not None)
    columns, keys = lists.shape[3], k.shape[2]
    if not known or arguments["valid"] is not None or columns == keys or not left_open(arguments["sdpa"]):
        return False
    return tuning.in_parts(arguments["group_rows"], columns / keys, flash4.takes(q, k, None))


def _refresh(
    *, q: Tensor, k: Tensor, v: Tensor, order: Tensor | None, always: Tensor | None, valid: None, clock: Tensor, rest: Tensor,
    share: Tensor, lists: Tensor, lse: Tensor | None, scale: float, group_rows: int, random_density: float, power: float,
    mass_stride: int, renew: bool, again: bool, ragged: bool, seed: int, site: int, sdpa: str,
) -> Tensor:  # fmt: skip
    with on_device_of(q):
        q, k, v = (inner_contiguous(x) for x in (q, k, v))
        lse = torch.empty_like(share) if lse is None else lse
        if renew:
            attention.renew_lists(
                q, k, order, always, valid, clock, lists, lse, scale=scale, group_rows=group_rows,
                random_density=random_density, mass_stride=mass_stride, ragged=ragged, seed=seed, site=site,
                masses_of=column_masses, choose=select,
            )  # fmt: skip
        attention.clear_left_out(q, order, rest, share)
        out = attention.empty_tokens_first(q)
        attend_in_parts(
            q, k, v, order, lists, rest, share, out, lse, scale=scale, group_rows=group_rows, power=power, short=ragged
        )
        attention.attend_left_out(q, k, v, order, valid, out, scale, sdpa)
        return out
