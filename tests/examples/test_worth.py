"""The table of settings, on small pictures and few steps."""

import json
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from chipmunk_fx.config import Config

pytest.importorskip("diffusers")
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def worth(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The script, set to five steps; its neighbours are importable only meanwhile."""
    names = ("worth", "flux", "common", "measure", "photos")
    monkeypatch.syspath_prepend(EXAMPLES)
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    script: Any = import_module("worth")
    monkeypatch.setattr(script, "STEPS", 5)
    yield script
    for name in names:
        sys.modules.pop(name, None)


def test_settings_are_compared_and_drawn(worth: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    chosen = {"defaults": {}, "exact": {"preset": "exact"}, "two alone": worth.skipping([2, 3], **worth.ALONE)}
    chosen["all that may be"] = {"schedule.skip_threshold": 1e6, **worth.ALONE}
    worth.SETTINGS = chosen
    out, chart = tmp_path / "made" / "worth.jsonl", tmp_path / "worth.svg"
    worth.main(["--device", "cpu", "--images", "2", "--size", "32", "--out", str(out), "--plot", str(chart)])
    rows = {row["name"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert list(rows) == list(chosen)
    assert rows["exact"]["psnr"] > 30 > rows["defaults"]["psnr"] > rows["defaults"]["least"]
    assert rows["two alone"]["skipped"] == 2 and 0.6 < rows["two alone"]["operations"] < 0.65
    assert rows["all that may be"]["skipped"] == 3
    assert "two alone" in capsys.readouterr().out.splitlines()[-2]
    assert chart.stat().st_size > 1000


def test_masses_are_compared_with_another_default(worth: Any):
    strides = [s["attention.mass_stride"] for s in worth.SETTINGS.values() if "attention.mass_stride" in s]
    assert strides and Config().attention.mass_stride not in strides


def test_figures_of_several_runs_join(worth: Any, tmp_path: Path):
    lines = [
        {"name": "a", "psnr": 30.0},
        {"name": "dense", "ms": {"dense": 180.0}, "timed": {"dense": 50}},
        {"name": "a", "ms": {"refresh": 300.0, "sparse": 100.0}, "timed": {"refresh": 1, "sparse": 1}, "psnr": 31.0},
        {"name": "a", "operations": 0.5, "skipped": 0, "steps": {"refresh": 5, "sparse": 35}},
    ]
    (tmp_path / "worth.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = worth.read(tmp_path / "worth.jsonl")
    assert [(row["name"], row["seconds"]) for row in rows] == [("a", pytest.approx(5.0)), ("dense", pytest.approx(9.0))]
    assert rows[0]["psnr"] == 31.0 and "31.0" in worth.table(rows)
    worth.plot(rows, tmp_path / "worth.svg")
    assert "seconds a picture, s" in (tmp_path / "worth.svg").read_text()
    untimed = {"name": "b", "psnr": 30.0, "operations": 0.4, "skipped": 3}
    worth.plot([untimed], tmp_path / "worth.svg")
    assert "operations a picture, share of dense" in (tmp_path / "worth.svg").read_text()


def test_settings_that_differ_in_their_schedule_share_times(worth: Any, tmp_path: Path):
    lines = [
        {"name": "MLP dense", "ms": {"refresh": 300.0, "sparse": 100.0}, "timed": {"refresh": 1, "sparse": 1}},
        {"name": "R.s. between dense steps", "ms": {"dense": 200.0, "skip": 5.0}, "timed": {"dense": 1, "skip": 1}},
        {"name": "Rss between dense steps", "steps": {"dense": 10, "refresh": 10, "sparse": 30}},
        {"name": "defaults", "steps": {"refresh": 5, "sparse": 45}},
    ]
    (tmp_path / "worth.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = {row["name"]: row for row in worth.read(tmp_path / "worth.jsonl")}
    assert rows["Rss between dense steps"]["seconds"] == pytest.approx(2 + 3 + 3)
    assert "seconds" not in rows["defaults"]  # its MLPs are sparse: nothing like it was timed


@pytest.mark.full
def test_steps_are_timed_by_phase(worth: Any, tmp_path: Path):
    worth.SETTINGS = {"one skipped": worth.skipping([2])}
    out = tmp_path / "worth.jsonl"
    worth.main(["--device", "cpu", "--size", "32", "--out", str(out), "--seconds", "one skipped"])
    dense, row = map(json.loads, out.read_text().splitlines())
    assert dense["name"] == "dense" and dense["ms"].keys() == {"dense"}
    assert row["timed"] == {"refresh": 1, "sparse": 3, "skip": 1} and all(ms > 0 for ms in row["ms"].values())


def test_patterns_between_dense_steps(worth: Any):
    lists = worth.between("R.s.")
    assert [len(steps) for steps in lists.values()] == [9, 18, 14]
    assert lists["schedule.refresh_steps"][:2] == [8, 12] and lists["schedule.skip_steps"][:3] == [9, 11, 13]
