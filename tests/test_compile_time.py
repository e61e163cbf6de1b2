"""How long compiling takes: matching, the variants of one graph, and a second process with warm caches.

As a script it makes a small model's first calls and prints what each took: every measurement has a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[1]))  # last: a folder of ours has the name of a distribution

import chipmunk_fx
from chipmunk_fx.graph.rewrite import rewrite
from chipmunk_fx.schedule.phase import Phase
from tests.harness.diffusers_models import position_ids, transformer
from tests.runtime.models import SPARSE, TinyDiT, calls, chipmunk, one_thread

PASSES = 3


def flux(double: int, single: int) -> tuple[Any, dict[str, Any]]:
    """A FLUX of so many blocks, 32 values wide, with 256 image and 48 text tokens."""
    torch.manual_seed(0)
    model = transformer(
        "FluxTransformer2DModel",
        patch_size=1,
        in_channels=4,
        num_layers=double,
        num_single_layers=single,
        num_attention_heads=2,
        attention_head_dim=16,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    )
    return model.eval(), {
        "hidden_states": torch.randn(1, 256, 4),
        "encoder_hidden_states": torch.randn(1, 48, 32),
        "pooled_projections": torch.randn(1, 32),
        "img_ids": position_ids(1, 16, 16),
        "txt_ids": torch.zeros(48, 3),
        "timestep": torch.ones(1),
        "return_dict": False,
    }


@pytest.mark.full
def test_matching_and_rewriting_57_blocks_takes_under_two_seconds():
    from tests.graph.capturing import captured, config_of

    model, inputs = flux(19, 38)
    options = {key.replace(".", "__"): value for key, value in SPARSE.items()}
    seen, config = captured(model, **inputs), config_of(options)
    spent = []
    for _ in range(PASSES):
        start = time.process_time()  # of this process alone, whatever else the machine does
        plan = seen.plan(**options)
        for phase in (Phase.REFRESH, Phase.SPARSE):
            rewrite(seen.capture, plan, config, phase)
        spent.append(time.process_time() - start)
    assert len(plan.rewritten) == 19 * 3 + 38 * 2
    assert min(spent) < 2, spent


@pytest.mark.full
def test_three_variants_compile_in_twice_the_time_of_one(tmp_path: Path):
    one, three = first_calls(tmp_path / "one", "one"), first_calls(tmp_path / "three", "three")
    assert three["phases"] == ["refresh", "sparse", "dense"]
    assert sum(three["seconds"]) <= 2.0 * sum(one["seconds"]), (one, three)


@pytest.mark.full
def test_four_variants_compile_in_2_3_times_the_time_of_one(tmp_path: Path):
    one, four = first_calls(tmp_path / "one", "one"), first_calls(tmp_path / "four", "four")
    assert four["phases"] == ["refresh", "sparse", "skip", "dense"]
    assert sum(four["seconds"]) <= 2.3 * sum(one["seconds"]), (one, four)


@pytest.mark.full
def test_a_second_process_starts_in_a_tenth_of_the_time(tmp_path: Path):
    cold, *warm = (first_calls(tmp_path, "first")["seconds"][0] for _ in range(1 + PASSES))
    assert median(warm) < cold / 10, (cold, warm)


def first_calls(cache: Path, mode: str) -> dict[str, Any]:
    """Seconds of processor time, compilers included, of a model's first calls in a new process, and their phases."""
    cached = {"TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"), "TRITON_CACHE_DIR": str(cache / "triton")}
    cached["TMPDIR"] = str(cache)  # where Inductor keeps torch's headers, precompiled, whatever its cache folder is
    cache.mkdir(exist_ok=True)
    command = [sys.executable, "-P", __file__, mode]
    done = subprocess.run(command, env=os.environ | cached, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@torch.no_grad()
def main(mode: str) -> None:
    """`one`: Inductor without us; `three`: ours until a call cannot be placed and is dense; `four`: with a skipped step
    before; `first`: ours, one call."""
    model = TinyDiT(depth=6)
    options = SPARSE | {"lowering": "inductor"} | ({"schedule.skip_steps": [2]} if mode == "four" else {})
    compiled: Any = torch.compile(model) if mode == "one" else chipmunk(model, options=options)
    times = {"three": (900, 700, 700), "four": (900, 700, 500, 500)}.get(mode, (900,))
    seconds = []
    with one_thread():
        for latents, timestep, _ in calls(times):
            start = processor_time()
            compiled(latents, timestep)
            seconds.append(processor_time() - start)
    phases = [] if mode == "one" else [p for strip in chipmunk_fx.summary(compiled).phases.values() for p in strip]
    print(json.dumps({"seconds": seconds, "phases": phases}))


def processor_time() -> float:
    """Seconds spent by this process and by the compilers that it has waited for."""
    return sum(os.times()[:4])


if __name__ == "__main__":
    main(sys.argv[1])
