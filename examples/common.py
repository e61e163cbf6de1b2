"""What the examples share: a table of runs, pictures side by side, PSNR, and the type to compute in."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from tabulate import tabulate
from torch import Tensor

from chipmunk_fx.images import psnr

__all__ = ["default_dtype", "print_table", "psnr", "side_by_side", "to_picture"]

MARGIN = 4  # pixels between pictures
CAPTION = 16  # pixels above them


def to_picture(image: Tensor) -> Image.Image:
    """[3, H, W] in [0, 1] -> an RGB picture; values outside are cut off."""
    return Image.fromarray((image.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def side_by_side(dense: Sequence[Tensor], sparse: Sequence[Tensor], labels: tuple[str, str], path: str | Path) -> None:
    """Write a PNG with one row a pair of images [3, H, W] in [0, 1]: dense on the left, sparse on the right.

    `labels` head the two columns. Raises ValueError where the two sequences differ in length or the images in size.
    """
    shapes = {tuple(image.shape) for image in (*dense, *sparse)}
    if len(dense) != len(sparse) or len(shapes) != 1:
        raise ValueError(
            f"{len(dense)} dense and {len(sparse)} sparse images of shapes {shapes}; give pairs of one size"
        )
    _, height, width = shapes.pop()
    sheet = Image.new("RGB", (2 * width + MARGIN, CAPTION + len(dense) * (height + MARGIN) - MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    for column, (images, label) in enumerate(zip((dense, sparse), labels, strict=True)):
        left = column * (width + MARGIN)
        pen.text((left + 2, 2), label, fill="black")
        for row, image in enumerate(images):
            sheet.paste(to_picture(image), (left, CAPTION + row * (height + MARGIN)))
    sheet.save(path)


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows that share their keys as a table; numbers get two decimals."""
    print(tabulate([dict(row) for row in rows], headers="keys", floatfmt=".2f"))


def default_dtype(device: str) -> str:
    """The name of bf16 where the device multiplies it, else of fp32.

    A processor with neither AMX nor AVX-512-BF16 takes ten times as long for bf16.
    """
    if not device.startswith("cpu"):
        return "bf16"
    known = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return "bf16" if any(getattr(torch.cpu, name, bool)() for name in known) else "fp32"
