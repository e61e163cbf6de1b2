"""A model compiled whole, in pieces between graph breaks, and block by block gives one result and keeps equal caches."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import chipmunk_fx
from tests.harness.laws import outputs
from tests.harness.tolerance import assert_near
from tests.harness.zoo import build, facts, step_inputs
from tests.runtime.models import EXACT, one_thread

PHASES = ["refresh", "sparse", "refresh", "sparse"]
OPTIONS = EXACT | {"schedule.steps": len(PHASES), "schedule.branches": 1, "schedule.refresh_every": 2}


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


def whole(model: Any) -> Any:
    return torch.compile(model, backend="chipmunk", fullgraph=True, options=OPTIONS)


def broken(model: Any) -> Any:
    """The graph breaks after every block."""
    for block in blocks(model):
        block.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    return torch.compile(model, backend="chipmunk", options=OPTIONS)


def block_by_block(model: Any) -> Any:
    model.compile_repeated_blocks(backend="chipmunk", fullgraph=True, options=OPTIONS)
    return model


def blocks(model: nn.Module) -> list[nn.Module]:
    return [part for name, part in model.named_modules() if name.rpartition(".")[0].endswith("blocks")]


@pytest.mark.parametrize("name", ["Flux", "Wan"])
def test_every_way_equals_eager_and_keeps_the_same_caches(name: str):
    held = []
    for way in (whole, broken, block_by_block):
        model, inputs = build(name)
        generations = [[step_inputs(name, inputs, i, 50, 0.3, seed) for i in range(len(PHASES))] for seed in (0, 1)]
        want = [outputs(model, steps) for steps in generations]
        torch._dynamo.reset()
        compiled = way(model)
        for steps, dense in zip(generations, want, strict=True):
            assert_near(outputs(compiled, steps), dense)
            summary = chipmunk_fx.summary(compiled)
            assert summary.phases == {0: PHASES} and not summary.fallbacks
            assert all(site.phases == {0: PHASES} for site in summary.sites)
        held.append(Counter((site.kind, site.cache_bytes) for site in summary.sites))
    sites = list(held[0].elements())
    assert all(size for _, size in sites)
    assert Counter(kind for kind, _ in sites) == {kind: facts(name)[kind] for kind in ("attention", "mlp")}
    # A piece does not show that it lies before the blocks: an embedder of text may count as a site there.
    assert held[0] <= held[1] and held[0] == held[2]
