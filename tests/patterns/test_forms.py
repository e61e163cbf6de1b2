"""What patterns make of whole models: the zoo's counts, adapters, shared weights, one linear for many things."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

import chipmunk_fx
from chipmunk_fx.graph.rewrite import rewrite
from chipmunk_fx.patterns.modules import GatedMlp, Mlp, OneLinearMlp
from chipmunk_fx.runtime.report import Report
from chipmunk_fx.schedule.phase import Phase
from tests.graph.capturing import captured, captured_from_zoo, config_of
from tests.harness.zoo import build, cast
from tests.patterns.test_patterns import OPTIONS, compiled, outputs

aten = torch.ops.aten

OFF = {"gate": "off", "mlp__dense_layers": 0}


def explained(name: str, dtype: torch.dtype = torch.float32) -> Report:
    model, inputs = cast(name, *build(name), dtype)
    return chipmunk_fx.explain(model, **inputs)


def test_an_activation_between_casts_is_found_in_low_precision():
    report = explained("Lumina2", torch.bfloat16)
    assert [s.form for s in report.sites if s.kind == "mlp" and s.accepted] == ["gated silu"] * 4


def test_embedders_are_refused_and_refiners_are_not():
    sites = {s.name: s for s in explained("WanI2V").sites}
    assert not sites["condition_embedder.text_embedder"].accepted
    assert "embeds the conditioning" in sites["condition_embedder.image_embedder.ff.net"].reason
    assert all(sites[f"blocks.{i}.ffn.net"].accepted for i in range(2))
    refiner = [s for s in explained("HunyuanVideo").sites if "refiner" in s.name and s.kind == "mlp"]
    assert [s.accepted for s in refiner] == [True]


def test_one_row_a_sample_is_no_stream_of_tokens():
    reasons = {s.name: s.reason for s in explained("Latte").sites if not s.accepted}
    assert "32x1x8 has one row a sample" in reasons["temporal_transformer_blocks.0.ff.net"]


@pytest.mark.parametrize("targets", [["net.2"], ["net.0.proj"], ["net.0.proj", "net.2"]])
def test_adapters_that_are_not_merged_are_refused(targets: list[str]):
    model, inputs = build("DiT")
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    report = chipmunk_fx.explain(inject_adapter_in_model(config, model).eval(), **inputs)
    assert report.count("mlp") == 0
    for block in range(2):
        reasons = [s.reason for s in report.sites if s.name == f"transformer_blocks.{block}.ff.net"]
        assert len(reasons) == 1 and "low-rank update (LoRA)" in reasons[0]


def test_merged_adapters_are_plain_linears():
    model, inputs = build("DiT")
    model = inject_adapter_in_model(LoraConfig(r=4, target_modules=["net.2"], init_lora_weights=False), model).eval()
    for module in model.modules():
        if hasattr(module, "merge"):
            module.merge()
    assert chipmunk_fx.explain(model, **inputs).count("mlp") == 2


@torch.library.custom_op("chipmunk_tests::product", mutates_args=())
def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x @ weight.T


@product.register_fake
def _(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


class OwnProduct(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(product(self.norm(x), self.fc1.weight)))


def test_a_product_of_somebodys_own_is_refused_by_name():
    (site,) = chipmunk_fx.explain(OwnProduct(F.gelu), torch.randn(2, 24, 16)).sites
    assert not site.accepted and "chipmunk_tests.product.default" in site.reason


def test_nothing_is_left_of_what_a_site_replaces():
    seen = captured(Mlp(lambda h: F.gelu(h.chunk(2, -1)[0]), 16), torch.randn(2, 24, 16))
    module = rewrite(seen.capture, seen.plan(**OFF), config_of(OFF), Phase.REFRESH)
    assert not {aten.linear.default, aten.chunk.default} & {node.target for node in module.graph.nodes}


class Twice(nn.Module):
    """One weight in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp(F.gelu)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.mlp(x)
        return x + self.mlp(x)


def test_a_shared_weight_has_a_cache_in_every_place():
    torch.manual_seed(0)
    ours, _ = compiled(Twice(), (torch.randn(2, 24, 16),))
    sites = chipmunk_fx.summary(ours).sites
    assert [site.status for site in sites] == ["rewritten"] * 2
    plan = captured(Twice(), torch.randn(2, 24, 16)).plan(**OFF)
    assert [site.ordinal for site in plan.sites] == [0, 1] and len({site.owner for site in plan.sites}) == 1


@pytest.mark.parametrize("halved", [False, True])
def test_a_linear_that_makes_more_is_narrowed_to_the_rest(halved: bool):
    model = OneLinearMlp(lambda h: h.split([48, 32], -1), halved)
    seen = captured(model, torch.randn(2, 24, 16))
    plan = seen.plan(**OFF)
    module = rewrite(seen.capture, plan, config_of(OFF), Phase.SPARSE)
    targets = Counter(node.target for node in module.graph.nodes)
    assert targets[aten.linear.default] == 2  # the rest of the first linear, and what reads it
    assert targets[aten.split_with_sizes.default] == 0
    rest = next(n for n in module.graph.nodes if n.target is aten.linear.default)
    assert [part.args[1:] for part in rest.args[1:]] == [(0, 0, 48)] * 2
    rows, neurons = 2 * 24, 16 if halved else 32
    assert plan.rest_flops == 2 * rows * 16 * 48 + 2 * rows * 48 * 16
    assert plan.total_flops - plan.rest_flops == 2 * rows * 16 * (32 + neurons)


def test_qkv_and_mlp_of_one_linear_are_both_rewritten():
    plan = captured_from_zoo("Flux2").plan(**OFF, attention__dense_layers=0)
    single = [(s.kind, s.form) for s in plan.rewritten if s.name.startswith("single_transformer_blocks.0")]
    assert sorted(single) == [("attention", "self"), ("mlp", "parallel chunked gated silu")]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Mlp(F.gelu),
        lambda: GatedMlp(lambda gate, up, x: F.silu(gate(x)) * up(x)),
        lambda: OneLinearMlp(lambda h: h.split([48, 32], -1), halved=True),
    ],
)
def test_forms_hold_with_dynamic_sizes(make):
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = make()
    ours = torch.compile(model, backend="chipmunk", options=OPTIONS, dynamic=True)
    for rows in (24, 40):
        inputs = (torch.randn(2, rows, 16),)
        with chipmunk_fx.generation(ours, key=rows) if rows > 24 else torch.no_grad():
            for got, want in zip(outputs(ours, inputs), outputs(model, inputs), strict=True):
                torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert [s.status for s in chipmunk_fx.summary(ours).sites] == ["rewritten"]
