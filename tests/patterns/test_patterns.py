"""Every pattern of ALL on its own examples and near misses. A new pattern is tested by adding it to ALL."""

from typing import Any

import pytest
import torch
from torch import fx, nn

import chipmunk_fx
from chipmunk_fx.backend import chipmunk
from chipmunk_fx.graph.capture import capture
from chipmunk_fx.graph.match import find
from chipmunk_fx.graph.pattern import Example, Pattern
from chipmunk_fx.patterns import ALL
from tests.runtime.models import one_thread

OPTIONS = {
    "attention.density": 1.0,
    "mlp.density": 1.0,
    "attention.random_density": 0.0,
    "mlp.random_density": 0.0,
    "attention.group_rows": 16,
    "mlp.group_rows": 16,
    "attention.dense_layers": 0,
    "mlp.dense_layers": 0,
    "schedule.steps": 3,
    "schedule.branches": 1,
    "gate": "off",
    "lowering": "eager",
}


@pytest.fixture(scope="module", autouse=True)
def single_thread():
    with one_thread():
        yield


def cases(kind: str) -> list:
    return [
        pytest.param(pattern, example, id=f"{pattern.name}: {example.name}")
        for pattern in ALL
        for example in getattr(pattern, kind)()
    ]


def made(example: Example) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    return example.make()


def moved(x: torch.Tensor, far: float) -> torch.Tensor:
    return x + far / (1 + x.abs()) if x.is_floating_point() else x


@torch.no_grad()
def outputs(model: Any, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """Three steps with moving inputs; what is random draws the same numbers every time."""
    results = []
    for step in range(3):
        torch.manual_seed(step)
        result = model(*(moved(x, 0.3 * step) for x in inputs))
        results += result if isinstance(result, tuple) else [result]
    return results


def compiled(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[Any, fx.GraphModule]:
    """The compiled model, which has been found equal to eager over three steps, and its captured graph."""
    graphs: list[fx.GraphModule] = []

    def backend(module: fx.GraphModule, given: Any) -> Any:
        graphs.append(capture(module, given).module)
        return chipmunk(module, given, options=OPTIONS)

    torch._dynamo.reset()
    ours = torch.compile(model, backend=backend, fullgraph=True)
    for got, want in zip(outputs(ours, inputs), outputs(model, inputs), strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    return ours, graphs[0]


def test_names_are_unique_and_every_pattern_has_examples_and_near_misses():
    assert len({pattern.name for pattern in ALL}) == len(ALL)
    for pattern in ALL:
        assert pattern.examples() and pattern.near_misses(), pattern.name
        assert all(example.reason is None for example in pattern.examples())


@pytest.mark.parametrize(("pattern", "example"), cases("examples"))
def test_an_example_is_accepted_and_rewritten_without_a_change(pattern: Pattern, example: Example):
    ours, graph = compiled(*made(example))
    assert [c.pattern for c in find(graph, ALL) if c.operands is not None and c.kind == pattern.kind] == [pattern.name]
    summary = chipmunk_fx.summary(ours)
    assert summary.phases == {0: ["refresh", "sparse", "sparse"]}
    assert [(s.kind, s.status) for s in summary.sites if s.kind == pattern.kind] == [(pattern.kind, "rewritten")]


@pytest.mark.parametrize(("pattern", "example"), cases("near_misses"))
def test_a_near_miss_is_refused_with_its_reason_and_left_as_it_is(pattern: Pattern, example: Example):
    _, graph = compiled(*made(example))
    assert not [c for c in find(graph, [pattern]) if c.operands is not None]
    if example.reason is not None:
        reasons = [c.reason or "" for c in find(graph, ALL)]
        assert any(example.reason in reason for reason in reasons), reasons
