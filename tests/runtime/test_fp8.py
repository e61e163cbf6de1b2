"""mlp.fp8: a model with the products of its sparse MLPs in fp8, what it keeps, and where the card has no such products."""

import re
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._inductor.config import patch
from torch._inductor.utils import run_and_get_code

import chipmunk_fx
from chipmunk_fx.config import Config
from chipmunk_fx.graph.plan import Plan
from chipmunk_fx.kernels import hopper
from chipmunk_fx.runtime import precision
from chipmunk_fx.runtime.footprint import cache_bytes
from chipmunk_fx.runtime.gate import cost_gate
from chipmunk_fx.runtime.precision import settle
from tests.graph.capturing import captured_tiny
from tests.ops import oracle
from tests.runtime.models import Call, TinyDiT, calls, compiled, identical, run, words

TIMES = (900, 700, 500, 300)
# More for a block of two branches: a first weight, a byte for four of the other, two scales of weights,
# and one of changes for each branch.
BYTES = 128 * 32 - 3 * 128 * 32 + 2 * 4 + 2 * 4
WANTED = Config.from_options({"mlp.fp8": True, "gate": "off"})


def bound(model: TinyDiT, steps: Sequence[Call]) -> float:
    """What rounding to e4m3 changes in the result of a model of one block at worst, whichever its steps."""
    (block,) = model.blocks
    seen: list[Tensor] = []
    with block.fc1.register_forward_pre_hook(lambda module, given: seen.append(given[0])):
        run(model, steps)
    hidden = 1.13 * oracle.worst_in_fp8(torch.cat(seen), block.fc1.weight)  # by the steepest of gelu
    return (hidden @ block.fc2.weight.abs().mT @ model.out.weight.abs().mT).max().item()


@torch.no_grad()
def test_standing_still_differs_by_rounding_to_e4m3_alone():
    model, steps = TinyDiT(), calls((900,)) * 4
    first, *sparse = run(compiled(model, mlp__fp8=True), steps)
    dense = model(*steps[0])
    torch.testing.assert_close(first, dense, atol=1e-5, rtol=1e-5)
    errors = [(out - dense).abs().max().item() for out in sparse]
    assert 1e-5 < max(errors) <= bound(model, steps) / 4  # which is for errors that all add up


@torch.no_grad()
def test_sparse_steps_are_as_without_it_up_to_rounding_to_e4m3():
    model, steps = TinyDiT(), calls(TIMES)
    without, with_fp8 = run(compiled(model), steps), run(compiled(model, mlp__fp8=True), steps)
    assert torch.equal(with_fp8[0], without[0])  # a refresh is made in the model's dtype
    errors = [(ours - theirs).abs().max().item() for ours, theirs in zip(with_fp8[1:], without[1:], strict=True)]
    assert min(errors) > 1e-5 and max(errors) <= bound(model, steps) / 4


def test_refreshes_alone_are_dense():
    model, steps = TinyDiT(depth=2), calls(TIMES)
    options = {"schedule__refresh_every": 1}
    assert identical(run(compiled(model, mlp__fp8=True, **options), steps), run(compiled(model, **options), steps))


def test_with_every_neuron_nothing_is_rounded():
    model, steps = TinyDiT(), calls(TIMES)
    ours = compiled(model, mlp__fp8=True, mlp__density=1.0)
    done = run(ours, steps)
    mlp = chipmunk_fx.summary(ours).sites[1]
    assert identical(done, run(compiled(model, mlp__density=1.0), steps))
    assert mlp.reason.endswith("not fp8: a sparse step with every neuron is a refresh") and "w1_fp8" not in mlp.caches


def test_caches_on_the_host_change_no_bit():
    model, steps = TinyDiT(depth=2), calls(TIMES, [words(1), words(2)])
    beside = run(compiled(model, mlp__fp8=True), steps)
    assert identical(run(compiled(model, mlp__fp8=True, memory__offload="all"), steps), beside)


@torch.no_grad()
@pytest.mark.parametrize("broken", [False, True])
def test_refreshes_of_another_generation_change_no_bit(broken: bool):
    """Its hidden values, by whose largest changes are scaled, are its own."""
    model, steps = TinyDiT(depth=2), calls(TIMES)
    alone = run(compiled(model, mlp__fp8=True), steps)
    ours, other = compiled(model, mlp__fp8=True), calls(TIMES[:1], seed=7)
    other = [(latents * (torch.nan if broken else 30), *rest) for latents, *rest in other]
    done = []
    for step in steps:
        with chipmunk_fx.generation(ours, key="a"):
            done += run(ours, [step])
        with chipmunk_fx.generation(ours, key="b"):
            run(ours, other)
    assert identical(done, alone)


@torch.no_grad()
def test_inductor_writes_weights_in_fp8_in_place():
    """Its activations differ in the last bit, by which one in many is rounded to the number of e4m3 beside."""
    model, steps = TinyDiT(), calls(TIMES)
    beside = run(compiled(model, mlp__fp8=True), steps)
    with patch(fx_graph_cache=False):  # whose graphs come without their code
        done, code = run_and_get_code(lambda: run(compiled(model, mlp__fp8=True, lowering="inductor"), steps))
    assert code and not re.search(r"empty_strided_cpu\(.*float8", "\n".join(code))
    differences = torch.stack([ours - theirs for ours, theirs in zip(done, beside, strict=True)]).abs()
    assert (differences > 1e-5).float().mean() < 0.05 and differences.max() <= bound(model, steps) / 4


def test_weights_in_fp8_are_kept_once_and_counted():
    model, steps = TinyDiT(depth=2), calls(TIMES, [words(1), words(2)])
    summaries = []
    for fp8 in (False, True):
        ours = compiled(model, mlp__fp8=fp8)
        run(ours, steps)
        summaries.append(chipmunk_fx.summary(ours))
    without, with_fp8 = summaries
    assert with_fp8.cache_bytes - without.cache_bytes == 2 * BYTES
    mlp = with_fp8.sites[1]
    assert (mlp.caches["w1_fp8"], mlp.caches["by_neuron"], mlp.caches["scales"]) == (128 * 32, 128 * 32, 8)
    assert mlp.caches["change_scale"] == 2 * 4
    assert mlp.reason == "products in fp8" and without.sites[1].reason == ""


def test_the_budget_counts_them():
    plan = planned()
    told = settle(plan, WANTED)
    before, after = (cache_bytes(p.sites[1], p, WANTED, branches=2) for p in (plan, told))
    assert after - before == BYTES


def test_where_they_lie_is_said_beside_it():
    options = {"gate": "off", "mlp.dense_layers": 0, "mlp.fp8": True, "memory.offload": "all"}
    (mlp,) = (s for s in chipmunk_fx.explain(TinyDiT(), *calls(TIMES)[0], config=options).sites if s.kind == "mlp")
    assert mlp.reason.startswith("products in fp8; caches of ") and mlp.reason.endswith(" in host memory")


def test_explain_says_where_the_card_has_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(precision, "refused_in_fp8", lambda *_: "the card has no such products")
    options = {"gate": "off", "attention.dense_layers": 0, "mlp.dense_layers": 0, "mlp.fp8": True}
    report = chipmunk_fx.explain(TinyDiT(), *calls(TIMES)[0], config=options)
    told = "products in torch.float32, not fp8: the card has no such products"
    assert [(s.status, s.reason) for s in report.sites] == [("rewritten", ""), ("rewritten", told)]
    ours = compiled(TinyDiT(), mlp__fp8=True)
    done = run(ours, calls(TIMES))
    assert told in str(chipmunk_fx.summary(ours))
    assert identical(done, run(compiled(TinyDiT()), calls(TIMES)))


def planned(**changes: object) -> Plan:
    """A plan of one attention and one MLP, of which the latter is changed."""
    plan = captured_tiny().plan(gate="off", attention__dense_layers=0, mlp__dense_layers=0)
    attention, mlp = plan.sites
    return replace(plan, sites=(attention, replace(mlp, **changes)))


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    captured_tiny()  # kept: Dynamo would look for the card
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: hopper.CAPABILITY)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(hopper, "_nvrtc", lambda: object())
    return monkeypatch


FLUX = {
    "device": torch.device("cuda", 0),
    "dtype": torch.bfloat16,
    "group_rows": 192,
    "hints": (1, 4352, 3072, 12288, 3072),
}


def test_hopper_has_products_in_fp8(card: pytest.MonkeyPatch):
    plan = settle(planned(**FLUX), WANTED)
    assert [s.fp8 for s in plan.sites] == [False, True]
    assert not any(s.fp8 for s in settle(planned(**FLUX), Config()).sites)
    assert not settle(planned(**FLUX, status="dense"), WANTED).sites[1].fp8


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float16}, "only the Hopper kernels"),
        ({"hints": (1, 4352, 256, 12288, 3072)}, "only the Hopper kernels"),
        ({"dtype": torch.float32}, "only the Hopper kernels"),
        ({"group_rows": 16}, "only the Hopper kernels"),
        ({"device": torch.device("meta")}, "only the Hopper kernels"),
    ],
    ids=["fp16", "narrow", "fp32", "groups", "device"],
)
def test_what_hopper_does_not_take_keeps_the_models_dtype(card: pytest.MonkeyPatch, change: dict, reason: str):
    site = settle(planned(**FLUX | change), WANTED).sites[1]
    assert not site.fp8 and site.status == "rewritten"
    assert site.reason.startswith(f"products in {site.dtype}, not fp8: ") and reason in site.reason


def test_other_cards_keep_the_models_dtype(card: pytest.MonkeyPatch):
    card.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "only the Hopper kernels" in settle(planned(**FLUX), WANTED).sites[1].reason


def test_the_gate_expects_more_of_hopper_and_less_of_a_cpu(card: pytest.MonkeyPatch):
    mlp = planned(**FLUX).sites[1]
    often = {"mlp.density": 0.38, "schedule.refresh_every": 2}
    assert "dense time" in (cost_gate(mlp, Config.from_options(often)) or "")
    assert cost_gate(mlp, Config.from_options(often | {"mlp.fp8": True})) is None
    unsuited = replace(mlp, dtype=torch.float16)
    assert "dense time" in (cost_gate(unsuited, Config.from_options(often | {"mlp.fp8": True})) or "")
    here = planned(hints=(1, 8192, 256, 1024, 256)).sites[1]
    dense = {"mlp.density": 0.4}
    assert cost_gate(here, Config.from_options(dense)) is None
    assert "in emulated fp8: sparse is not faster above 0.3" in (
        cost_gate(here, Config.from_options(dense | {"mlp.fp8": True})) or ""
    )
