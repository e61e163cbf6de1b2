"""Settings of the kernel over listed columns: a pure function of dtype, head width and group."""

from chipmunk_fx.kernels.hopper.instructions import Settings


def columns_settings(element: str, width: int, group_rows: int) -> Settings:
    """Groups of 192 rows go to three warpgroups, which need a third less gathered for the same products.

    H200, width 128, 5376 of 75600 columns, ms before the card lowers its clock, and after: 192 rows 12.9 and 14.2,
    with tiles of 96 columns 13.8 and 16.0; 128 rows 14.5 and 16.4. Buffers: as many as shared memory holds.
    """
    if group_rows % 192 == 0:
        return Settings(element, width, consumers=3, columns=128, buffers={64: 10, 128: 5}[width])
    return Settings(element, width, consumers=2, columns=128, buffers={64: 11, 128: 6}[width])
