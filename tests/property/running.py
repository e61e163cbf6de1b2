"""A module through our backend, without Dynamo where hundreds are tried, and held to what it gives in eager mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

import chipmunk_fx
from chipmunk_fx.backend import chipmunk
from tests.harness.tolerance import distance
from tests.runtime.models import EXACT

PHASES = ["refresh", "sparse", "sparse", "refresh"]
OPTIONS = EXACT | {"schedule.steps": len(PHASES), "schedule.branches": 1, "schedule.refresh_every": 3}
NEAR = 1e-5  # share of the largest output norm; gelu and its tanh form are 1e-4 apart


@dataclass(frozen=True)
class Outcome:
    """How many sites of each kind had sparse steps."""

    attention: int = 0
    mlp: int = 0


def traced(model: nn.Module, inputs: Sequence[Tensor]) -> Callable[..., Any]:
    """The module compiled from a graph of its own, parameters first: what Dynamo would hand over, in a tenth of the time."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())

    def call(*values: Tensor) -> Any:
        state = dict(zip(tensors, values, strict=False))
        return functional_call(model, state, values[len(tensors) :])

    values = [*tensors.values(), *inputs]
    with torch.no_grad():
        graph = make_fx(call, pre_dispatch=True, tracing_mode="fake")(*values)
        for node in list(graph.graph.nodes)[: len(tensors)]:  # as Dynamo marks parameters and buffers
            node.meta["tensor_dict"] = {"_dynamo_static_input_type": "guarded"}
        with tracing(TracingContext(FakeTensorMode())):
            compiled = chipmunk(graph, values, options=OPTIONS)
    return lambda *given: compiled(*tensors.values(), *given)


def through_dynamo(model: nn.Module, inputs: Sequence[Tensor]) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(model, backend="chipmunk", fullgraph=True, options=OPTIONS)


def assert_equals_eager(model: nn.Module, inputs: Sequence[Tensor], make: Callable[..., Any] = traced) -> Outcome:
    """Moving inputs through every phase of a generation; what is random draws the same numbers."""
    eager, compiled = deepcopy(model), make(model, steps_of(inputs)[0])  # apart: a module may write to its weights
    got, want = ([_outputs(call, step, i) for i, step in enumerate(steps_of(inputs))] for call in (compiled, eager))
    largest = 0.0
    for step, (ours, theirs) in enumerate(zip(got, want, strict=True)):
        for mine, yours in zip(ours, theirs, strict=True):
            assert (mine.dtype, mine.shape) == (yours.dtype, yours.shape)
            largest = max(largest, yours.double().norm().item())
            error = distance(mine, yours)
            assert error <= NEAR * largest, f"step {step} ({PHASES[step]}): off by {error / largest:.1e} of the norm"
    summary = chipmunk_fx.summary(model)
    assert not summary.phases or len(summary.phases[0]) == len(PHASES)
    kinds = [site.kind for site in summary.sites if "sparse" in site.phases.get(0, [])]  # a mask may keep calls dense
    return Outcome(kinds.count("attention"), kinds.count("mlp"))


def runs(model: nn.Module, inputs: Sequence[Tensor]) -> bool:
    """Whether the module takes its inputs and makes numbers of them: an exponential of large scores may be too large."""
    try:
        outputs = [_outputs(model, step, 0) for step in steps_of(inputs)]
    except (RuntimeError, IndexError, ValueError):
        return False
    return all(output.isfinite().all() for of_step in outputs for output in of_step)


def steps_of(inputs: Sequence[Tensor]) -> list[list[Tensor]]:
    """Fresh inputs of every step: numbers move, masks stay."""
    moves = [torch.ones_like(x) / (1 + x.abs()) if x.is_floating_point() else None for x in inputs]
    return [
        [x.clone() if move is None else x + 0.4 * step * move for x, move in zip(inputs, moves, strict=True)]
        for step in range(len(PHASES))
    ]


@torch.no_grad()
def _outputs(call: Callable[..., Any], inputs: Sequence[Tensor], seed: int) -> list[Tensor]:
    torch.manual_seed(seed)
    result = call(*(x.clone() for x in inputs))
    return list(result) if isinstance(result, (tuple, list)) else [result]
