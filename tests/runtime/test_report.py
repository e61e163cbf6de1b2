"""Reports of a model in pieces are one report."""

from typing import Any

from chipmunk_fx.runtime.report import Report, SiteReport, merge


def site(name: str, kind: str = "attention", accepted: bool = True, status: Any = "rewritten") -> SiteReport:
    return SiteReport(name, kind, "self", accepted, status, "", (1, 2, 8, 8, 4), "model.py:1")


FIRST = Report((site("a"), site("b", accepted=False, status="dense")), "t", None, (), "raster", 0.2, ("one",))
SECOND = Report((site("c"), site("d", "mlp"), site("e", status="dense")), None, "x", ("text",), "convolution", 0.6)


def test_pieces_are_joined():
    merged = merge([FIRST, SECOND], ["two"])
    assert [s.name for s in merged.sites] == ["a", "b", "c", "d", "e"]
    assert (merged.timestep, merged.latents, merged.text) == ("t", "x", ("text",))
    assert merged.notes == ("one", "two")
    assert (merged.count("attention"), merged.count("attention", "dense"), merged.count("mlp")) == (3, 1, 1)


def test_nothing_captured_is_an_empty_report():
    merged = merge([], ["why"])
    assert merged.sites == () and merged.notes == ("why",) and merged.count("mlp") == 0
    assert "why" in str(merged)


def test_refused_sites_are_shown_as_such():
    lines = str(FIRST).splitlines()
    assert "refused" in next(line for line in lines if line.startswith("b"))
    assert "rewritten" in next(line for line in lines if line.startswith("a"))
    assert "1 of 1 attention sites rewritten" in str(FIRST)
