"""Copying what was traced before gives the graph that tracing all of it gives."""

from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from chipmunk_fx.graph import capture as capturing
from tests.graph.capturing import captured
from tests.harness.zoo import build
from tests.runtime.models import TinyDiT, calls


def described(module: fx.GraphModule) -> list[tuple[Any, ...]]:
    """All of a graph that matching reads."""
    nodes, memories = [], []
    for node in module.graph.nodes:
        values = [value for value in tree_leaves(node.meta.get("val")) if isinstance(value, torch.Tensor)]
        memories += [storage for value in values if (storage := value.untyped_storage()._cdata) not in memories]
        laid = [
            (v.shape, v.stride(), v.storage_offset(), v.dtype, v.device, memories.index(v.untyped_storage()._cdata))
            for v in values
        ]
        about = [str(node.meta.get(key)) for key in ("nn_module_stack", "stack_trace", "custom", "original_aten")]
        nodes.append((node.op, str(node.target), str(node.args), str(node.kwargs), laid, about))
    return nodes


def both(monkeypatch: Any, model: nn.Module, *args: Any, **inputs: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The capture as it is made, and one where every node was traced."""
    copied = captured(model, *args, **inputs).capture.module
    with monkeypatch.context() as patch:
        patch.setattr(capturing, "Repeating", lambda module, graph: fx.Interpreter(module, graph=graph))
        return copied, captured(model, *args, **inputs).capture.module


@pytest.mark.parametrize("name", ["Flux", "HunyuanVideo", "Mochi", "Wan"])
def test_a_model_of_the_zoo_is_captured_as_if_all_of_it_were_traced(monkeypatch, name):
    model, inputs = build(name)
    copied, traced = both(monkeypatch, model, **inputs)
    assert described(copied) == described(traced)


@torch.no_grad()
def test_a_node_is_traced_once(monkeypatch):
    seen = []
    call = fx.Interpreter.call_function

    def run(self: Any, target: Any, args: Any, kwargs: Any) -> Any:
        seen.append(target)
        return call(self, target, args, kwargs)

    monkeypatch.setattr(fx.Interpreter, "call_function", run)
    counts = []
    for depth in (2, 6):
        captured(TinyDiT(depth), *calls([900])[0])
        counts.append(len(seen))
        seen.clear()
    assert counts[0] == counts[1]


class Moves(nn.Module):
    """The same operation before and after something that makes it another: a write, a setting, another literal."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = x.sin(), x.float().float()
        a = a.add_(1) * a.add_(1)
        with torch.autocast("cpu", enabled=False):
            a = a.sin() * x.sin()
        a = a.clamp(0, 1) + a.clamp(0, 1.0) + a.clamp(False, True)
        return a + x.contiguous() + x.contiguous() + b + torch.tensor([1.0]).sin() + torch.tensor([1.0]).sin()


def test_what_is_not_the_same_is_not_copied(monkeypatch):
    x = torch.randn(2, 3)
    copied, traced = both(monkeypatch, Moves(), x)
    assert described(copied) == described(traced)
    torch.testing.assert_close(copied(x)[0], Moves()(x))
