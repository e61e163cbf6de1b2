"""Tile sizes: pure functions from shape, dtype and device to frozen settings. No timing at run time."""

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Device:
    """What tile sizes depend on. shared: bytes of shared memory that one program may take; units: multiprocessors."""

    shared: int
    units: int
    hip: bool = False


INTERPRETER = Device(shared=1 << 30, units=1)


def device_of(x: torch.Tensor) -> Device:
    """The device that x lies on; a CPU stands for Triton's interpreter."""
    return INTERPRETER if x.device.type != "cuda" else _cuda_device(x.device)


@cache
def _cuda_device(device: torch.device) -> Device:
    found = torch.cuda.get_device_properties(device)
    hip = torch.version.hip is not None
    shared = 65536 if hip else found.shared_memory_per_block_optin
    return Device(shared, found.multi_processor_count, hip)


@dataclass(frozen=True)
class Tile:
    """rows of a group and columns (keys, neurons, widths) that a program works on at once; depth: of a product."""

    rows: int
    columns: int
    warps: int
    stages: int
    depth: int = 64

    @property
    def launch(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


def padded(size: int, least: int = 16) -> int:
    """The next power of two, at least `least`."""
    return max(least, 1 << (size - 1).bit_length())


def row_tile(group_rows: int, most: int = 128) -> int:
    """Rows at once: groups of 192 go as three times 64, not as 128 and half-empty 128."""
    if group_rows <= most:
        return padded(group_rows)
    return most if group_rows % most == 0 else most // 2


def attention_tile(width: int, group_rows: int, itemsize: int, device: Device) -> Tile:
    """Of the sparse attention kernel: q stays in shared memory, gathered keys and values pass through `stages` buffers."""
    wide = padded(width)
    if itemsize == 4:  # products on the plain units: small tiles keep what they need in registers
        return _fitting([Tile(row_tile(group_rows, 64), n, 4, s) for n, s in ((32, 2), (16, 1))], wide, 4, device)
    most = 128 if wide <= 128 else 64
    rows = row_tile(group_rows, most)
    # H200, width 128, 5376 of 75600 keys, ms: 64 columns, 4 warps, 2 stages 21.5; 3 stages 22.4; 8 warps 26.8 to 28.9;
    # 128 columns, 8 warps 23.0
    choices = ((64, 2), (32, 2), (32, 1), (16, 1)) if wide <= 128 else ((32, 2), (32, 1), (16, 1))
    return _fitting([Tile(rows, n, 4, s) for n, s in choices], wide, itemsize, device)


def _fitting(choices: list[Tile], wide: int, itemsize: int, device: Device) -> Tile:
    def taken(tile: Tile) -> int:
        return itemsize * wide * (tile.rows + 2 * tile.columns * tile.stages)

    return next((tile for tile in choices if taken(tile) <= device.shared), choices[-1])


def in_thirds(sampled: int) -> bool:
    """Whether the sampled rows of a group are three times a power of two: of 192 rows, 48 need not take the place of 64."""
    return sampled % 3 == 0 and 4 <= sampled // 3 <= 16 and sampled // 3 == padded(sampled // 3, 1)


def mass_tile(width: int, sampled: int, itemsize: int, device: Device) -> Tile:
    """Of the column masses: `rows` sampled rows stay, of several groups or a part of one, and all keys pass by.

    Three times as many rows where samples are taken in thirds.
    """
    wide = padded(width)
    if in_thirds(sampled):
        choices = (
            (Tile(16, 16, 4, 1),) if itemsize == 4 else (Tile(64, 64, 4, 3), Tile(32, 32, 4, 2), Tile(16, 16, 4, 1))
        )
    elif itemsize == 4:
        choices = (Tile(64, 32, 4, 2), Tile(32, 16, 4, 1), Tile(16, 16, 4, 1))
    else:
        # H200, width 128, 32 of 128 rows, 40 heads of 75,600 keys, ms: 64 columns, 3 stages 32.5, 2 stages 33.3; 64 rows 33.6;
        # 128 columns, 8 warps 35.3, 4 warps 41.6; 256 rows 38.8 to 46.6. 16 of 128 rows: 18.4, 2 stages 17.6
        choices = (Tile(128, 64, 4, 3), Tile(128, 64, 4, 2), Tile(64, 32, 4, 2), Tile(32, 32, 4, 1), Tile(16, 16, 4, 1))

    def taken(tile: Tile) -> int:
        # the parts of a larger group pass by as well
        held = 3 * tile.rows if in_thirds(sampled) else tile.rows
        passing = tile.columns + (tile.rows if sampled > held else 0)
        return itemsize * wide * (held + passing * tile.stages)

    return next((tile for tile in choices if taken(tile) <= device.shared), choices[-1])


def first_product_tile(group_rows: int, gated: bool, itemsize: int, device: Device) -> Tile:
    """Of the gathered first product: columns are neurons, depth runs along the width of x."""
    rows = row_tile(group_rows, 64 if itemsize == 4 else 128)
    if itemsize == 4:
        return Tile(rows, 32, 4, 2, depth=32)
    # H200, 4352 rows, 3072 to 3712 of 12288, ms: 256 neurons, 8 warps, 4 stages 0.267; 128, 4 warps, 3 stages 0.283
    large = device.shared >= 200_000 and rows == 128
    return Tile(rows, 256, 8, 4) if large and not gated else _product_tile(rows, device)


def second_product_tile(group_rows: int, itemsize: int, device: Device) -> Tile:
    """Of the gathered second product: columns are those of the result, depth runs along the listed neurons."""
    rows = row_tile(group_rows, 64 if itemsize == 4 else 128)
    # H200, 4352 rows, 3712 of 12288 to 3072, ms: 128 columns, 4 warps, 3 stages 0.366; 8 warps 0.55; 256 columns 0.41
    return Tile(rows, 32, 4, 2, depth=32) if itemsize == 4 else _product_tile(rows, device)


def means_tile(rows: int, itemsize: int, device: Device) -> Tile:
    """Of the first product of mean rows: columns are neurons, whose weights pass by once."""
    # H100, 23 rows, 12288 neurons of 3072, us: 64 neurons, depth 128, 3 stages 38.7, 4 stages 39.1; depth 64 44.6, 40.5;
    # 32 neurons 41.4; cuBLAS 39.1
    tile = Tile(rows, 64, 4, 3, depth=128)
    return tile if itemsize * tile.depth * (rows + 64) * tile.stages <= device.shared else Tile(rows, 64, 4, 2)


def _product_tile(rows: int, device: Device) -> Tile:
    return Tile(rows, 128, 4, 3) if device.shared >= 160_000 else Tile(rows, 64, 4, 2, depth=32)
