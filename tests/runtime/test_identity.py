"""To whom caches belong when parameters are shared, replaced, moved, or not there at all."""

import copy
import logging
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import chipmunk_fx
from chipmunk_fx.runtime import registry
from tests.runtime.models import (  # fmt: skip
    EXACT,
    SPARSE,
    TinyDiT,
    assert_same,
    calls,
    chipmunk,
    compiled,
    exactly,
    identical,
    run,
    words,
)

TIMES = (900, 700, 500, 300)
STEPS = ["refresh", "sparse", "sparse", "sparse"]
PHASES = {0: STEPS}


def test_guidance_that_stops_half_way_leaves_the_other_branch_alone():
    ours = compiled(TinyDiT())
    texts = [words(1), words(2)]
    both = calls(TIMES, texts)
    first = run(ours, both[0::2])
    chipmunk_fx.reset(ours)
    mixed = run(ours, [*both[:4], *both[4::2]])
    assert identical([mixed[0], mixed[2], *mixed[4:]], first)
    assert chipmunk_fx.summary(ours).phases == {0: STEPS, 1: STEPS[:2]}


def test_one_weight_used_twice_in_a_forward_has_caches_for_each_use():
    shared, apart = TinyDiT(depth=2), TinyDiT(depth=2)
    shared.blocks[1] = shared.blocks[0]
    apart.blocks[1].load_state_dict(apart.blocks[0].state_dict())
    alone = run(compiled(apart), calls(TIMES))
    ours = compiled(shared)
    assert identical(run(ours, calls(TIMES)), alone)
    sites = chipmunk_fx.summary(ours).sites
    assert len(sites) == 4 and all(site.status == "rewritten" and site.cache_bytes for site in sites)
    (session,) = registry.sessions(ours)
    (branch,) = session.tracks[None].branches.values()
    assert sorted(key[:2] for cells in branch.caches.values() for key in cells) == [(0, 2), (0, 2), (1, 2), (1, 2)]


def test_a_block_compiled_alone_and_used_twice_a_step_is_two_branches_of_itself():
    model = TinyDiT(depth=2)
    model.blocks[1] = model.blocks[0]
    torch._dynamo.reset()
    model.blocks[0].compile(backend="chipmunk", options=EXACT | {"schedule.steps": 4, "schedule.branches": 2})
    plain = TinyDiT(depth=2)
    plain.blocks[1] = plain.blocks[0]
    assert_same(run(model, calls(TIMES)), run(plain, calls(TIMES)))
    assert chipmunk_fx.summary(model).phases == {0: STEPS, 1: STEPS}


class Apart(TinyDiT):
    """The graph breaks on both sides of an attention, which is left without a weight."""

    def forward(self, latents: Tensor, timestep: Tensor, text: Any = None) -> Tensor:
        x = self.embed(latents).flatten(2).transpose(1, 2)
        q, k, v = self.blocks[0].qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        torch._dynamo.graph_break()
        x = F.scaled_dot_product_attention(q, k, v)
        torch._dynamo.graph_break()
        return self.out(x.transpose(1, 2).flatten(2))


def test_a_piece_without_a_weight_stays_as_it_is_and_says_why():
    model = Apart()
    torch._dynamo.reset()
    ours = chipmunk(model, options=SPARSE)
    assert_same(run(ours, calls(TIMES)), run(model, calls(TIMES)))
    report = chipmunk_fx.explain(model, *calls(TIMES)[0], config=SPARSE)
    (site,) = report.sites
    assert site.status == "dense" and site.reason == "no linear projection found behind the queries"


def replaced_at_every_call(model: TinyDiT) -> TinyDiT:
    """As hooks of sequential offloading do."""

    def renew(module: nn.Module) -> None:
        for layer in module.modules():
            for name, parameter in list(layer._parameters.items()):
                if parameter is not None:
                    layer._parameters[name] = nn.Parameter(parameter.detach().clone(), requires_grad=False)

    for block in model.blocks:
        renew(block)
    return model


@pytest.mark.parametrize("strict", [False, True])
def test_parameters_replaced_at_every_call_are_noticed(strict: bool, caplog: pytest.LogCaptureFixture):
    model, plain = TinyDiT(), TinyDiT()
    ours = exactly(model, strict=strict)
    done: list[Tensor] = []
    steps = calls([*TIMES, 200])
    with caplog.at_level(logging.WARNING, logger="chipmunk_fx"):
        try:
            for call in steps:
                replaced_at_every_call(model)
                done += run(ours, [call])
        except chipmunk_fx.FallbackError as error:
            assert strict and "replaced at every call" in str(error)
    assert_same(done, run(plain, steps[: len(done)]))
    assert len(done) == (3 if strict else 5)
    warnings = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == (0 if strict else 1) and all("replaced at every call" in w for w in warnings)
    if not strict:  # once they stay, caches are kept again
        assert_same(run(ours, calls(TIMES, seed=2)), run(plain, calls(TIMES, seed=2)))
        assert "sparse" in chipmunk_fx.summary(ours).phases[0]


def test_sequential_offloading_is_right():
    model, plain = TinyDiT(depth=2), TinyDiT(depth=2)
    cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=False)
    ours = exactly(model)
    for seed in range(2):
        assert_same(run(ours, calls(TIMES, seed=seed)), run(plain, calls(TIMES, seed=seed)))


def test_a_model_that_moves_between_generations_keeps_its_parameters_and_caches():
    """As enable_model_cpu_offload does: `data` is swapped, the Parameter objects stay."""
    model, plain = TinyDiT(), TinyDiT()
    ours = exactly(model)
    for seed in range(3):
        assert_same(run(ours, calls(TIMES, seed=seed)), run(plain, calls(TIMES, seed=seed)))
        assert chipmunk_fx.summary(ours).phases == PHASES
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()


def test_copies_and_pickles_of_the_module_that_was_compiled():
    model = TinyDiT()
    ours = exactly(model)
    run(ours, calls(TIMES))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(run(twin, calls(TIMES)), run(model, calls(TIMES)))
        theirs = chipmunk(twin, options=EXACT)
        assert_same(run(theirs, calls(TIMES)), run(model, calls(TIMES)))
        assert chipmunk_fx.summary(theirs).phases == PHASES
    assert chipmunk_fx.summary(ours).phases == PHASES


def adapted() -> PeftModel:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["qkv", "fc1", "fc2"], init_lora_weights=False)
    return get_peft_model(TinyDiT(depth=2), config)


def test_an_adapter_fused_unfused_and_swapped_between_generations():
    model = adapted()
    inner = model.base_model.model
    ours = exactly(inner)

    def right() -> list[Tensor]:
        want = run(copy.deepcopy(inner), calls(TIMES))
        assert_same(run(ours, calls(TIMES)), want)
        return want

    unfused = right()
    model.merge_adapter()
    fused = right()
    assert_same(fused, unfused)
    assert chipmunk_fx.summary(ours).phases == PHASES
    model.unmerge_adapter()
    right()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.copy_(torch.randn_like(parameter))
    assert not torch.allclose(right()[0], unfused[0])
    model.disable_adapter_layers()
    plain = right()
    assert_same(plain, run(TinyDiT(depth=2), calls(TIMES)))
