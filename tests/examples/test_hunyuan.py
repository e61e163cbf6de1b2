"""HunyuanVideo's example, on a tiny model that is saved and loaded again: 5 of its 12 text tokens are words."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.examples.scripts import script
from tests.harness.tolerance import FP32
from tests.runtime.models import one_thread

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
image = pytest.importorskip("PIL.Image")

TINY = ("--tiny", "--device", "cpu", "--steps", 4)
EXACT = (*TINY, "--option", "preset=exact", "--option", "schedule.refresh_steps=[0, 2]")
PHASES = {"transformer": {0: ["refresh", "sparse", "refresh", "sparse"]}}


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


def test_density_one_equals_the_uncompiled_pipeline():
    with script("hunyuan", "run") as hunyuan:
        done = hunyuan(*EXACT)
    assert done["phases"] == PHASES and done["fallbacks"] == {"transformer": 0}
    assert done["relative_error"] < FP32 and done["frames"]["dense"].std() > 0.1


def test_sparse_by_the_published_settings():
    with script("hunyuan", "run") as hunyuan:
        done = hunyuan(*TINY)
    assert done["phases"] == {"transformer": {0: ["refresh", "refresh", "sparse", "sparse"]}}
    assert 0 < done["relative_error"] < 1 and done["flops_ratio"]["transformer"] < 1


def test_from_a_picture(tmp_path: Path):
    image.radial_gradient("L").convert("RGB").save(tmp_path / "first.png")
    with script("hunyuan", "run") as hunyuan:
        done = hunyuan(*EXACT, "--image", tmp_path / "first.png")
    assert done["phases"] == PHASES and done["relative_error"] < FP32
    assert done["frames"]["chipmunk"].shape == (4, 2, 16, 16), "the picture's own latents are cut off"
