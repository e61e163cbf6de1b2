"""What holds for all tests: Triton without a GPU, a Dynamo that has seen nothing of other files, no model half begun."""

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

# How fast inputs are drawn tells of the process, which pauses for a second to sweep what hundreds of tests have left.
settings.register_profile("one process", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("one process")

# Two processes at once share the cores, instead of both taking all of them.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))

# Without a GPU, Triton kernels run in Triton's interpreter, which has to be chosen before any of ours is imported.
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
    from chipmunk_fx.runtime import registry

    registry._REGISTRY.row = 0
