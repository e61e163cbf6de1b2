"""Mochi's example, on a tiny model that is saved and loaded again: one graph, a batch of two for guidance."""

from collections.abc import Iterator

import pytest

from tests.examples.scripts import script
from tests.harness.tolerance import FP32
from tests.runtime.models import one_thread

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

TINY = ("--tiny", "--device", "cpu", "--steps", 4)


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


def test_density_one_equals_the_uncompiled_pipeline():
    with script("mochi", "run") as mochi:
        done = mochi(*TINY, "--option", "preset=exact", "--option", "schedule.refresh_steps=[0, 2]")
    assert done["phases"] == {"transformer": {0: ["refresh", "sparse", "refresh", "sparse"]}}
    assert done["fallbacks"] == {"transformer": 0} and done["relative_error"] < FP32
    assert done["frames"]["dense"].std() > 0.1


def test_sparse_by_the_published_settings():
    with script("mochi", "run") as mochi:
        done = mochi(*TINY)
    assert done["phases"] == {"transformer": {0: ["refresh", "refresh", "sparse", "sparse"]}}
    assert 0 < done["relative_error"] < 1 and done["flops_ratio"]["transformer"] < 1


def test_there_is_no_pipeline_that_starts_from_a_picture(capsys: pytest.CaptureFixture[str]):
    with script("mochi", "run") as mochi, pytest.raises(SystemExit):
        mochi(*TINY, "--image", "first.png")
    assert "no pipeline of mochi that starts from a picture" in " ".join(capsys.readouterr().err.split())
