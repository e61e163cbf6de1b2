"""The table that `chipmunk-fx bench kernels` makes, on shapes that a CPU times in no time."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from chipmunk_fx import bench
from chipmunk_fx.bench import Row, Shape, measure, steps_speed_up, sweep
from chipmunk_fx.cli import main

ATTENTION = Shape("small", "attention", 256, 64, heads=2, width=16)
MLP = Shape("small", "mlp", 256, 64, width=32, neurons=128)


def test_rows_of_a_table():
    rows = list(measure([ATTENTION, MLP], torch.float32, "cpu", seconds=0.01))
    assert [row.op for row in rows] == ["attention_refresh", "attention_sparse", "mlp_refresh", "mlp_sparse"]
    assert [row.density for row in rows] == [0.25, 0.25, 0.5, 0.5]
    for row, shape in zip(rows, (ATTENTION, ATTENTION, MLP, MLP), strict=True):
        computed = row.density if row.op.endswith("sparse") else 1
        assert row.ms > 0 and row.dense_ms > 0 and row.by == "reference"
        assert row.speed_up == pytest.approx(row.dense_ms / row.ms)
        assert row.share == pytest.approx(row.speed_up * computed)
        assert row.tflops == pytest.approx(shape.dense_flops * computed / row.ms / 1e9)
    assert "attention_sparse" in bench.table(rows)


def test_with_rest_three_calls_are_timed_after_it(monkeypatch: pytest.MonkeyPatch):
    rests: list[float] = []
    calls: list[int] = []
    monkeypatch.setattr(bench.time, "sleep", rests.append)
    bench.milliseconds(lambda: calls.append(len(rests)), torch.device("cpu"), rest=1.5)
    assert (rests, calls) == ([1.5], [0, 1, 1, 1])  # one before, to warm up


def test_operations_count_products_alone():
    assert ATTENTION.dense_flops == 2 * 2 * 2 * 256 * 256 * 16  # two products, two heads
    assert MLP.dense_flops == 2 * 2 * 256 * 32 * 128


def test_sizes_are_those_of_a_site():
    assert ATTENTION.sizes == (1, 2, 256, 256, 16)
    assert MLP.sizes == (1, 256, 32, 128, 32)


def test_the_sweep_has_every_pair():
    shapes = list(sweep([1024, 65536], [0.03, 0.5]))
    assert [(s.kind, s.rows) for s in shapes[:2]] == [("attention", 1024), ("mlp", 1024)]
    assert len(shapes) == 8
    assert all(s.columns % 16 == 0 and 0.03 <= s.density <= 0.51 for s in shapes)


def test_speed_up_of_ten_steps():
    sparse = Row("sweep", "attention_sparse", 1024, 0.25, "x", 2.0, 0, "y", 10.0, 5, 0)
    refresh = replace(sparse, op="attention_refresh", ms=12.0)
    other = replace(refresh, density=0.5, ms=1e9)
    # nine steps of 2 ms and one of 12, beside ten of 10
    assert steps_speed_up([other, refresh, sparse]) == {("attention", 1024, 0.25): pytest.approx(100 / 30)}


def test_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(bench, "PUBLISHED", (ATTENTION,))
    file = tmp_path / "bench.json"
    words = ["bench", "kernels", "--device", "cpu", "--dtype", "float32", "--only", "published", "--json", str(file)]
    assert main(words) == 0
    kept = json.loads(file.read_text())
    assert kept["dtype"] == "float32" and [row["op"] for row in kept["rows"]] == [
        "attention_refresh",
        "attention_sparse",
    ]
    assert "of ideal" in capsys.readouterr().out


def test_a_plot_needs_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(bench, "PUBLISHED", (ATTENTION,))
    words = ["bench", "kernels", "--device", "cpu", "--only", "published", "--plot", str(tmp_path / "bench.png")]
    assert main(words) == 2
    assert "--only" in capsys.readouterr().err
