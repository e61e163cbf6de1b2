"""Tables of a sequence, made on the CPU: in which order its rows are grouped, and which columns are always selected.

Rows that share a column list should want the same columns, so neighbours in a group are neighbours in the picture: 8x8
patches made of 4x4 ones, or 4x6x8 voxels in video (method.md, "Order of tokens").
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from math import ceil, prod

import torch

from chipmunk_fx.config import AttentionConfig
from chipmunk_fx.graph.geometry import Grid, Layout

PATCHES = ((1, 8, 8), (1, 4, 4))  # outer to inner, in tokens (t, h, w)
VOXELS = ((4, 6, 8),)


@dataclass(frozen=True)
class Fixed:
    """How many columns the group of most always takes, and all groups in the mean."""

    most: int = 0
    mean: float = 0.0

    @classmethod
    def of(cls, counts: torch.Tensor) -> Fixed:
        return cls(int(counts.max()), float(counts.float().mean()))


@dataclass(frozen=True)
class Tables:
    """order: int32 [P], rows in group order (rows left out are dense). always: bool [1 or G, M]."""

    order: torch.Tensor
    always: torch.Tensor

    @cached_property  # reads a device, which no later step may wait for
    def fixed(self) -> Fixed:
        return Fixed.of(self.always.sum(1))


def row_order(layout: Layout, raster: bool) -> torch.Tensor:
    """All rows, image tokens in patch or voxel order first, then text: int64 [image + text]."""
    orders = [_patch_order(grid) + start for grid, start in pictures(layout)]
    image = torch.arange(layout.image, device="cpu") if raster else torch.cat(orders)
    text = torch.arange(layout.text, device="cpu")
    if layout.side == "first":
        return torch.cat([image + layout.text, text])
    return torch.cat([image, text + layout.image])


def pictures(layout: Layout) -> list[tuple[Grid, int]]:
    """The grid of each picture, and its first token among those of images."""
    starts = accumulate(map(prod, layout.grids), initial=0)
    return list(zip(layout.grids, starts, strict=False))


def raster_rows(rows: int) -> torch.Tensor:
    return torch.arange(rows, device="cpu")


def text_columns(layout: Layout | None, columns: int) -> torch.Tensor:
    """bool [1, columns], true for text."""
    always = torch.zeros(1, columns, dtype=torch.bool, device="cpu")
    if layout is not None and layout.text:
        start = 0 if layout.side == "first" else layout.image
        always[:, start : start + layout.text] = True
    return always


def local_columns(
    order: torch.Tensor, layout: Layout | None, columns: int, rows: int, config: AttentionConfig
) -> torch.Tensor:
    """bool [G, columns]: what lies near each group, by `local_window` (along the order) and `local_voxels` (in the grid)."""
    groups = ceil(len(order) / rows)
    near = torch.zeros(groups, columns, dtype=torch.bool, device="cpu")
    if columns != len(order):  # keys of another sequence have no place in this one's order
        return near
    reach = int(config.local_window * columns / 2)
    for group in range(groups):
        start, stop = group * rows, min((group + 1) * rows, len(order))
        if config.local_window:
            near[group, order[max(0, start - reach) : stop + reach]] = True
        if config.local_voxels and layout is not None:
            near[group, _cube(order[start:stop], layout, config.local_voxels)] = True
    return near


@lru_cache(maxsize=16)  # of each site's length for a few sizes of picture
@torch.inference_mode(False)  # remembered, and asked for outside it too
def attention_tables(
    layout: Layout | None, queries: int, keys: int, rows: int, config: AttentionConfig, raster: bool
) -> Tables:
    """Tables of an attention site with `queries` rows, `keys` columns and groups of `rows` rows; nobody writes to them.

    Remembered: windows of 75,600 keys take a second to find, and every generation asks for them.
    """
    order = raster_rows(queries) if layout is None else row_order(layout, raster)
    always = text_columns(layout, keys)
    if config.local_columns:
        always = always | local_columns(order, layout, keys, rows, config)
    if layout is not None and config.text_rows == "dense":
        order = order[: layout.image]
        always = always[: max(ceil(len(order) / rows), 1)]
    return Tables(order.to(torch.int32), always)


def _patch_order(grid: Grid) -> torch.Tensor:
    """Raster index of each image token in patch order; ragged edges make smaller patches.

    Lines of the outermost patches run there and back, so that a group that takes the last of one and the first of the next
    has neighbours.
    """
    t, h, w = (c.reshape(-1) for c in torch.meshgrid(*(torch.arange(n, device="cpu") for n in grid), indexing="ij"))
    coordinates = [t, h, w]
    key = torch.zeros_like(t)
    span = list(grid)
    for level, sizes in enumerate(PATCHES if grid[0] == 1 else VOXELS):
        for axis in range(3):
            count = ceil(span[axis] / sizes[axis])
            place = coordinates[axis] // sizes[axis]
            if level == 0:  # key: the number of this line of patches
                place = torch.where(key % 2 == 0, place, count - 1 - place)
            key = key * count + place
        coordinates = [c % size for c, size in zip(coordinates, sizes, strict=True)]
        span = list(sizes)
    for axis in range(3):
        key = key * span[axis] + coordinates[axis]
    return torch.argsort(key)


def _cube(rows: torch.Tensor, layout: Layout, edge: int) -> torch.Tensor:
    """Columns whose voxel lies within the cube of `edge` voxels around that of the group's middle row, in one picture."""
    offset = layout.text if layout.side == "first" else 0
    inside = rows[(rows >= offset) & (rows < offset + layout.image)] - offset
    if len(inside) == 0:
        return torch.zeros(0, dtype=torch.int64, device="cpu")
    row = inside[len(inside) // 2]
    grid, start = next(picture for picture in reversed(pictures(layout)) if picture[1] <= row)
    size = (VOXELS if grid[0] > 1 else PATCHES)[0]
    middle, voxels = (_voxel(index, grid, size) for index in (row - start, torch.arange(prod(grid), device="cpu")))
    close = torch.stack([(v - m).abs() <= edge // 2 for v, m in zip(voxels, middle, strict=True)]).all(0)
    return close.nonzero().squeeze(1) + start + offset


def _voxel(index: torch.Tensor, grid: Grid, size: Grid) -> list[torch.Tensor]:
    _, h, w = grid
    return [index // (h * w) // size[0], index // w % h // size[1], index % w // size[2]]
