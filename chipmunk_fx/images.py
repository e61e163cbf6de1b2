"""How far apart two pictures are: PSNR, SSIM, and LPIPS where that package is installed.

A picture is a tensor [3, H, W] of numbers in [0, 1].
"""

from math import inf, log10
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from chipmunk_fx.errors import ChipmunkError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
WINDOW, SIGMA = 11, 1.5  # pixels
K1, K2 = 0.01, 0.03


class ImageError(ChipmunkError, ValueError):
    """Pictures that cannot be read or compared."""


def load(path: str | Path) -> Tensor:
    """Read a picture as RGB, [3, H, W] in [0, 1]. Raises ImageError where it is none or Pillow is missing."""
    try:
        import numpy
        from PIL import Image, UnidentifiedImageError
    except ImportError as missing:
        raise ImageError(f"reading {path} needs Pillow and numpy: pip install pillow numpy") from missing
    try:
        with Image.open(path) as picture:
            if picture.mode[0] in "IF":  # of grey, which Pillow would cut off at 255
                raise OSError(f"its mode {picture.mode} has more than 8 bits a channel")
            pixels = torch.from_numpy(numpy.array(picture.convert("RGB")))
    except (OSError, UnidentifiedImageError) as cause:
        raise ImageError(f"{path} cannot be read as a picture ({cause}); give one of {' '.join(SUFFIXES)}") from cause
    return pixels.permute(2, 0, 1) / 255


def save(picture: Tensor, path: str | Path) -> None:
    """Write [3, H, W] in [0, 1] in the format that the ending of `path` names; raises ImageError where it cannot."""
    try:
        from PIL import Image
    except ImportError as missing:
        raise ImageError(f"writing {path} needs Pillow and numpy: pip install pillow numpy") from missing
    pixels = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    try:
        Image.fromarray(pixels).save(path)
    except (OSError, ValueError) as cause:  # ValueError: an ending that Pillow does not know
        raise ImageError(f"{path} cannot be written ({cause}); end it in one of {' '.join(SUFFIXES)}") from cause


def difference(a: Tensor, b: Tensor) -> Tensor:
    """Where two pictures differ, [3, H, W]: `a` in dark grey, and red over it where |a - b| is large.

    A pixel counts by the channel that differs most; full red is the largest difference in the picture.
    """
    _check(a, b)
    apart = (a - b).abs().amax(0)
    share = apart / apart.max().clamp_min(1e-9)
    grey = a.mean(0) / 2
    rest = grey * (1 - share)
    return torch.stack([rest + share, rest, rest])


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB for a peak of 1; infinite where the pictures are equal."""
    _check(a, b)
    error = F.mse_loss(a.double(), b.double()).item()
    return -10 * log10(error) if error else inf


def ssim(a: Tensor, b: Tensor) -> float:
    """Structural similarity, the mean over all windows and channels; 1 where the pictures are equal.

    Wang, Bovik, Sheikh and Simoncelli, "Image quality assessment: from error visibility to structural similarity",
    IEEE Transactions on Image Processing 13(4), 2004, equation 13, with its Gaussian window of 11 pixels (sigma 1.5),
    K1 = 0.01 and K2 = 0.03. Windows that reach over the edge are left out.
    """
    _check(a, b)
    if min(a.shape[-2:]) < WINDOW:
        raise ImageError(f"SSIM needs at least {WINDOW} x {WINDOW} pixels, got {a.shape[-1]} x {a.shape[-2]}")
    a, b = a.double().unsqueeze(1), b.double().unsqueeze(1)  # [3, 1, H, W]
    position = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    bell = torch.exp(-(position**2) / (2 * SIGMA**2))
    weights = torch.outer(bell, bell)[None, None] / bell.sum() ** 2

    def local(x: Tensor) -> Tensor:
        return F.conv2d(x, weights)

    mean_a, mean_b = local(a), local(b)
    variance_a, variance_b = local(a * a) - mean_a**2, local(b * b) - mean_b**2
    covariance = local(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + K1**2) / (mean_a**2 + mean_b**2 + K1**2)
    structure = (2 * covariance + K2**2) / (variance_a + variance_b + K2**2)
    return (luminance * structure).mean().item()


def lpips_metric():
    """The function (a, b) -> LPIPS distance (Zhang et al. 2018, AlexNet), or None where `lpips` is not installed."""
    try:
        import lpips
    except ImportError:
        return None
    network = lpips.LPIPS(net="alex", verbose=False).eval()

    @torch.no_grad()
    def distance(a: Tensor, b: Tensor) -> float:
        return network(a[None] * 2 - 1, b[None] * 2 - 1).item()

    return distance


def _check(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        sizes = " and ".join(f"{x.shape[-1]} x {x.shape[-2]}" for x in (a, b))
        raise ImageError(f"the pictures differ in size ({sizes}); compare pictures of one size")
