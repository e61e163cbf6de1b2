"""Every pattern of ALL on its own examples and near misses. A new pattern is tested by adding it to ALL."""

import pytest
import torch
from torch import nn

import chipmunk_fx
from chipmunk_fx.graph.match import find
from chipmunk_fx.graph.pattern import Example, Pattern
from chipmunk_fx.patterns import ALL
from tests.graph.capturing import captured

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


def cases(kind: str) -> list:
    return [
        pytest.param(pattern, example, id=f"{pattern.name}: {example.name}")
        for pattern in ALL
        for example in getattr(pattern, kind)()
    ]


def made(example: Example) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    return example.make()


@torch.no_grad()
def outputs(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """Three steps with moving inputs; what is random draws the same numbers every time."""
    results = []
    for step in range(3):
        torch.manual_seed(step)
        result = model(*(x + 0.3 * step * torch.ones_like(x) / (1 + x.abs()) for x in inputs))
        results += result if isinstance(result, tuple) else [result]
    return results


def assert_equals_eager(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> nn.Module:
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="chipmunk", options=OPTIONS)
    for ours, theirs in zip(outputs(compiled, inputs), outputs(model, inputs), strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    return compiled


def test_names_are_unique_and_every_pattern_has_examples_and_near_misses():
    assert len({pattern.name for pattern in ALL}) == len(ALL)
    for pattern in ALL:
        assert pattern.examples() and pattern.near_misses(), pattern.name
        assert all(example.reason is None for example in pattern.examples())


@pytest.mark.parametrize(("pattern", "example"), cases("examples"))
def test_an_example_is_accepted_and_rewritten_without_a_change(pattern: Pattern, example: Example):
    model, inputs = made(example)
    accepted = [c for c in find(captured(model, *inputs).capture.module, ALL) if c.operands is not None]
    assert [c.pattern for c in accepted if c.kind == pattern.kind] == [pattern.name]
    compiled = assert_equals_eager(model, inputs)
    summary = chipmunk_fx.summary(compiled)
    assert summary.phases == {0: ["refresh", "sparse", "sparse"]}
    assert [(s.kind, s.status) for s in summary.sites if s.kind == pattern.kind] == [(pattern.kind, "rewritten")]


@pytest.mark.parametrize(("pattern", "example"), cases("near_misses"))
def test_a_near_miss_is_refused_with_its_reason_and_left_as_it_is(pattern: Pattern, example: Example):
    model, inputs = made(example)
    graph = captured(model, *inputs).capture.module
    assert not [c for c in find(graph, [pattern]) if c.operands is not None]
    if example.reason is not None:
        reasons = [c.reason or "" for c in find(graph, ALL)]
        assert any(example.reason in reason for reason in reasons), reasons
    assert_equals_eager(model, inputs)
