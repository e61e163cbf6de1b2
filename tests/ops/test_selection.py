"""Which columns are taken: by score, always-on, at random."""

import pytest
import torch

from chipmunk_fx.ops.groups import left_out, spans
from chipmunk_fx.ops.selection import draw, random_count, select, stream, substream


def key(seed: int = 0, site: int = 0, step: int = 0, head: int = 0) -> torch.Tensor:
    return substream(stream(seed, site, torch.tensor(step)), head)


@pytest.mark.parametrize("total", [7, 63, 1000])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_best_columns_come_first_and_random_ones_fill_up(total: int, share: float):
    scores = torch.rand(5, total)
    columns = max(1, int(share * total))
    for drawn in {0, columns // 2, columns}:
        lists = select(scores, columns, drawn, key())
        assert lists.shape == (5, columns) and lists.dtype == torch.int32
        assert (lists.diff() > 0).all() and lists.min() >= 0 and lists.max() < total
        best = scores.topk(columns - drawn).indices
        assert all(set(b.tolist()) <= set(row.tolist()) for b, row in zip(best, lists, strict=True))


def test_all_columns():
    assert torch.equal(select(torch.rand(3, 10), 10, 0, key()), torch.arange(10).expand(3, 10))


@pytest.mark.parametrize("rows", [1, 4])
def test_always_on_columns_are_there_whatever_their_score(rows: int):
    scores = torch.rand(4, 200)
    always = torch.zeros(rows, 200, dtype=torch.bool)
    for row, mask in enumerate(always):
        mask[[0, 50 + row, 199]] = True
    lists = select(scores * ~always, 10, 4, key(), always)
    taken = torch.zeros(4, 200, dtype=torch.bool).scatter_(1, lists.long(), True)
    assert (taken | ~always).all()


def test_equal_and_undefined_scores_still_give_distinct_columns():
    for scores in (torch.zeros(3, 100), torch.full((3, 100), torch.nan)):
        assert (select(scores, 30, 5, key()).diff() > 0).all()


def test_draws_are_roughly_uniform_over_the_free_columns():
    """20,000 draws over 75 free columns: each expects 266.7, five standard deviations are 82."""
    taken = torch.zeros(1, 100, dtype=torch.bool)
    taken[:, 10:35] = True
    counts = torch.zeros(100)
    for step in range(2000):
        columns = draw(taken, 75, 10, key(step=step))
        assert columns.unique().numel() == 10
        counts[columns[0]] += 1
    assert counts[10:35].sum() == 0
    assert (counts[~taken[0]] - 20000 / 75).abs().max() < 82


def test_groups_heads_steps_sites_and_seeds_draw_differently():
    taken = torch.zeros(4, 4096, dtype=torch.bool)
    keys = [key(), key(seed=1), key(site=1), key(step=1), key(head=1), key(seed=2**40 + 1, site=7)]
    draws = [draw(taken, 4096, 40, k) for k in keys]
    assert torch.equal(draws[0], draw(taken, 4096, 40, key()))
    rows = [tuple(row.tolist()) for rows in draws for row in rows]
    assert len(set(rows)) == len(rows)


@pytest.mark.parametrize(
    ("total", "density", "columns", "expected"),
    [(30, 0.1, 20, 3), (4096, 0.01, 704, 41), (100, 1.0, 20, 20), (100, 0.5, 100, 0), (100, 0.0, 20, 0)],
)
def test_random_count(total: int, density: float, columns: int, expected: int):
    assert random_count(total, density, columns) == expected


@pytest.mark.parametrize(("rows", "height", "at_once"), [(1, 16, 4), (63, 16, 2), (64, 16, 3), (1000, 48, 100)])
def test_spans_cover_every_row_once(rows: int, height: int, at_once: int):
    covered, groups = [], []
    for span in spans(rows, height, at_once):
        assert span.count <= at_once
        assert span.rows.stop - span.rows.start == span.count * span.height
        covered += range(rows)[span.rows]
        groups += range(10**6)[span.groups]
    assert covered == list(range(rows))
    assert groups == list(range(-(-rows // height)))


def test_left_out():
    assert left_out(torch.tensor([4, 0, 2], dtype=torch.int32), 6).tolist() == [1, 3, 5]
    assert left_out(torch.tensor([1, 0], dtype=torch.int32), 2).tolist() == []
