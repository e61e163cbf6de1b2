"""Sites, layers, owners, and floating-point operations of a plan."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from chipmunk_fx.graph.pattern import MlpOperands
from chipmunk_fx.graph.state import state_inputs
from chipmunk_fx.schedule.phase import Phase
from tests.graph.capturing import captured, captured_from_zoo, captured_tiny
from tests.harness.zoo import build
from tests.runtime.models import WIDTH, Block, TinyDiT, calls, noise

CALL = calls([900])[0]
OFF = {"gate": "off", "attention__dense_layers": 0, "mlp__dense_layers": 0}


class Refined(TinyDiT):
    """A text-only block before the others."""

    def __init__(self) -> None:
        super().__init__(depth=2)
        self.refiner = nn.ModuleList([Block()])
        self.project = nn.Linear(16, WIDTH)

    def forward(self, latents, timestep, text):
        refined = self.refiner[0](self.project(text))
        return super().forward(latents, timestep, refined[..., :16])


class Shared(TinyDiT):
    """One block that runs twice."""

    def forward(self, latents, timestep, text):
        self.blocks[1] = self.blocks[0]
        return super().forward(latents, timestep, text)


class ThreeLinears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.a, self.b, self.c = nn.Linear(16, 32), nn.Linear(32, 24), nn.Linear(24, 16)

    def forward(self, x):
        return self.c(F.gelu(self.b(F.gelu(self.a(self.norm(x))))))


class Parametrised(TinyDiT):
    """Weights that are computed from parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[0].fc1 = nn.utils.parametrizations.weight_norm(self.blocks[0].fc1)


class Weightless(nn.Module):
    """The weight is an argument, [48, 16]."""

    def forward(self, x, weight):
        q, k, v = F.linear(x, weight).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v)


class LowRank(nn.Module):
    """A linear with an unfused LoRA."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.down = base, nn.Linear(base.in_features, 4, bias=False)
        self.up = nn.Linear(4, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + 0.5 * self.up(self.down(x))


class Adapted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.q, self.k, self.v = (LowRank(nn.Linear(16, 16)) for _ in range(3))

    def forward(self, x):
        x = self.norm(x)
        q, k, v = (layer(x).unflatten(-1, (2, 8)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return F.scaled_dot_product_attention(q, k, v)


def test_sites_in_graph_order_with_names_sizes_and_lines():
    plan = captured_tiny(2).plan(**OFF)
    assert [(s.name, s.kind, s.layer) for s in plan.sites] == [
        ("blocks.0", "attention", 0),
        ("blocks.0", "mlp", 0),
        ("blocks.1", "attention", 1),
        ("blocks.1", "mlp", 1),
    ]
    assert plan.sites[0].sizes == (1, 2, 72, 72, 16) and plan.sites[1].sizes == (1, 72, 32, 128, 32)
    assert [s.rows for s in plan.sites] == [72] * 4 and plan.rewritten == plan.sites
    assert all(s.where.startswith("models.py:") for s in plan.sites)


def test_the_first_layers_stay_dense_and_say_why():
    plan = captured_tiny(3).plan(gate="off", attention__dense_layers=2, mlp__dense_layers=1)
    assert [(s.kind, s.layer) for s in plan.rewritten] == [("mlp", 1), ("attention", 2), ("mlp", 2)]
    assert plan.sites[2].reason == "block 1, of the first 2 (attention.dense_layers)"


def test_what_is_switched_off_or_gated_says_so():
    seen = captured_tiny()
    plan = seen.plan(**OFF | {"mlp__enabled": False})
    assert [(s.status, s.reason) for s in plan.sites] == [("rewritten", ""), ("dense", "mlp.enabled is false")]
    gated = seen.plan(lambda site: f"{site.kind} is slow", attention__dense_layers=0, mlp__dense_layers=0)
    assert [s.reason for s in gated.sites] == ["attention is slow", "mlp is slow"] and not gated.rewritten
    assert seen.plan(lambda site: "slow", **OFF).rewritten == seen.plan(**OFF).sites


def test_text_only_blocks_are_no_layers():
    plan = captured(Refined(), *CALL).plan(**OFF)
    assert [(s.name, s.layer) for s in plan.sites if s.kind == "attention"] == [
        ("refiner.0", None),
        ("blocks.0", 0),
        ("blocks.1", 1),
    ]
    assert [s.layer for s in plan.sites if s.kind == "mlp"] == [None, 0, 1]


def test_the_layers_of_a_piece_are_left_to_the_runtime():
    plan = captured(Block(), torch.randn(1, 64, WIDTH)).plan(gate="off")
    assert [s.layer for s in plan.sites] == [None, None] and plan.rewritten == plan.sites


def test_layers_go_on_over_towers_of_blocks():
    plan = captured_from_zoo("Flux").plan(**OFF)
    attention = [(s.name.rpartition(".attn")[0] or s.name, s.layer) for s in plan.sites if s.kind == "attention"]
    assert attention == [
        ("transformer_blocks.0", 0),
        ("transformer_blocks.1", 1),
        ("single_transformer_blocks.0", 2),
        ("single_transformer_blocks.1", 3),
    ]
    assert sorted(s.layer for s in plan.sites if s.kind == "mlp" and s.layer is not None) == [0, 0, 1, 1, 2, 3]


def test_owners_are_the_weights_that_a_site_reads():
    seen = captured_tiny()
    plan = seen.plan(**OFF)
    assert [seen.names[s.owner] for s in plan.sites] == ["blocks.0.qkv.weight", "blocks.0.fc1.weight"]
    assert [s.ordinal for s in plan.sites] == [0, 0]


def test_sites_of_one_owner_are_told_apart_by_order():
    seen = captured(Shared(depth=2), *CALL)
    plan = seen.plan(**OFF)
    assert [s.ordinal for s in plan.sites] == [0, 0, 1, 1]
    assert len({s.owner for s in plan.sites}) == 2


def test_a_computed_weight_belongs_to_its_parameters():
    seen = captured(Parametrised(), *CALL)
    mlp = seen.plan(**OFF).sites[1]
    assert mlp.kind == "mlp" and seen.names[mlp.owner].startswith("blocks.0.fc1.parametrizations.weight")


def test_a_site_without_parameters_is_refused():
    plan = captured(Weightless(), torch.randn(1, 24, 16), torch.randn(48, 16)).plan(**OFF)
    assert not plan.sites and plan.refused[0].reason == "no parameter behind it to keep its caches by"


def test_an_adapter_on_the_projections_is_still_self_attention():
    (site,) = captured(Adapted(), torch.randn(1, 24, 16)).plan(**OFF).sites
    assert site.form == "self"


def test_matches_do_not_overlap():
    plan = captured(ThreeLinears(), torch.randn(1, 24, 16)).plan(**OFF)
    assert len(plan.sites) == 1 and len(plan.refused) == 1
    assert "part of the match that ends at" in (plan.refused[0].reason or "")


def test_state_is_a_flag_and_a_clock_then_tables_and_caches_site_by_site():
    seen = captured_tiny()
    names = ["broken", "clock", "order_0", "always_0", "rest_0", "share_0", "lists_0"]
    assert [e.name for e in state_inputs(seen.plan(**OFF), Phase.REFRESH)] == [
        *names,
        *("order_1", "hidden_1", "out_1", "mean_1", "lists_1", "by_neuron_1"),
    ]
    raster = captured(Block(), torch.randn(1, 64, WIDTH)).plan(**OFF | {"mlp__enabled": False})
    assert [e.name for e in state_inputs(raster, Phase.REFRESH)] == ["broken", "clock", "rest_0", "share_0", "lists_0"]


@pytest.mark.parametrize("depth", [1, 2])
def test_operations_are_those_that_torch_counts(depth: int):
    model = TinyDiT(depth)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(*CALL)
    plan = captured(model, *CALL).plan(**OFF)
    assert plan.total_flops == counter.get_total_flops()
    assert plan.rest_flops == plan.total_flops - sum(s.dense_flops for s in plan.sites)


def test_operations_of_a_fused_projection_are_divided():
    model, inputs = build("Flux")
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(**inputs)
    plan = captured_from_zoo("Flux").plan(**OFF)
    assert any(isinstance(s.operands, MlpOperands) and s.operands.beside for s in plan.sites)
    assert plan.total_flops == counter.get_total_flops()


def test_operations_of_what_is_refused_stay_in_the_rest():
    plan = captured(Weightless(), torch.randn(1, 24, 16), torch.randn(48, 16)).plan(**OFF)
    assert plan.total_flops == plan.rest_flops == 2 * 24 * 16 * 48 + 4 * 2 * 24 * 24 * 8


def test_a_plan_edits_no_graph():
    seen = captured_tiny()
    before = seen.capture.module.print_readable(print_output=False)
    seen.plan(**OFF)
    assert seen.capture.module.print_readable(print_output=False) == before


def test_noise_of_another_shape_gives_other_sizes():
    plan = captured(TinyDiT(), noise(side=8, batch=2), torch.ones(2), CALL[2].expand(2, -1, -1)).plan(**OFF)
    assert plan.sites[0].sizes == (2, 2, 24, 24, 16)


def test_a_branch_of_no_width_is_refused():
    class Empty(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(16, 0), nn.Linear(0, 16)

        def forward(self, x):
            return x + self.fc2(F.gelu(self.fc1(x)))

    (refused,) = captured(Empty(), torch.randn(1, 64, 16)).plan().refused
    assert refused.reason == "sizes 1, 64, 16, 0, 16: nothing to compute"
