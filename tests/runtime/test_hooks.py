"""Hooks that move weights while a model runs: diffusers' group offloading, with accelerators left out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.hooks import apply_group_offloading
from torch import Tensor, nn

import chipmunk_fx
from chipmunk_fx.runtime import registry
from chipmunk_fx.runtime.summary import Summary
from tests.runtime.models import EXACT, SPARSE, TinyDiT, assert_same, calls, chipmunk, identical, run, words

TIMES = (900, 700, 500, 300)
STEPS = ["refresh", "sparse", "sparse", "sparse"]
TOLD = {"schedule.steps": len(TIMES), "schedule.branches": 2}
CPU = torch.device("cpu")

Hook = Callable[[nn.Module], None]


@pytest.fixture(params=["memory", "disk", "two in a group"])
def hook(request: pytest.FixtureRequest, tmp_path: Path) -> Hook:
    """Block-level group offloading. From the disk, every call of a block has new `data` behind its parameters."""
    many = 2 if request.param == "two in a group" else 1
    disk = {"offload_to_disk_path": str(tmp_path)} if request.param == "disk" else {}
    return lambda model: grouped(model, "block_level", num_blocks_per_group=many, **disk)


def grouped(model: nn.Module, kind: str, **options: Any) -> None:
    apply_group_offloading(model, onload_device=CPU, offload_device=CPU, offload_type=kind, **options)


def by_block(model: Any) -> Any:
    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(backend="chipmunk", options=SPARSE | TOLD)
    return model


def generations(model: Any) -> list[Tensor]:
    return [out for seed in range(2) for out in run(model, calls(TIMES, [words(1), words(2)], seed=seed))]


def assert_scheduled(summary: Summary, phases: list[str] = STEPS) -> None:
    assert summary.phases == {0: phases, 1: phases} and not summary.fallbacks
    assert {site.kind for site in summary.sites} == {"attention", "mlp"}
    assert all(site.phases == summary.phases for site in summary.sites)


def test_blocks_compiled_one_by_one_give_the_same_bits(hook: Hook):
    plain, model = by_block(TinyDiT(depth=2)), TinyDiT(depth=2)
    want, beside = generations(plain), chipmunk_fx.summary(plain)
    hook(model)
    ours = by_block(model)
    assert identical(generations(ours), want)
    summary = chipmunk_fx.summary(ours)
    assert_scheduled(summary)
    assert [site.cache_bytes for site in summary.sites] == [site.cache_bytes for site in beside.sites]


def test_hooks_that_come_and_go_between_generations(hook: Hook):
    want, model = generations(by_block(TinyDiT(depth=2))), TinyDiT(depth=2)
    ours = by_block(model)
    assert identical(generations(ours), want)
    hook(model)
    assert identical(generations(ours), want)
    assert_scheduled(chipmunk_fx.summary(ours))


def test_caches_belong_to_the_parameters_that_hooks_refill(hook: Hook):
    model = TinyDiT(depth=2)
    hook(model)
    ours = by_block(model)
    generations(ours)
    branches = [b for session in registry.sessions(ours) for b in session.tracks[None].branches.values()]
    owners = {id(parameter) for branch in branches for parameter in branch.caches}
    assert owners == {id(layer.weight) for block in model.blocks for layer in (block.qkv, block.fc1)}


def test_a_model_compiled_whole_is_right_between_its_hooks(hook: Hook):
    """Hooks break the graph around every block."""
    model, torch_only = TinyDiT(depth=2), TinyDiT(depth=2)
    hook(model)
    torch._dynamo.reset()
    ours = chipmunk(model, options=EXACT | TOLD)
    assert_same(generations(ours), generations(torch_only))
    assert_scheduled(chipmunk_fx.summary(ours))


def test_a_parameter_replaced_behind_the_hooks_begins_anew():
    model, torch_only = TinyDiT(depth=2), TinyDiT(depth=2)
    grouped(model, "block_level", num_blocks_per_group=1)
    torch._dynamo.reset()
    ours: Any = chipmunk(model, options=EXACT | TOLD | {"schedule.branches": 1})
    steps = calls(TIMES)
    assert_same(run(ours, steps[:2]), run(torch_only, steps[:2]))
    for each in (model, torch_only):
        layer = each.blocks[1].fc1
        layer.weight = nn.Parameter(layer.weight.detach() * 1.5)
    assert_same(run(ours, steps[2:]), run(torch_only, steps[2:]))
    anew = {tuple(site.phases[0]) for site in chipmunk_fx.summary(ours).sites}
    assert anew == {tuple(STEPS), ("refresh", "sparse", "refresh", "sparse")}


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("disk", [False, True])
def test_hooks_at_every_layer_leave_the_model_dense(whole: bool, disk: bool, tmp_path: Path):
    """No graph holds more than one layer."""
    model = TinyDiT(depth=2)
    grouped(model, "leaf_level", **({"offload_to_disk_path": str(tmp_path)} if disk else {}))
    torch._dynamo.reset()
    ours = chipmunk(model, options=SPARSE | TOLD) if whole else by_block(model)
    assert_same(generations(ours), generations(TinyDiT(depth=2)))
    assert not chipmunk_fx.summary(ours).phases
