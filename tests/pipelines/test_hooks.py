"""Pipelines whose models are moved to where they compute and back: diffusers' offloading beside our caches."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import chipmunk_fx
from tests.harness.tolerance import assert_near
from tests.pipelines.pipelines import PIPELINES, STEPS, Run
from tests.runtime.models import SPARSE, one_thread

PHASES = ["refresh", "sparse", "sparse", "refresh", "sparse", "sparse", "refresh", "sparse"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


def told(run: Run, base: dict[str, Any] = SPARSE) -> dict[str, Any]:
    return base | {"schedule.steps": STEPS, "schedule.branches": run.branches, "schedule.refresh_every": 3}


def whole(run: Run, options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    run.pipe.transformer.compile(backend="chipmunk", options=options)


def by_block(run: Run, options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    run.pipe.transformer.compile_repeated_blocks(backend="chipmunk", options=options)


def pictures(run: Run) -> list[Tensor]:
    """Two, after which every branch has gone through the schedule and no call fell back to dense."""
    done = [run(seed) for seed in range(2)]
    summary = chipmunk_fx.summary(run.model)
    assert summary.phases == dict.fromkeys(range(run.branches), PHASES) and not summary.fallbacks
    return done


@pytest.mark.parametrize("first", ["compiled", "hooked"])
@pytest.mark.parametrize("name", ["Flux", "Wan"])
def test_models_that_are_offloaded_whole(name: str, first: str):
    plain, run = PIPELINES[name](), PIPELINES[name]()
    whole(plain, told(plain))
    want = pictures(plain)
    if first == "hooked":
        run.pipe.enable_model_cpu_offload(device="cpu")
    whole(run, told(run))
    if first == "compiled":
        run.pipe.enable_model_cpu_offload(device="cpu")
    assert_near(pictures(run), want)


@pytest.mark.parametrize("name", ["Flux", "Wan"])
def test_blocks_that_are_offloaded_in_groups(name: str):
    plain, run = PIPELINES[name](), PIPELINES[name]()
    by_block(plain, told(plain))
    want = pictures(plain)
    run.model.enable_group_offload(CPU, CPU, "block_level", num_blocks_per_group=1)
    by_block(run, told(run))
    assert_near(pictures(run), want)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="streams to a GPU")
@pytest.mark.parametrize("options", [{}, {"record_stream": True}, {"low_cpu_mem_usage": True}], ids=str)
def test_blocks_that_are_streamed_to_a_gpu(options: dict[str, bool]):
    """The next group is fetched on a stream of its own while one computes, beside caches that stay."""
    plain, run = on_gpu(), on_gpu()
    plain.pipe.to("cuda")
    by_block(plain, told(plain))
    want = pictures(plain)
    groups = {"num_blocks_per_group": 1, "use_stream": True, **options}
    run.model.enable_group_offload(torch.device("cuda"), CPU, "block_level", **groups)
    by_block(run, told(run))
    assert_near(pictures(run), want)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="moves to a GPU")
def test_a_model_that_moves_to_a_gpu_for_every_picture():
    plain, run = on_gpu(), on_gpu()
    plain.pipe.to("cuda")
    whole(plain, told(plain))
    want = pictures(plain)
    whole(run, told(run))
    run.pipe.enable_model_cpu_offload()
    for got, expected in zip(pictures(run), want, strict=True):
        assert_near([got], [expected])
    run.pipe.maybe_free_model_hooks()
    assert {parameter.device for parameter in run.model.parameters()} == {CPU}


def on_gpu() -> Run:
    run = PIPELINES["Flux"]()
    run.arguments = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in run.arguments.items()}
    return run
