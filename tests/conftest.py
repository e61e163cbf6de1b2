"""What holds for all tests: Triton without a GPU, and a Dynamo that has seen nothing of other files."""

import os
from collections.abc import Iterator

import pytest
import torch

# Without a GPU, Triton kernels run in Triton's interpreter, which has to be chosen before triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the other cores have tests of their own


@pytest.fixture(scope="module", autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """Dynamo gives up on a function after eight compilations, and the classes of diffusers share one wrapper."""
    torch._dynamo.reset()
    yield
