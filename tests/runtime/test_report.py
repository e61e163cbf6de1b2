"""Reports of a model in pieces are one report."""

import json
from typing import Any

import pytest

from chipmunk_fx.runtime.report import Report, SiteReport, merge


def site(
    name: str, kind: str = "attention", accepted: bool = True, status: Any = "rewritten", flops: int = 10
) -> SiteReport:
    return SiteReport(name, kind, "self", accepted, status, "", (1, 2, 8, 8, 4), "model.py:1", flops)


MISSED = SiteReport(
    "b",
    "attention",
    "unknown",
    False,
    "dense",
    "wanted 1, saw 2",
    (1, "u0"),
    "model.py:2",
    5,
    "sdpa",
    "mul_1",
    "wanted 1",
)
FIRST = Report((site("a"), MISSED), "t", None, (), "raster", 0.2, ("one",), total_flops=50)
SECOND = Report(
    (site("c"), site("d", "mlp", flops=30), site("e", status="dense", flops=100)),
    None, "x", ("text",), "convolution", 0.4, total_flops=150,
)  # fmt: skip


def test_pieces_are_joined():
    merged = merge([FIRST, SECOND], ["two"])
    assert [s.name for s in merged.sites] == ["a", "b", "c", "d", "e"]
    assert (merged.timestep, merged.latents, merged.text) == ("t", "x", ("text",))
    assert merged.notes == ("one", "two")
    assert (merged.count("attention"), merged.count("attention", "dense"), merged.count("mlp")) == (3, 1, 1)


def test_coverage_of_pieces_is_weighed_by_their_work():
    merged = merge([FIRST, SECOND])
    assert merged.total_flops == 200
    assert merged.coverage == pytest.approx((0.2 * 50 + 0.4 * 150) / 200)
    assert merged.accepted_coverage == pytest.approx((10 + 10 + 30 + 100) / 200)


def test_sites_are_tallied():
    merged = merge([FIRST, SECOND])
    assert merged.tally("attention") == {"rewritten": 2, "accepted": 3, "found": 4}
    assert merged.tally("mlp") == {"rewritten": 1, "accepted": 1, "found": 1}
    summary = json.loads(merged.to_json())["summary"]
    assert summary == {"attention": merged.tally("attention"), "mlp": merged.tally("mlp"), "accepted_coverage": 0.75}


def test_nothing_captured_is_an_empty_report():
    merged = merge([], ["why"])
    assert merged.sites == () and merged.notes == ("why",) and merged.count("mlp") == 0
    assert "why" in str(merged)


def test_a_near_miss_is_shown_with_pattern_node_and_reason():
    lines = str(FIRST).splitlines()
    missed = next(line for line in lines if line.startswith("b"))
    assert all(word in missed for word in ("refused", "sdpa", "mul_1", "wanted 1, saw 2", "1xu0", "model.py:2"))
    assert "rewritten" in next(line for line in lines if line.startswith("a"))


def test_the_last_lines_sum_up():
    shown = str(FIRST)
    assert "1 of 1 attention sites rewritten (2 found), 0 of 0 mlp sites rewritten (0 found)" in shown
    assert "they hold 20.0% of 5e-08 G floating-point operations, accepted ones 20.0%" in shown
