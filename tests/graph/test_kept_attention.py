"""Attentions that stay dense go to flash-attn-4 where it would be taken, and only those that are plain."""

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import chipmunk_fx
from chipmunk_fx.graph.kept_attention import has_long_attention
from chipmunk_fx.graph.rewrite import rewrite
from chipmunk_fx.ops import flash4
from chipmunk_fx.schedule.phase import Phase
from tests.graph.capturing import captured, captured_tiny, config_of
from tests.runtime.models import SPARSE, TinyDiT, assert_same, calls, chipmunk, run

aten, ours = torch.ops.aten, torch.ops.chipmunk
SDPA, DENSE = aten.scaled_dot_product_attention.default, ours.attention_dense.default


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attn-4 is installed and would be the fastest; calls of it are computed by the CPU's kernel."""
    monkeypatch.setattr(flash4, "installed", lambda: True)
    monkeypatch.setattr(flash4, "suits", lambda q, k: True)


def targets(phase: Phase, **options: Any) -> Counter:
    seen, options = captured_tiny(3), {"gate": "off", "mlp__enabled": False} | options
    module = rewrite(seen.capture, seen.plan(**options), config_of(options), phase)
    return Counter(n.target for n in module.graph.nodes if n.target in (SDPA, DENSE))


def test_dense_layers_and_dense_steps(everywhere: None):
    assert targets(Phase.SPARSE, attention__dense_layers=2) == {DENSE: 2}
    assert targets(Phase.DENSE, attention__dense_layers=2) == {DENSE: 3}


def test_without_it_all_stays_as_it_was():
    assert targets(Phase.SPARSE, attention__dense_layers=2) == {SDPA: 2}
    assert not has_long_attention(captured_tiny(1).capture.module.graph)


def test_it_is_not_imported_where_it_does_not_pay(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(flash4, "installed", lambda: pytest.fail("flash-attn-4 was imported"))
    assert not has_long_attention(captured_tiny(1).capture.module.graph)


class Plain(nn.Module):
    """One attention over x, [B, N, 32], called with `how`."""

    def __init__(self, chosen: bool = False, key_batch: int = 1, **how: Any) -> None:
        super().__init__()
        self.qkv, self.chosen, self.key_batch, self.how = nn.Linear(32, 96), chosen, key_batch, how

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4).unbind(0)
        q = q[: len(q) // self.key_batch]
        if not self.chosen:
            return F.scaled_dot_product_attention(q, k, v, **self.how)
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, **self.how)


@pytest.mark.parametrize(
    ("model", "long"),
    [
        (Plain(), True),
        (Plain(scale=0.3), True),
        (Plain(is_causal=True), False),
        (Plain(attn_mask=torch.ones(24, 24).tril().bool()), False),
        (Plain(dropout_p=0.1), False),
        (Plain(chosen=True), False),
        (Plain(key_batch=2), False),  # one query for two samples
    ],
    ids=["plain", "scale", "causal", "mask", "dropout", "chosen", "batch"],
)
def test_what_is_taken(everywhere: None, model: nn.Module, long: bool):
    assert has_long_attention(captured(model, torch.randn(2, 24, 32)).capture.module.graph) == long


@pytest.mark.parametrize("options", [{}, {"schedule.skip_steps": [2]}], ids=["refreshes", "skips"])
def test_results_stay_the_same(everywhere: None, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr(flash4, "takes", lambda q, k, valid: asked.append(q.shape[1]))
    model, inputs = TinyDiT(depth=2), calls((900, 700, 500, 300))
    schedule = {"schedule.steps": 4, "schedule.refresh_steps": [1], "schedule.dense_steps": [0, 3]}
    exact = {"attention.density": 1.0, "attention.random_density": 0.0, "mlp.enabled": False}
    torch._dynamo.reset()
    compiled = chipmunk(model, options=SPARSE | schedule | exact | {"attention.dense_layers": 1} | options)
    got, want = run(compiled, inputs), run(model, inputs)
    computed = "skip" if options else "sparse"
    assert chipmunk_fx.summary(compiled).phases == {0: ["dense", "refresh", computed, "dense"]}
    if not options:
        assert_same(got, want)
    # whole attentions (parts of ours have one head): both of a dense step, both of a refresh, the dense layer's of a sparse step
    assert asked.count(2) == 2 + 2 + (not options) + 2
