"""What a call of the model does."""

from __future__ import annotations

from enum import StrEnum


class Phase(StrEnum):
    """One of the four ways to serve a call; a site that is exempt is dense in the first three."""

    DENSE = "dense"  # the model as it was written; caches are neither read nor written
    REFRESH = "refresh"  # dense, and fills the caches
    SPARSE = "sparse"  # selected columns only, on top of the caches
    SKIP = "skip"  # the stack of blocks is replaced by the residual it added last
