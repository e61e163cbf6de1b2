"""The cost gate: where sparse is not faster, a site stays dense and says why."""

from dataclasses import replace

import pytest
import torch

from chipmunk_fx.config import Config
from chipmunk_fx.graph.plan import make_plan
from chipmunk_fx.kernels import HOPPER_GROUP_ROWS, group_rows, hopper
from chipmunk_fx.ops.groups import GROUP_ROWS
from chipmunk_fx.runtime import gate
from chipmunk_fx.runtime.costs import CUDA_ATTENTION, CUDA_ATTENTION_HOPPER, CUDA_MLP_HOPPER, at
from chipmunk_fx.runtime.gate import cost_gate
from chipmunk_fx.runtime.placement import limit
from chipmunk_fx.state.store import Place
from tests.graph.capturing import captured_tiny

DEFAULT = Config()


@pytest.fixture(scope="module")
def sites():
    return captured_tiny().plan(gate="off", attention__dense_layers=0, mlp__dense_layers=0).sites


def large(site):
    sizes = (1, 4, 8192, 8192, 64) if site.kind == "attention" else (1, 8192, 256, 1024, 256)
    return replace(site, hints=sizes)


def test_large_sites_pass(sites):
    assert [cost_gate(large(site), DEFAULT) for site in sites] == [None, None]


def test_short_sequences_do_not(sites):
    assert all("rows" in (cost_gate(site, DEFAULT) or "") for site in sites)


def test_high_densities_do_not(sites):
    config = Config.from_options({"attention.density": 0.9, "mlp.density": 0.9})
    assert all("density 0.9" in (cost_gate(large(site), config) or "") for site in sites)


def test_a_window_counts_as_density(sites):
    attention = large(next(site for site in sites if site.kind == "attention"))
    wide = Config.from_options({"attention.density": 0.3, "attention.local_window": 0.2})
    assert cost_gate(attention, Config.from_options({"attention.density": 0.3})) is None
    assert "density 0.51" in (cost_gate(attention, wide) or "")


@pytest.mark.parametrize("backends", [(), ("some backend",)])
def test_a_gpu_needs_a_kernel_backend(sites, backends, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gate, "BACKENDS", backends)
    reason = cost_gate(on_cuda(sites[0]), DEFAULT)
    assert reason is None if backends else reason and 'gate="off"' in reason


def on_cuda(site, rows: int = 8192):
    site = large(site)
    hints = (*site.hints[:2], rows, rows, 64) if site.kind == "attention" else site.hints
    return replace(site, hints=hints, device=torch.device("cuda"), dtype=torch.bfloat16)


def test_bounds_on_a_gpu(sites, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gate, "BACKENDS", ("some backend",))
    attention = next(site for site in sites if site.kind == "attention")
    dense = Config.from_options({"attention.density": 0.6})
    assert "rows" in (cost_gate(on_cuda(attention, 1024), DEFAULT) or "")
    assert "density 0.6" in (cost_gate(on_cuda(attention), dense) or "")
    assert "float32" in (cost_gate(replace(on_cuda(attention), dtype=torch.float32), DEFAULT) or "")
    assert "mlp" in (cost_gate(on_cuda(next(site for site in sites if site.kind == "mlp")), DEFAULT) or "")


@pytest.fixture
def hopper_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: hopper.CAPABILITY)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(hopper, "_nvrtc", lambda: object())


def test_groups_are_as_large_as_the_kernel_likes(hopper_card: None, monkeypatch: pytest.MonkeyPatch):
    cuda, cpu = torch.device("cuda", 0), torch.device("cpu")
    heads, narrow = (1, 4, 8192, 8192, 128), (1, 4, 8192, 8192, 96)
    assert group_rows("attention", cuda, torch.bfloat16, heads) == HOPPER_GROUP_ROWS == 192
    others = [(cpu, torch.bfloat16, heads), (cuda, torch.float32, heads), (cuda, torch.bfloat16, narrow)]
    assert {group_rows("attention", *other) for other in others} == {GROUP_ROWS}
    mlps = [(1, 4352, width, 12288, result) for width, result in ((3072, 3072), (3072, 96), (96, 3072))]
    assert [group_rows("mlp", cuda, torch.bfloat16, sizes) for sizes in mlps] == [192, GROUP_ROWS, GROUP_ROWS]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert group_rows("attention", cuda, torch.bfloat16, heads) == GROUP_ROWS


def test_the_plan_asks_for_rows_of_groups_that_the_user_left_open():
    seen = captured_tiny()
    config = Config.from_options({"gate": "off", "mlp.group_rows": 32})
    asked = []

    def rows(*site: object) -> int:
        asked.append(site)
        return 64

    sites = make_plan(
        seen.capture, seen.candidates, seen.roles, seen.geometry(), config, lambda _: None, seen.inputs, rows
    ).sites
    assert {(site.kind, site.group_rows) for site in sites} == {("attention", 64), ("mlp", 32)}
    assert {(kind, sizes) for kind, *_, sizes in asked} == {("attention", sites[0].hints)}


def test_groups_that_hopper_takes_allow_more_columns(sites, hopper_card: None):
    attention = on_cuda(next(site for site in sites if site.kind == "attention"))
    config = Config.from_options({"attention.density": 0.4})
    assert "dense time" in (cost_gate(attention, config) or "")
    assert cost_gate(replace(attention, group_rows=192), config) is None
    assert all(new.slowness < old.slowness for new, old in zip(CUDA_ATTENTION_HOPPER, CUDA_ATTENTION, strict=True))


def test_recorded_graphs_allow_smaller_sites(sites, hopper_card: None):
    attention, mlp = (on_cuda(next(site for site in sites if site.kind == kind)) for kind in ("attention", "mlp"))
    attention = replace(attention, hints=(1, 24, 2048, 2048, 128), group_rows=192)
    mlp = replace(mlp, hints=(1, 2048, 3072, 12288, 3072), group_rows=192)
    recorded = Config.from_options({"inductor.mode": "reduce-overhead"})
    for site in (attention, mlp):
        assert "below" in (cost_gate(site, DEFAULT) or "") and cost_gate(site, recorded) is None
    assert "below 4096" in (cost_gate(replace(attention, group_rows=64), recorded) or "")
    half = Config.from_options({"inductor.mode": "reduce-overhead", "attention.density": 0.5, "mlp.density": 0.6})
    assert all("dense time" in (cost_gate(site, half) or "") for site in (attention, mlp))


def test_large_mlps_are_sparse_on_hopper(sites, hopper_card: None):
    mlp = on_cuda(next(site for site in sites if site.kind == "mlp"))
    mlp = replace(mlp, hints=(1, 4352, 3072, 12288, 3072), group_rows=192)
    sometimes = Config.from_options({"mlp.density": 0.3, "schedule.refresh_every": 10})
    assert cost_gate(mlp, sometimes) is None
    assert "192 rows" in (cost_gate(replace(mlp, group_rows=64), sometimes) or "")
    assert "64 wide" in (cost_gate(replace(mlp, hints=(1, 4352, 3072, 12288, 3080)), sometimes) or "")
    assert "operations" in (cost_gate(replace(mlp, hints=(1, 512, 3072, 12288, 3072)), sometimes) or "")
    often = Config.from_options({"mlp.density": 0.6, "schedule.refresh_every": 2})
    assert "every 2 steps" in (cost_gate(mlp, often) or "")
    # ten steps by hand: a refresh and 9 sparse ones
    assert CUDA_MLP_HOPPER.steps(0.5, 10) == pytest.approx((1.3 + 9 * (0.15 + 1.45 * 0.5)) / 10)


def test_the_budget_is_the_users_or_a_share_of_what_is_free():
    here = Place(torch.device("cpu"))
    assert limit(Config.from_options({"memory.budget_gb": 1.5}), here) == 1_500_000_000
    assert 0 < limit(DEFAULT, here) < 2**50
    assert 0 < limit(Config.from_options({"memory.budget_gb": 1.5}), Place(here.device, on_host=True)) < 2**50


def test_costs_on_a_gpu_lie_between_those_measured():
    low, high = CUDA_ATTENTION[:2]
    assert at(low.rows) == low and at(high.rows) == high and at(10**6) == CUDA_ATTENTION[-1]
    between = at(round((low.rows * high.rows) ** 0.5))
    assert between.slowness == pytest.approx((low.slowness + high.slowness) / 2, rel=1e-3)
    # ten steps by hand: 9 sparse ones and a refresh, which is a dense one, the masses, the selection and a sparse one
    assert low.steps(0.2, 10) == pytest.approx((9 * 0.61 + (1 + 0.49 + 0.61)) / 10)


def test_the_schedule_decides_with_the_density(sites, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gate, "BACKENDS", ("some backend",))
    attention = on_cuda(next(site for site in sites if site.kind == "attention"))
    assert cost_gate(attention, DEFAULT) is None
    often = Config.from_options({"schedule.refresh_every": 2})
    assert "every 2 steps" in (cost_gate(attention, often) or "")
