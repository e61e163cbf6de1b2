"""The photographs, classes and conditions of the small bundled model in `flux-photos`.

The photographs are files inside the wheels of scikit-image and scikit-learn, so nothing is downloaded. A picture of
`side` pixels is a sequence of N = (side / 4)^2 tokens, each 4x4 pixels of three colours in [-1, 1].
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

PATCH = 4  # pixels along one edge of a token
CLASSES = 16  # size of the one-hot code; most are spare
UNCONDITIONAL = 15
TEXT_TOKENS = 16
CANVAS = 256 // PATCH  # positions along one edge, whatever the size of the picture


@dataclass(frozen=True)
class Photo:
    """One class: a file inside an installed package and the middle of the square taken from it, as shares."""

    name: str
    package: str
    file: str
    centre: tuple[float, float] = (0.5, 0.5)  # across, down

    def path(self) -> Path:
        """Where the file lies. Raises FileNotFoundError if the package that ships it is not installed."""
        spec = importlib.util.find_spec(self.package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            if (path := Path(folder) / self.file).is_file():
                return path
        raise FileNotFoundError(
            f"photograph {self.name!r}: {self.file} not found in package {self.package!r}; "
            "install scikit-image and scikit-learn (pip install 'chipmunk-fx[examples]')"
        )


PHOTOS = (
    Photo("astronaut", "skimage", "data/astronaut.png"),
    Photo("cat", "skimage", "data/chelsea.png"),
    Photo("coffee", "skimage", "data/coffee.png"),
    Photo("rocket", "skimage", "data/rocket.jpg"),
    Photo("galaxies", "skimage", "data/hubble_deep_field.jpg"),
    Photo("tissue", "skimage", "data/ihc.png"),
    Photo("retina", "skimage", "data/retina.jpg"),
    Photo("temple", "sklearn", "datasets/images/china.jpg"),
    Photo("flower", "sklearn", "datasets/images/flower.jpg"),
)
NAMES = tuple(photo.name for photo in PHOTOS)


def load_photos(side: int) -> torch.Tensor:
    """All photographs, cut square and filtered down (or up) to `side` pixels: float32 [P, 3, side, side] in [-1, 1]."""
    return torch.stack([_load(photo, side) for photo in PHOTOS])


def _load(photo: Photo, side: int) -> torch.Tensor:
    image = Image.open(photo.path()).convert("RGB")
    edge = min(image.size)
    left = round((image.width - edge) * photo.centre[0])
    top = round((image.height - edge) * photo.centre[1])
    image = image.crop((left, top, left + edge, top + edge)).resize((side, side), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def class_index(name: str) -> int:
    """The class of a photograph's name. Raises ValueError for an unknown name."""
    if name not in NAMES:
        raise ValueError(f"class {name!r} is unknown; choose one of {', '.join(NAMES)}")
    return NAMES.index(name)


def condition(classes: torch.Tensor, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """What stands in for a text encoder. `classes` int64 [B], values below 16 (15: unconditional).

    Returns the model's arguments encoder_hidden_states [B, 16, 32], a one-hot class beside a one-hot token index, and
    pooled_projections [B, 16], the one-hot class.
    """
    label = F.one_hot(classes, CLASSES).to(dtype)
    index = torch.eye(TEXT_TOKENS, dtype=dtype, device=classes.device)
    text = torch.cat([label[:, None].expand(-1, TEXT_TOKENS, -1), index[None].expand(len(classes), -1, -1)], dim=-1)
    return {"encoder_hidden_states": text, "pooled_projections": label}


def position_ids(side: int, device: torch.device | str | None = None) -> dict[str, torch.Tensor]:
    """The arguments img_ids [N, 3] = (0, row, column) and txt_ids [16, 3] = 0.

    Rows and columns count tokens of a 256 px picture: a smaller picture covers the same positions in longer strides,
    so that what a model learns of the layout at one size holds at the other.
    """
    n = side // PATCH
    line = torch.arange(n, device=device, dtype=torch.float32) * (CANVAS / n)
    rows, columns = torch.meshgrid(line, line, indexing="ij")
    ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(n * n, 3)
    return {"img_ids": ids, "txt_ids": torch.zeros(TEXT_TOKENS, 3, device=device)}


def to_tokens(images: torch.Tensor) -> torch.Tensor:
    """[B, 3, side, side] -> [B, N, 48], token and pixel in raster order."""
    return F.pixel_unshuffle(images, PATCH).flatten(2).transpose(1, 2)


def to_images(tokens: torch.Tensor) -> torch.Tensor:
    """[B, N, 48] -> [B, 3, side, side], the inverse of `to_tokens`."""
    n = round(tokens.shape[1] ** 0.5)
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (n, n)), PATCH)


def shift(side: int) -> float:
    """How far the noise levels lean towards noise: larger pictures show their layout through more of it."""
    return 2.0 if side <= 128 else 3.0


def noise_levels(steps: int, side: int) -> list[float]:
    """The steps + 1 sigmas of a sampler, from 1 to 0, shifted as the training was."""
    even = [1 - i / steps for i in range(steps + 1)]
    return [shift(side) * t / (1 + (shift(side) - 1) * t) for t in even]


@torch.no_grad()
def generate(model, classes: torch.Tensor, side: int = 256, steps: int = 50, seed: int = 0, guidance: float = 1.0):
    """Euler from noise to pictures: float32 [B, 3, side, side] in about [-1, 1], for `classes` int64 [B].

    The model predicts noise - image at x = (1 - sigma) image + sigma noise. A `guidance` above 1 is classifier-free
    guidance (Ho and Salimans, 2022) and calls the model twice a step: with the class, then unconditionally.
    """
    device, dtype = model.device, model.dtype
    noise = torch.randn(len(classes), 3, side, side, generator=torch.Generator().manual_seed(seed))
    x = to_tokens(noise).to(device)
    ids = position_ids(side, device)
    given = condition(classes.to(device), dtype)
    free = condition(torch.full_like(classes, UNCONDITIONAL).to(device), dtype)

    def velocity(sigma: float, conditions: dict[str, torch.Tensor]) -> torch.Tensor:
        timestep = torch.full((len(classes),), sigma, device=device, dtype=dtype)
        return model(hidden_states=x.to(dtype), timestep=timestep, **conditions, **ids, return_dict=False)[0].float()

    levels = noise_levels(steps, side)
    for sigma, below in zip(levels[:-1], levels[1:], strict=True):
        v = velocity(sigma, given)
        if guidance != 1:
            v_free = velocity(sigma, free)
            v = v_free + guidance * (v - v_free)
        x = x + (below - sigma) * v
    return to_images(x)


def contact_sheet(images: torch.Tensor, columns: int = 3) -> Image.Image:
    """[B, 3, side, side] in [-1, 1] -> one picture with `columns` images a row."""
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    side = pixels.shape[1]
    sheet = Image.new("RGB", (columns * side, -(-len(pixels) // columns) * side))
    for i, picture in enumerate(pixels):
        sheet.paste(Image.fromarray(picture), (i % columns * side, i // columns * side))
    return sheet
