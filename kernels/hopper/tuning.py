"""Settings of the kernels: pure functions of dtype, sizes and the number of multiprocessors."""

from dataclasses import dataclass
from functools import cache

SHARED = 232_448  # bytes that one thread block may take on sm_90
UNITS = 132
SPAN = 64  # bytes of the inner dimension in a stage of the MLP's products
KEYS = 64  # of a tile of the column masses
RUN = 16  # neighbouring columns of a thread of the selection
QUERY_TILES = 3  # as long as copying a block's queries takes


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
    others: bool = False
    merging: bool = False

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


def whole_tiles(tiles: int, consumers: int, units: int) -> int:
    """How many tiles of rows all consumers of a block work on; what is left goes to them one by one, if that takes one round."""
    left = tiles % units
    return tiles - left if left * consumers <= units else tiles


# TFLOP/s of attention over all keys in two parts, by rows of a group, and dense: without and with flash-attn-4. H100, bf16, 40
# heads of 75,600 rows, ms: 196, cuDNN 211, flash-attn-4 173. With groups of 128 rows 24 heads of 16,384 reach 480, of 4352 420.
OWN_RATE = {192: 597, 128: 430}
DENSE_RATE = {False: 560, True: 675}


def in_parts(group_rows: int, density: float, flash4: bool) -> bool:
    """Whether a refresh is faster by attention over the listed keys and over the others than by a dense kernel, which has the
    listed ones computed again. flash4: that kernel is flash-attn-4."""
    own = OWN_RATE[192 if group_rows % 192 == 0 else 128]
    return 1 / own < 1 / DENSE_RATE[flash4] + density / own


@dataclass(frozen=True)
class MassSettings(Block):
    """Of the column masses, as at the top of masses.cu. sampled: rows of a group; samples: those of a consumer's groups."""

    width: int
    sampled: int
    samples: int

    @property
    def groups(self) -> int:
        """Of a consumer."""
        return self.samples // self.sampled

    @property
    def held(self) -> int:
        """Bytes for queries, their shifts, codes twice and two barriers."""
        return self.consumers * (2 * self.width * self.samples + 4 * self.samples + 4 * KEYS * self.groups + 16)

    @property
    def buffers(self) -> int:
        return min(8, (SHARED - self.held) // (2 * self.width * KEYS + 16))

    @property
    def shared(self) -> int:
        """Bytes of shared memory."""
        return self.held + self.buffers * (2 * self.width * KEYS + 16)


@cache
def mass_settings(element: str, width: int, sampled: int) -> MassSettings | None:
    """For so many sampled rows of each group; None where they do not fill 128 or 192 columns of an instruction."""
    samples = next((n for n in (192, 128) if n % sampled == 0), None)
    return MassSettings(element, 3, width, sampled, samples) if samples and sampled % 8 == 0 and sampled >= 16 else None


@cache
def mass_run(lines: int, keys: int, units: int) -> int:
    """Keys that a block of the column masses takes, in whole tiles. lines: of the result, for all its consumers' groups.

    Short runs fill the last round of blocks better; each costs the copying of its queries, as long as some tiles.
    """
    tiles = -(-keys // KEYS)
    runs = (-(-tiles // n) for n in range(1, min(tiles, 64) + 1))
    return KEYS * min(runs, key=lambda run: -(-(lines * -(-tiles // run)) // units) * (run + QUERY_TILES))


@dataclass(frozen=True)
class SelectSettings:
    """Of a selection, as at the top of lists.cuh and select.cu; the memory it shares is fixed.

    H100, 7091 rows of 75,600 keys, 4509 of 119,056, ms, threads and blocks: 256 and 6 1.72, 2.04; 4 1.83, 2.08; 512 and 3 1.83,
    2.00; 128 and 8 1.88, 2.10; 1024 and 1 2.26, 2.45; Triton 2.56, 3.33.
    """

    threads: int = 256
    blocks: int = 6
    shared: int = 0
    cluster: int = 1


@dataclass(frozen=True)
class WatchSettings:
    """Of the watch over caches, as at the top of watch.cu. blocks: that a multiprocessor runs at once."""

    threads: int = 256
    blocks: int = 8
    shared: int = 0


@dataclass(frozen=True)
class PackSettings:
    """Of the packing of x, as at the top of pack.cu; the memory it shares is fixed. cluster: blocks that work on a group."""

    element: str
    fp8: bool
    block: int
    threads: int
    passes: int
    rows: int
    resident: int
    cluster: int
    span: int = SPAN
    shared: int = 0


@cache
def pack_settings(
    element: str, width: int, group_rows: int, fp8: bool, *, held: int = 8, threads: int = 512, cluster: int = 8
) -> PackSettings:
    """held: words of 16 bytes of x that a thread has in registers; threads: of a block at most, which takes whole rows.

    Means do not depend on fp8: rows are added up in the same order.
    """
    pieces = width // 8  # words of a row
    passes = -(-pieces // threads)
    rows = 1 << max(held // passes, 1).bit_length() - 1
    threads = -(-pieces // (32 * passes)) * 32
    registers = (4 * rows + 8) * passes + 40  # values, sums and all else
    held_by_block = -(-threads // 128) * 128 * registers  # four warps at once get them
    resident = min(max(65536 // held_by_block, 1), 4)
    return PackSettings(element, fp8, block_rows(group_rows), threads, passes, rows, resident, cluster)


@cache
def neuron_settings(neurons: int) -> SelectSettings | None:
    """Of the selection of neurons: a cluster of two blocks holds all of a group; None where there are too many."""
    threads = next((threads for threads in (64, 128, 256, 512, 1024) if 2 * threads * RUN >= neurons), None)
    return SelectSettings(threads, 1, cluster=2) if threads else None


@dataclass(frozen=True)
class ProductSettings(Block):
    """Of one product of the MLP. columns: of the result in one tile; of the first product, gathered weights.

    cluster: blocks that work on neighbouring tiles of the same rows. activation: of the first product; of the second there
    is none. fp8: operands are e4m3.
    """

    columns: int
    cluster: int
    activation: str | None = None
    gated: bool = False
    fp8: bool = False

    @property
    def neurons(self) -> int:
        """Of a tile of the first product."""
        return self.columns // 2 if self.gated else self.columns

    def clusters(self, rows: int, columns: int) -> int:
        """Needed for so many rows, in whole groups, and listed neurons, or columns of the second product's result."""
        return rows // self.rows * -(-columns // (self.neurons * self.cluster))

    @property
    def depth(self) -> int:
        """Listed neurons in a stage of the second product."""
        return SPAN if self.fp8 else SPAN // 2

    @property
    def tables(self) -> int:
        """Bytes for pointers to lines, and three times neurons and biases; of the second product for its rows, in fp8 for each
        consumer, since all of them have all rows."""
        if self.activation is None:
            return 4 * self.rows * (self.consumers if self.fp8 else 1)
        return 8 * self.columns + 12 * (self.neurons + self.columns)

    @property
    def aside(self) -> int:
        """Bytes for the result of the tile before, and for what is added to it or compared with it."""
        return 2 * self.rows * self.columns + 16 * 128 * self.consumers

    @property
    def stage(self) -> int:
        return SPAN * (self.rows + self.columns)

    @property
    def buffers(self) -> int:
        """As many stages as shared memory holds, but fewer than a tile has: first.cu begins a tile's last stage when all have
        begun the tile, so that the next one's tables are not announced before."""
        return min(7, (SHARED - self.aside - self.tables - 16) // (self.stage + 16))

    @property
    def shared(self) -> int:
        return self.buffers * (self.stage + 16) + 16 + self.aside + self.tables


# A round of tiles takes as long as their columns and so many more. H200, bf16, 192 rows, 3712 neurons, us a round of 192, 160,
# 128 and 96 columns: first product 47.8, 40.4, 35.0, 31.1, in fp8 30.3, 26.1, 21.6, 19.4; second, 192 and 128 columns: 57 and 46.
FIRST_EXTRA, SECOND_EXTRA = 80, 200
ALONE = 4  # more, where a block brings all of the left operand itself


@cache
def first_settings(
    element: str, group_rows: int, groups: int, listed: int, activation: str, gated: bool, fp8: bool, units: int = UNITS
) -> ProductSettings:
    """Of the first product. groups: of all batch entries; listed: neurons of a group.

    The neurons of a cluster are a multiple of 32: its tiles have all of the second product's last stage, or in fp8 of its half.
    """
    consumers, most = _shape(group_rows)
    tiles = (
        ProductSettings(element, consumers, n, cluster, activation, gated, fp8)
        for n in range(most, 95, -32 if gated else -16)
        for cluster in (2, 1)
    )
    allowed = (s for s in tiles if s.neurons * s.cluster % 32 == 0)
    return min(allowed, key=lambda s: _time(s, s.clusters(groups * group_rows, listed), FIRST_EXTRA, units))


@cache
def second_settings(
    element: str, group_rows: int, groups: int, width: int, fp8: bool, units: int = UNITS
) -> ProductSettings:
    """Of the second product. groups: of all batch entries; width: of the result, in 64s."""
    consumers, most = _shape(group_rows)
    if fp8:
        return ProductSettings(element, consumers, 64 * consumers, 2 if width > 64 * consumers else 1, fp8=True)
    allowed = (
        ProductSettings(element, consumers, n, cluster)
        for n in (256, 192, 128, 64)
        for cluster in (2, 1)
        if n <= most and width % (n * cluster) == 0
    )
    return min(allowed, key=lambda s: _time(s, s.clusters(groups * group_rows, width), SECOND_EXTRA, units))


def block_rows(group_rows: int) -> int:
    """Rows of a group that a block of the MLP's products works on at once."""
    return 64 * _shape(group_rows)[0]


def _shape(group_rows: int) -> tuple[int, int]:
    """Warpgroups that multiply, and the widest result of one instruction: four warpgroups start with 128 registers a thread."""
    return (3, 192) if group_rows % 192 == 0 else (2, 256)


def _time(settings: ProductSettings, clusters: int, extra: int, units: int) -> int:
    """Of the busiest multiprocessor, in columns: the last round of tiles should be nearly full, and tiles should be large."""
    rounds = -(-clusters // (units // settings.cluster))
    return rounds * (settings.columns + extra + (ALONE if settings.cluster == 1 else 0))
