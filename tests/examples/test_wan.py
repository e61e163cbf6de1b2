"""Wan's example, on a tiny model that is saved and loaded again."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from chipmunk_fx import bench_model
from chipmunk_fx.bench_subjects import Subject
from tests.examples.scripts import script
from tests.harness.tolerance import FP32
from tests.runtime.models import one_thread

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
image = pytest.importorskip("PIL.Image")

EXACT = ("--tiny", "--device", "cpu", "--option", "preset=exact", "--option", "schedule.refresh_every=2")


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


def test_density_one_equals_the_uncompiled_pipeline_in_both_transformers(tmp_path: Path):
    with script("wan", "run") as wan:
        done = wan(*EXACT, "--steps", 5, "--json", tmp_path / "wan.json")
    high, low = ["refresh", "sparse"], ["refresh", "sparse", "refresh"]  # each counts its own steps
    assert done["phases"] == {"transformer": {0: high, 1: high}, "transformer_2": {0: low, 1: low}}
    assert done["fallbacks"] == {"transformer": 0, "transformer_2": 0}
    assert done["relative_error"] < FP32
    assert done["frames"]["dense"].shape == (4, 3, 16, 16) and done["frames"]["dense"].std() > 0.1
    written = json.loads((tmp_path / "wan.json").read_text())
    assert written["speed_up"] == pytest.approx(written["dense_s"] / written["chipmunk_s"])
    assert len(written["chipmunk_calls_s"]) == 10 and written["psnr_db"] is None, "latents are no picture"


def test_sparse_by_the_published_settings(capsys: pytest.CaptureFixture[str]):
    with script("wan", "run") as wan:
        done = wan("--tiny", "--device", "cpu", "--steps", 5, "--explain", "--option", "attention.local_voxels=0")
    out = capsys.readouterr().out
    assert done["options"]["config"].endswith("configs/wan.yaml")
    assert out.count("2 of 2 attention sites rewritten") == 2, "explained for each transformer"
    assert 0 < done["relative_error"] < 1 and all(size > 0 for size in done["cache_bytes"].values())


def test_from_a_picture(tmp_path: Path):
    image.radial_gradient("L").convert("RGB").save(tmp_path / "first.png")
    with script("wan", "run") as wan:
        done = wan(*EXACT, "--steps", 3, "--image", tmp_path / "first.png")
    phases = ["refresh", "sparse", "refresh"]
    assert done["phases"] == {"transformer": {0: phases, 1: phases}}
    assert done["relative_error"] < FP32 and done["fallbacks"] == {"transformer": 0}


def test_random_weights_are_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    small = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "text_dim": 16}
    subject = Subject("WanTransformer3DModel", "wan", small, calls=2)
    monkeypatch.setitem(bench_model.SUBJECTS, "wan", subject)
    options = {"lowering": "eager", "gate": "off", "attention.group_rows": 16, "attention.local_voxels": 0}
    words = [word for key, value in options.items() for word in ("--option", f"{key}={value}")]
    size = ("--size", "64x64x9", "--blocks", 2, "--rounds", 1, "--dtype", "fp32", "--device", "cpu")
    with script("wan", "run") as wan:
        done = wan(
            "--random-weights", *size, *words, "--option", "attention.dense_layers=1", "--json", tmp_path / "w.json"
        )
    written = json.loads((tmp_path / "w.json").read_text())
    assert [way["way"] for way in written["ways"]] == ["dense", "sparse", "sparse + skip", "skip alone"]
    assert written["options"]["config"].endswith("configs/wan.yaml") and written["blocks"] == 2
    sparse = done["ways"][1]
    assert sparse.sites["attention"] == "1 of 2" and sparse.phases == {"refresh": 5, "sparse": 45}
    assert not sparse.fallbacks


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--option", "attention.density"], "write KEY=VALUE"),
        (["--tiny", "--option", "attention.denisty=0.1"], "Did you mean 'attention.density'"),
        (["--model", "nowhere/at/all"], "nowhere/at/all"),
        (["--size", "64x64"], "invalid size value"),
        (["--tiny", "--random-weights"], "not allowed with argument"),
        pytest.param(
            ["--device", "cuda"], "no CUDA device", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA")
        ),
    ],
)
def test_what_does_not_fit_is_told(words: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    with script("wan", "run") as wan, pytest.raises(SystemExit) as ended:
        wan(*words)
    assert ended.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
