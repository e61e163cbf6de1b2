"""Graphs of the phases: one op a site, caches as placeholders at the end, the captured graph as it was."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import chipmunk_fx
import chipmunk_fx.ops  # noqa: F401  (registers torch.ops.chipmunk)
from chipmunk_fx.graph.rewrite import rewrite
from chipmunk_fx.graph.state import state_inputs
from chipmunk_fx.schedule.phase import Phase
from tests.graph.capturing import Seen, captured, captured_from_zoo, captured_tiny, config_of

aten = torch.ops.aten
chipmunk = torch.ops.chipmunk
OFF = {"gate": "off", "attention__dense_layers": 0, "mlp__dense_layers": 0}
OPS = {
    Phase.REFRESH: (chipmunk.attention_refresh.default, chipmunk.mlp_refresh.default),
    Phase.SPARSE: (chipmunk.attention_sparse.default, chipmunk.mlp_sparse.default),
}


def written(seen: Seen, phase: Phase, **options):
    options = OFF | options
    return rewrite(seen.capture, seen.plan(**options), config_of(options), phase)


def targets(module) -> Counter:
    return Counter(n.target for n in module.graph.nodes if n.op == "call_function")


@pytest.fixture(scope="module", params=[1, 3])
def depth(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="module")
def seen(depth: int) -> Seen:
    return captured_tiny(depth)


@pytest.mark.parametrize("phase", list(OPS))
def test_every_site_becomes_one_op(seen: Seen, depth: int, phase: Phase):
    before, after = targets(seen.capture.module), targets(written(seen, phase))
    assert [after[op] for op in OPS[phase]] == [depth, depth]
    assert after[aten.scaled_dot_product_attention.default] == after[aten.gelu.default] == 0
    assert before[aten.linear.default] - after[aten.linear.default] == 2 * depth
    kept = before - Counter({aten.scaled_dot_product_attention.default: depth, aten.gelu.default: depth})
    watched = 2 if phase is Phase.REFRESH else 1  # attention writes no cache on a sparse step
    ours = Counter({**dict.fromkeys(OPS[phase], depth), chipmunk.cache_watch.default: watched * depth})
    assert after - ours == kept - Counter({aten.linear.default: 2 * depth})


@pytest.mark.parametrize("phase", list(OPS))
def test_state_comes_after_the_graphs_own_inputs(seen: Seen, phase: Phase):
    module = written(seen, phase)
    names = [n.name for n in module.graph.nodes if n.op == "placeholder"]
    own = [n.name for n in seen.capture.module.graph.nodes if n.op == "placeholder"]
    assert names == own + [f"chipmunk_{entry.name}" for entry in state_inputs(seen.plan(**OFF), Phase.REFRESH)]
    state = [n for n in module.graph.nodes if n.op == "placeholder"][len(own) :]
    assert all(n.meta["tensor_dict"] == {"_dynamo_static_input_type": "unguarded"} for n in state)
    parameters = [n for n in module.graph.nodes if n.op == "placeholder"][: len(own)]
    assert all(hasattr(n, "_dynamo_source") for n in parameters)
    module.graph.lint()


def test_the_captured_graph_is_not_edited(seen: Seen):
    before = seen.capture.module.print_readable(print_output=False)
    for phase in OPS:
        written(seen, phase)
    assert seen.capture.module.print_readable(print_output=False) == before


def test_sites_that_stay_dense_are_left_as_they_are(seen: Seen, depth: int):
    after = targets(written(seen, Phase.SPARSE, mlp__enabled=False, attention__dense_layers=1))
    assert after[chipmunk.attention_sparse.default] == depth - 1
    assert after[chipmunk.mlp_sparse.default] == 0 and after[aten.gelu.default] == depth


def test_settings_are_constants_of_the_ops(seen: Seen):
    options = {"attention__combine": "additive", "attention__mass_stride": 2, "seed": 7, "attention__group_rows": 32}
    refresh = next(n for n in written(seen, Phase.REFRESH, **options).graph.nodes if n.target in OPS[Phase.REFRESH])
    assert refresh.kwargs == {
        "scale": 0.25,
        "group_rows": 32,
        "random_density": 0.01,
        "power": 0.0,
        "mass_stride": 2,
        "renew": True,
        "ragged": False,
        "seed": 7,
        "site": 0,
        "sdpa": "",
    }


def test_a_fused_projection_keeps_its_other_half():
    seen = captured_from_zoo("Flux")
    before, after = targets(seen.capture.module), targets(written(seen, Phase.SPARSE))
    assert after[chipmunk.mlp_sparse.default] == 6
    # two linears a feed-forward in the double blocks, one of two in the single ones
    assert before[aten.linear.default] - after[aten.linear.default] == 2 * 4 + 1 * 2
    assert after[aten.cat.default] == before[aten.cat.default] - 2  # one part is left beside the hidden values


class Windowed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v)


def test_local_windows_need_no_grid():
    seen = captured(Windowed(), torch.randn(1, 64, 16))
    names = [entry.name for entry in state_inputs(seen.plan(**OFF, attention__local_window=0.1), Phase.REFRESH)]
    assert names == ["broken", "clock", "order_0", "always_0", "rest_0", "share_0", "lists_0"]
    refresh = next(
        n
        for n in written(seen, Phase.REFRESH, attention__local_window=0.1).graph.nodes
        if n.target is chipmunk.attention_refresh.default
    )
    assert [str(argument) for argument in refresh.args[3:5]] == ["chipmunk_order_0", "chipmunk_always_0"]


class ViewsOfTheResult(nn.Module):
    """Attention written out, whose result is viewed as only the layout of a matrix product allows."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        return ((q @ k.transpose(-2, -1)).softmax(-1) @ v).view(len(x) * 2, -1, 8)


@torch.no_grad()
def test_a_view_that_the_layout_of_the_op_forbids_becomes_a_copy():
    model, x = ViewsOfTheResult(), torch.randn(2, 64, 16)
    options = {"preset": "exact", "lowering": "eager", "schedule.steps": 2, "schedule.branches": 1}
    ours = torch.compile(model, backend="chipmunk", options=options)
    for _ in range(2):
        torch.testing.assert_close(ours(x), model(x))
    assert chipmunk_fx.summary(model).phases == {0: ["refresh", "sparse"]}
