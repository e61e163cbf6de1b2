"""Orders of rows and columns that are always on, as pure functions of a layout."""

import pytest
import torch

from chipmunk_fx.config import AttentionConfig
from chipmunk_fx.graph.geometry import Layout
from chipmunk_fx.runtime.tables import Fixed, attention_tables, raster_rows, row_order

SQUARE = Layout(((1, 16, 16),), None, 0)
VIDEO = Layout(((4, 12, 16),), None, 0)


def tables(layout: Layout | None, rows: int = 16, raster: bool = False, count: int | None = None, **options):
    n = layout.image + layout.text if layout else count or 0
    return attention_tables(layout, n, n, rows, AttentionConfig(**options), raster)


@pytest.mark.parametrize("grid", [(1, 16, 16), (1, 7, 9), (1, 1, 5), (3, 5, 7), (4, 12, 16), (13, 2, 11)])
@pytest.mark.parametrize(("side", "text"), [(None, 0), ("first", 5), ("last", 5)])
def test_an_order_names_every_row_once(grid, side, text):
    layout = Layout((grid,), side, text)
    order = row_order(layout, raster=False)
    assert sorted(order.tolist()) == list(range(layout.image + text))
    words = range(text) if side == "first" else range(layout.image, layout.image + text)
    assert order[layout.image :].tolist() == list(words)


def test_tables_first_asked_for_in_inference_mode_serve_outside_it():
    with torch.inference_mode():
        made = tables(Layout(((1, 3, 7),), "last", 2), local_window=0.25)
    assert not made.order.is_inference() and not made.always.is_inference()


def test_a_group_of_an_image_is_a_square_patch():
    order = row_order(SQUARE, raster=False)
    for group in order.split(16):
        rows, columns = group // 16, group % 16
        assert rows.unique().tolist() == list(range(int(rows.min()), int(rows.min()) + 4))
        assert columns.unique().tolist() == list(range(int(columns.min()), int(columns.min()) + 4))
    for group in order.split(64):
        assert len((group // 16).unique()) == len((group % 16).unique()) == 8


def test_a_group_of_a_video_is_a_voxel():
    for group in row_order(VIDEO, raster=False).split(4 * 6 * 8):
        t, h, w = group // (12 * 16), group // 16 % 12, group % 16
        assert [len(axis.unique()) for axis in (t, h, w)] == [4, 6, 8]


def test_raster_keeps_the_order_but_for_text():
    assert row_order(SQUARE, raster=True).tolist() == list(range(256)) == raster_rows(256).tolist()
    assert row_order(Layout(((1, 2, 2),), "first", 2), raster=True).tolist() == [2, 3, 4, 5, 0, 1]


def test_text_columns_are_always_on():
    first, last = (tables(Layout(((1, 4, 4),), side, 3)) for side in ("first", "last"))
    assert first.always.nonzero()[:, 1].tolist() == [0, 1, 2] and first.always.shape == (1, 19)
    assert last.always.nonzero()[:, 1].tolist() == [16, 17, 18]
    assert first.fixed.most == 3 and tables(SQUARE).fixed.most == 0
    assert first.order.dtype == torch.int32


def test_text_rows_may_be_left_out():
    layout = Layout(((1, 4, 4),), "first", 3)
    assert sorted(tables(layout, text_rows="dense").order.tolist()) == list(range(3, 19))
    assert len(tables(layout).order) == 19


def test_groups_of_dense_text_have_no_windows():
    made = tables(Layout(((1, 8, 8),), "first", 40), text_rows="dense", local_window=0.1)
    assert len(made.order) == 64 and made.always.shape == (4, 104)


def test_without_a_layout_rows_stay_as_they_come():
    made = tables(None, count=20)
    assert made.order.tolist() == list(range(20)) and made.fixed.most == 0


def test_a_window_is_a_share_of_the_sequence_around_each_group():
    made = tables(None, count=64, rows=16, local_window=0.25)
    assert made.always.shape == (4, 64)
    spans = [(int(row.nonzero().min()), int(row.nonzero().max()) + 1) for row in made.always]
    assert spans == [(0, 24), (8, 40), (24, 56), (40, 64)]
    assert made.fixed == Fixed(most=32, mean=28.0)


def test_a_window_follows_the_order_of_the_groups():
    made = tables(SQUARE, rows=16, local_window=0.01)
    for group, row in zip(made.order.long().split(16), made.always, strict=True):
        assert row[group].all()


def test_a_cube_of_voxels_around_a_group():
    """Edge 1: the group's own 8x8 patch; edge 3: its neighbours too."""
    own, near = tables(SQUARE, rows=16, local_voxels=1), tables(SQUARE, rows=16, local_voxels=3)
    assert own.always.sum(1).tolist() == [64] * 16 and near.always.sum(1).tolist() == [256] * 16
    for group, row in zip(own.order.long().split(16), own.always, strict=True):
        assert row[group].all()


def test_a_cube_leaves_text_to_itself():
    layout = Layout(((1, 16, 16),), "first", 16)
    made = tables(layout, rows=16, local_voxels=1)
    assert made.always[:, :16].all()  # text columns, for every group
    assert made.always[-1].sum() == 16  # the group of text rows has no place in the picture
    assert made.always[0].sum() == 16 + 64


def test_keys_of_another_sequence_have_no_windows():
    made = attention_tables(Layout(((1, 4, 4),), None, 0), 16, 24, 16, AttentionConfig(local_window=0.5), False)
    assert made.always.shape[-1] == 24 and made.fixed.most == 0


PICTURES = Layout(((1, 16, 16), (1, 8, 24)), None, 0)


@pytest.mark.parametrize(("side", "text"), [(None, 0), ("first", 5), ("last", 5)])
def test_pictures_are_ordered_one_by_one(side, text):
    """Each as it is alone, behind the others; text after all of them."""
    layout = Layout(PICTURES.grids, side, text)
    alone = [row_order(Layout((grid,), None, 0), raster=False) for grid in layout.grids]
    offset = text if side == "first" else 0
    words = torch.arange(text) + (0 if side == "first" else layout.image)
    assert torch.equal(row_order(layout, raster=False), torch.cat([alone[0] + offset, alone[1] + offset + 256, words]))
    assert row_order(layout, raster=True)[: layout.image].tolist() == list(range(offset, offset + layout.image))


def test_a_cube_stays_in_its_picture():
    made = tables(PICTURES, rows=64, local_voxels=1)
    assert made.always.sum(1).tolist() == [64] * 7
    for group, row in zip(made.order.long().split(64), made.always, strict=True):
        assert row[group].all()
    assert tables(PICTURES, rows=64, local_voxels=3).always[4:, :256].sum() == 0


@pytest.mark.parametrize(
    ("grid", "size"),
    [((1, 48, 80), (1, 8, 8)), ((1, 20, 12), (1, 8, 8)), ((9, 45, 80), (4, 6, 8)), ((28, 30, 53), (4, 6, 8))],
)
def test_patches_that_follow_each_other_are_neighbours(grid: tuple[int, int, int], size: tuple[int, int, int]):
    """At the ends of lines, too: a group may take parts of several."""
    order = row_order(Layout((grid,), None, 0), raster=False)
    _, height, width = grid
    places = torch.stack([order // (height * width), order // width % height, order % width], 1)
    patches = places // torch.tensor(size)
    assert (patches.diff(dim=0).abs().sum(1) <= 1).all()
