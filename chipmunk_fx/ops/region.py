"""What a stack of blocks added to a stream of tokens, kept for steps that skip the stack."""

import torch
from torch import Tensor


def region_store(start: Tensor, stop: Tensor, residual: Tensor) -> None:
    """residual = stop - start, of the stream as it enters and as it leaves the blocks; [..] of one shape."""
    torch.sub(stop, start, out=residual) if start.dtype == stop.dtype == residual.dtype else residual.copy_(
        stop - start
    )


def region_add(start: Tensor, residual: Tensor) -> Tensor:
    """start + residual in residual's dtype: the stream behind blocks that add what they added before."""
    return torch.add(start, residual).to(residual.dtype)
