"""Selection by kernels: the same columns as by sorting, and one drawn from each run of the others."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from chipmunk_fx.kernels.triton import selection
from chipmunk_fx.ops.selection import spare_places

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# row lengths and where a row counts as long: held at once, or bracketed by a sample and a histogram
ROUTES = pytest.mark.parametrize("whole", [16384, 64], ids=["held", "bracketed"])


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "SAMPLE", 128)
    monkeypatch.setattr(selection, "LONG_WARPS", 1)


def chosen(scores: Tensor, columns: int, drawn: int, step: int = 3, **more: Any) -> Tensor:
    lists = torch.full((scores.shape[0], columns), -7, dtype=torch.int32, device=DEVICE)
    clock = torch.tensor([step, 1], device=DEVICE)
    selection.select(lists, scores, more.pop("minus", None), clock, drawn=drawn, seed=5, site=2, **more)
    return lists.cpu()


def expected(row: Tensor, count: int, always: Tensor | None, valid: Tensor | None) -> Tensor:
    """bool [M]: the largest scores, of equal ones the first."""
    keys = row.double()
    if always is not None:
        keys = keys.masked_fill(always, torch.inf)
    if valid is not None:
        keys = keys.masked_fill(~valid, -torch.inf)
    taken = torch.zeros(row.shape, dtype=torch.bool)
    taken[keys.sort(descending=True, stable=True).indices[:count]] = True
    return taken


def assert_list(
    row: Tensor, own: Tensor, drawn: int, always: Tensor | None = None, valid: Tensor | None = None, spare: int = 0
) -> None:
    total, columns = row.shape[0], own.shape[0] - spare
    eligible = total if valid is None else int(valid.sum())
    wanted = min(columns - drawn, eligible)
    if drawn >= eligible - wanted:
        wanted, drawn = eligible, 0
    assert (own[wanted + drawn :] == total).all()
    present = own[: wanted + drawn].long()
    assert (present.diff() > 0).all() and present.min() >= 0 and present.max() < total
    best = expected(row, wanted, always, valid)
    others = ~best if valid is None else ~best & valid
    listed = torch.zeros(total, dtype=torch.bool).index_fill_(0, present, True)
    assert listed[best].all() and not listed[~best & ~others].any()
    # which of the free columns are drawn, counted from 0: one in each run
    places = listed[others].nonzero().flatten()
    edges = torch.arange(drawn + 1) * int(others.sum()) // max(drawn, 1)
    assert len(places) == drawn
    assert (places >= edges[:-1]).all() and (places <= edges[1:]).all()


def codes(rows: int, total: int, levels: int) -> Tensor:
    return torch.randint(0, levels, (rows, total)).to(torch.uint16)


@pytest.mark.parametrize(("whole", "bins"), [(16384, 1024), (64, 1024), (64, 16)])
@pytest.mark.parametrize(("total", "levels"), [(130, 3), (1000, 1), (1000, 200), (1000, 65535)])
def test_of_codes(whole: int, bins: int, total: int, levels: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(selection, "WHOLE", whole)
    monkeypatch.setattr(selection, "BINS", bins)
    scores = codes(1, total, levels)
    for columns, drawn in ((1, 1), (total // 10, total // 50), (total // 2, total // 3), (total - 1, 1)):
        lists = chosen(scores.to(DEVICE), columns, drawn)
        for row, own in zip(scores.int(), lists, strict=True):
            assert_list(row, own, drawn)


@ROUTES
def test_of_changes(whole: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(selection, "WHOLE", whole)
    new, old = torch.randn(2, 300), torch.randn(2, 300)
    lists = chosen(new.to(DEVICE), 40, 6, minus=old.to(DEVICE))
    for row, own in zip((new - old).abs(), lists, strict=True):
        assert_list(row, own, 6)


@ROUTES
@pytest.mark.parametrize("present", [300, 60, 20, 0])
def test_of_valid_columns_with_some_always_on(whole: int, present: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(selection, "WHOLE", whole)
    scores, always, valid = codes(4, 300, 50), torch.zeros(1, 300, dtype=torch.bool), torch.zeros(2, 300) > 0
    always[:, [0, 7, 150, 299]] = True
    valid[0, torch.randperm(300)[:present]] = True
    valid[1] = True
    lists = chosen(
        scores.to(DEVICE), 50, 10, always=always.to(DEVICE), valid=valid.to(DEVICE), rows_a_batch=2
    )  # fmt: skip
    for index, own in enumerate(lists):
        mask = valid[index // 2]
        if mask.any():
            assert_list(scores[index].int(), own, 10, always[0] & mask, mask)
        else:
            assert (own == 300).all()


@ROUTES
def test_of_groups_with_more_or_fewer_always_on(whole: int, monkeypatch: pytest.MonkeyPatch):
    """Rows are of two batch entries with three groups each; in the last entry most columns are not valid."""
    monkeypatch.setattr(selection, "WHOLE", whole)
    scores, always, valid = codes(6, 300, 50), torch.zeros(3, 300, dtype=torch.bool), torch.ones(2, 300) > 0
    always[1, 100:120], always[2, 40:75] = True, True
    valid[1, 50:280] = False
    spare = spare_places(always, valid, 60)
    assert spare.tolist() == [[35, 15, 0], [35, 35, 25]]
    lists = chosen(
        scores.to(DEVICE), 60, 10, always=always.to(DEVICE), valid=valid.to(DEVICE), rows_a_batch=3,
        spare=spare.int().to(DEVICE),
    )  # fmt: skip
    for index, own in enumerate(lists):
        b, g = divmod(index, 3)
        assert_list(scores[index].int(), own, 10, always[g] & valid[b], valid[b], int(spare[b, g]))


def test_a_bracket_that_misses_is_left(monkeypatch: pytest.MonkeyPatch):
    """The sample sees only small scores, then only large ones."""
    monkeypatch.setattr(selection, "WHOLE", 64)
    total = 1280
    sampled = torch.arange(128) * total // 128
    for low, high in ((5, 60000), (60000, 5)):
        row = torch.full((1, total), high).index_fill_(1, sampled, low) + torch.arange(total) % 7
        lists = chosen(row.to(torch.uint16).to(DEVICE), 100, 0)
        assert_list(row[0], lists[0], 0)


def test_steps_and_rows_draw_differently_and_evenly():
    scores = torch.zeros(60, 256, dtype=torch.uint16, device=DEVICE)
    lists = torch.cat([chosen(scores, 60, 30, step) for step in range(2)])
    drawn = lists[lists >= 30].view(120, 30)  # the first thirty of equal scores are taken
    assert len({tuple(row.tolist()) for row in drawn}) == 120
    counts = torch.bincount(drawn.flatten(), minlength=256)[30:].float()
    # each of 226 free columns expects 16 of 3600; five standard deviations are 20
    assert (counts - 120 * 30 / 226).abs().max() < 20
