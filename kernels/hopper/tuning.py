"""Settings of the kernels: pure functions of dtype, sizes and the number of multiprocessors."""

from dataclasses import dataclass
from functools import cache

SHARED = 232_448  # bytes that one thread block may take on sm_90
UNITS = 132


@dataclass(frozen=True)
class Block:
    """Of a thread block. element: "bf16" or "f16"; consumers: warpgroups that multiply, beside one that copies."""

    element: str
    consumers: int

    @property
    def rows(self) -> int:
        """Of a group, that it works on at once."""
        return 64 * self.consumers

    @property
    def threads(self) -> int:
        return 128 * (self.consumers + 1)


@dataclass(frozen=True)
class Settings(Block):
    """Of the attention over listed columns, as at the top of columns.cu."""

    width: int
    columns: int
    buffers: int

    @property
    def shared(self) -> int:
        """Bytes of shared memory."""
        return 2 * self.width * (self.rows + self.buffers * self.columns) + 16 * (self.buffers + self.consumers)


@cache
def columns_settings(element: str, width: int, group_rows: int) -> Settings:
    """Groups of 192 rows go to three warpgroups, which need a third less gathered for the same products.

    H200, width 128, 5376 of 75600 columns, ms before the card lowers its clock, and after: 192 rows 12.9 and 14.2,
    with tiles of 96 columns 13.8 and 16.0; 128 rows 14.5 and 16.4. Buffers: as many as shared memory holds.
    """
    if group_rows % 192 == 0:
        return Settings(element, 3, width, columns=128, buffers={64: 10, 128: 5}[width])
    return Settings(element, 2, width, columns=128, buffers={64: 11, 128: 6}[width])


@dataclass(frozen=True)
class ProductSettings(Block):
    """Of one product of the MLP. columns: of the result in one tile; of the first product, gathered weights.

    activation: of the first product; of the second there is none.
    """

    columns: int
    activation: str | None = None
    gated: bool = False

    @property
    def neurons(self) -> int:
        """Of a tile of the first product."""
        return self.columns // 2 if self.gated else self.columns

    @property
    def tables(self) -> int:
        """Bytes for what the first product keeps of its list: pointers to lines, and twice neurons and biases."""
        return 0 if self.activation is None else 8 * (self.rows + self.columns) + 8 * (self.neurons + self.columns)

    @property
    def stage(self) -> int:
        return 128 * (self.rows + self.columns)

    @property
    def buffers(self) -> int:
        """As many stages as shared memory holds, at most 6: more gain nothing."""
        return min(6, (SHARED - self.tables - 16) // (self.stage + 16))

    @property
    def shared(self) -> int:
        return self.buffers * (self.stage + 16) + 16 + self.tables


# Of one multiprocessor of an H200: it makes 2048 multiply-adds a clock, and is taken to get 32 bytes from the second-level cache;
# what else a tile costs (filling the ring, the epilogue) takes as long as so many stages.
BYTES, PRODUCTS, EXTRA_STAGES = 32, 2048, 5


@cache
def first_settings(
    element: str,
    group_rows: int,
    groups: int,
    width: int,
    listed: int,
    activation: str,
    gated: bool,
    units: int = UNITS,
) -> ProductSettings:
    """Of the first product. groups: of all batch entries; width: of x; listed: neurons of a group."""
    consumers, most = _shape(group_rows)
    each = 2 if gated else 1
    tiles = groups * group_rows // (64 * consumers)
    columns = min(
        range(most, 95, -16),
        key=lambda n: _clocks(consumers, n, tiles * -(-listed * each // n), width, units),
    )
    return ProductSettings(element, consumers, columns, activation, gated)


@cache
def second_settings(
    element: str, group_rows: int, groups: int, listed: int, width: int, units: int = UNITS
) -> ProductSettings:
    """Of the second product. groups: of all batch entries; listed: neurons of a group; width: of the result, in 64s."""
    consumers, most = _shape(group_rows)
    tiles = groups * group_rows // (64 * consumers)
    allowed = (n for n in (256, 192, 128, 64) if n <= most and width % n == 0)
    columns = min(allowed, key=lambda n: _clocks(consumers, n, tiles * (width // n), listed, units))
    return ProductSettings(element, consumers, columns)


def _shape(group_rows: int) -> tuple[int, int]:
    """Warpgroups that multiply, and the widest result of one instruction: four warpgroups start with 128 registers a thread."""
    return (3, 192) if group_rows % 192 == 0 else (2, 256)


def _clocks(consumers: int, columns: int, tiles: int, depth: int, units: int) -> int:
    """Of the busiest multiprocessor: the last round of tiles should be nearly full, and tiles should be large."""
    rows = 64 * consumers
    stage = max(rows * columns * 64 // PRODUCTS, (rows + columns) * 128 // BYTES)
    return -(-tiles // units) * stage * (-(-depth // 64) + EXTRA_STAGES)
