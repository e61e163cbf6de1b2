"""What a summary says of work done: every number worked out by hand once."""

import sys
from pathlib import Path

import pytest

import chipmunk_fx
from chipmunk_fx.runtime.summary import COLOURS, PlotError, SiteSummary, Summary, site_flops
from chipmunk_fx.schedule.phase import Phase
from tests.graph.capturing import captured_tiny
from tests.runtime.models import TinyDiT, calls, compiled, run, words

TIMES = (900, 700, 500)
OFF = {"gate": "off", "attention__dense_layers": 0, "mlp__dense_layers": 0}


@pytest.fixture(scope="module")
def plan():
    return captured_tiny().plan(**OFF)


def test_operations_of_a_site(plan):
    attention, mlp = plan.sites
    dense = 4 * 2 * 72 * 72 * 16
    assert site_flops(attention, Phase.DENSE, 0.25, 1 / 4) == dense
    assert site_flops(attention, Phase.SPARSE, 0.25, 1 / 4) == dense / 4
    assert site_flops(attention, Phase.REFRESH, 0.25, 1 / 4) == dense * (1 + 1 / 8 + 1 / 4)
    assert site_flops(attention, Phase.REFRESH, 0.25, 0) == dense * (1 + 1 / 4)
    dense = 2 * 72 * 128 * (32 + 32)
    assert [site_flops(mlp, phase, 0.5, 1 / 4) for phase in (Phase.DENSE, Phase.REFRESH, Phase.SPARSE)] == [
        dense,
        dense,
        dense / 2,
    ]


def test_operations_of_a_generation(plan):
    model = compiled(TinyDiT())
    run(model, calls(TIMES))
    summary = chipmunk_fx.summary(model)
    attention, mlp = summary.sites
    # 12 of 72 keys by mass, 1 at random, 8 of text: two tiles of 16; 39 of 128 neurons and 7 at random: three.
    assert (attention.density, mlp.density) == (32 / 72, 48 / 128)
    a, m = (site.dense_flops for site in plan.sites)
    # masses of one row in 4 are half of dense attention's products for it
    refresh = plan.rest_flops + a * (1 + 1 / 8 + attention.density) + m
    sparse = plan.rest_flops + a * attention.density + m * mlp.density
    assert summary.flops_ratio == pytest.approx((refresh + 2 * sparse) / (3 * plan.total_flops))


def test_bytes_of_a_generation():
    model = compiled(TinyDiT())
    run(model, calls(TIMES))
    attention, mlp = chipmunk_fx.summary(model).sites
    groups = 5  # of 16 rows in 72
    assert attention.cache_bytes == 4 * (2 * 72 * 16 + 2 * 72) + 2 * (2 * groups * 32)  # rest, share, lists
    # hidden, out, mean, lists, by_neuron
    assert mlp.cache_bytes == 4 * (groups * 128 * 16 + 72 * 32 + groups * 128 + groups * 48 + 128 * 32)


def test_the_schedule_is_shown_as_a_strip_by_site():
    model = compiled(TinyDiT(depth=2), attention__dense_layers=1, schedule__refresh_every=2, schedule__skip_steps=[1])
    run(model, calls((900, 700, 500, 300), [words(1), words(2)]))
    summary = chipmunk_fx.summary(model)
    assert str(summary).splitlines()[:2] == ["branch 0: R.Rs", "branch 1: R.Rs"]
    strips = {(site.name, site.kind): site.strip for site in summary.sites}
    assert strips == {
        ("blocks.0", "attention"): "D.DD",
        ("blocks.0", "mlp"): "R.Rs",
        ("blocks.1", "attention"): "R.Rs",
        ("blocks.1", "mlp"): "R.Rs",
    }
    assert str(summary).count("R.Rs") == 5 and "(R refresh, s sparse, . skipped, D dense)" in str(summary)


def test_branches_that_differ_show_a_strip_each():
    site = SiteSummary("a", "mlp", "rewritten", "", {0: ["refresh", "sparse"], 1: ["refresh", "skip"]}, 0.3, 0)
    assert site.strip == "Rs R."


def test_a_model_without_sites_has_a_summary():
    shown = str(Summary(phases={0: ["dense", "skip"]}, sites=(), flops_ratio=0.5, cache_bytes=0, fallbacks=()))
    assert "branch 0: " in shown and "operations: 50.0% of dense" in shown and "cache MB" not in shown


def test_a_summary_is_drawn(tmp_path: Path):
    pytest.importorskip("matplotlib")
    model = compiled(TinyDiT(depth=2), schedule__skip_steps=[1])
    run(model, calls(TIMES))
    chipmunk_fx.summary(model).plot(tmp_path / "steps.svg")
    drawn = (tmp_path / "steps.svg").read_text()
    assert drawn.count("</svg>") == 1
    assert {colour for colour in COLOURS if f"fill: {colour}" in drawn} == set(COLOURS), "a phase each in the legend"


def test_what_cannot_be_drawn_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    drawable = Summary({0: ["dense"]}, (), 1.0, 0, ())
    with pytest.raises(PlotError, match="no branch 3 to draw; branches: 0$"):
        drawable.plot(tmp_path / "steps.png", branch=3)
    with pytest.raises(PlotError, match="no call has reached the backend yet"):
        Summary({}, (), 1.0, 0, ()).plot(tmp_path / "steps.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.colors", None)
    with pytest.raises(PlotError, match="pip install matplotlib"):
        drawable.plot(tmp_path / "steps.png")
