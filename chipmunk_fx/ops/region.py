"""What a stack of blocks added to a stream of tokens, kept for steps that skip the stack."""

import torch
from torch import Tensor


def region_store(start: Tensor, stop: Tensor, residual: Tensor, change: Tensor | None) -> None:
    """residual = stop - start, of the stream as it enters and as it leaves the blocks; [..] of one shape.

    change: fp32 [1] or None; sum |new residual - old one| / sum |old one|, which is infinite where there was none.
    """
    new = stop - start
    if change is not None:
        moved = (new.float() - residual.float()).abs_().sum()
        change.copy_((moved / residual.float().abs().sum()).nan_to_num_(nan=torch.inf, posinf=torch.inf))
    residual.copy_(new)


def region_add(start: Tensor, residual: Tensor) -> Tensor:
    """start + residual in residual's dtype: the stream behind blocks that add what they added before."""
    return torch.add(start, residual, out=torch.empty_like(residual))
