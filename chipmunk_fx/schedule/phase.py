"""What a call of the model does."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum


class Phase(StrEnum):
    """One of the four ways to serve a call; a site that is exempt is dense in the first three."""

    DENSE = "dense"  # the model as it was written; caches are neither read nor written
    REFRESH = "refresh"  # dense, and fills the caches
    SPARSE = "sparse"  # selected columns only, on top of the caches
    SKIP = "skip"  # the stack of blocks is replaced by the residual it added last


LETTERS = {Phase.DENSE: "D", Phase.REFRESH: "R", Phase.SPARSE: "s", Phase.SKIP: "."}


def strip(phases: Iterable[str]) -> str:
    """One letter a step: R a refresh, s sparse, . skipped, D dense."""
    return "".join(LETTERS[Phase(phase)] for phase in phases)
