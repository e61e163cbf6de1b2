"""What holds for all tests: Triton without a GPU, a Dynamo that has seen nothing of other files, and no model half begun."""

import os
from collections.abc import Iterator

import pytest
import torch

from chipmunk_fx.runtime import registry

# Without a GPU, Triton kernels run in Triton's interpreter, which has to be chosen before triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="module", autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """Dynamo gives up on a function after eight compilations, and the classes of diffusers share one wrapper."""
    torch._dynamo.reset()
    yield


@pytest.fixture(autouse=True)
def no_model_begun() -> None:
    """Blocks compiled one by one are counted in their model's first pass, which a test may leave half-way."""
    registry._REGISTRY.row = 0
