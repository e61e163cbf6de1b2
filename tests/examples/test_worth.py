"""The table of settings, on small pictures and few steps."""

import json
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

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


def test_figures_of_several_runs_join(worth: Any, tmp_path: Path):
    lines = [
        {"name": "a", "psnr": 30.0},
        {"name": "dense", "seconds": 9.0},
        {"name": "a", "seconds": 5.0, "psnr": 31.0},
    ]
    (tmp_path / "worth.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = worth.read(tmp_path / "worth.jsonl")
    assert rows == [{"name": "a", "psnr": 31.0, "seconds": 5.0}, {"name": "dense", "seconds": 9.0}]
    assert "31.0" in worth.table(rows)
