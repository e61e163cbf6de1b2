"""Sample pictures from a FLUX transformer twice, dense and with backend="chipmunk", and compare time and pictures.

    python examples/flux.py                                          # the bundled model, on whatever device is there
    python examples/flux.py --images 8 --option attention.density=0.1
    python examples/flux.py --model black-forest-labs/FLUX.1-dev --prompt "a lighthouse in a storm" --size 768x1280
    python examples/flux.py --random-weights --steps 12               # FLUX.1-dev's configuration: speed alone

Writes a PNG with each pair side by side and prints a table. Both runs go through Inductor and start from the same
noise. Compiling is timed by itself: a short generation that visits every phase comes first and counts nowhere else.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import photos
import torch
import yaml
from common import default_dtype, side_by_side, to_picture
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from measure import Sampler, compare, run_dense, run_sparse, table
from torch import Tensor, nn

from chipmunk_fx import Config, ConfigError
from chipmunk_fx.pretrained import FAMILIES

BUNDLED = Path(__file__).resolve().parent / "flux-photos"
CLASSES = ("cat", "coffee", "astronaut")
PROMPT = "a chipmunk reads a newspaper in a street café, morning light"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Photographs:
    """The bundled model: FLUX blocks on 4x4 pixels, conditioned on the class of a photograph instead of on text."""

    def __init__(self, folder: Path, given: argparse.Namespace):
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"--model {folder}: neither a folder with model_index.json (a FLUX pipeline that diffusers saved), nor "
                "one with config.json (what examples/train_flux.py writes), nor OWNER/NAME on the hub"
            )
        self.height, self.width = given.size or (256, 256)
        if self.height != self.width or self.height % photos.PATCH:
            raise ValueError(
                f"--size {self.height}x{self.width}: this model draws squares of a multiple of {photos.PATCH} pixels"
            )
        if given.prompt is not None:
            raise ValueError(f"--prompt: this model takes --classes instead, of {', '.join(photos.NAMES)}")
        chosen = given.classes or CLASSES
        self.names: list[str] = [chosen[i % len(chosen)] for i in range(given.images or len(chosen))]
        self.classes = [photos.class_index(name) for name in self.names]
        self.seed, self.guidance = given.seed, 1.0 if given.guidance is None else given.guidance
        self.calls = 1 if self.guidance == 1 else 2
        self.device, self.dtype = torch.device(given.device), DTYPES[given.dtype]
        model: Any = FluxTransformer2DModel.from_pretrained(folder, dtype=self.dtype)
        widths = model.config.in_channels, model.config.joint_attention_dim
        if widths != (3 * photos.PATCH**2, photos.CLASSES + photos.TEXT_TOKENS):
            raise ValueError(f"--model {folder}: a transformer alone; give the folder of its whole pipeline")
        self.transformer: nn.Module = model.to(self.device)

    def sample(self, model: nn.Module, index: int, steps: int) -> Tensor:
        return self.batch(model, [index], steps)[0]

    def batch(self, model: nn.Module, indices: Sequence[int], steps: int) -> Tensor:
        """Several pictures at once, [B, 3, H, W]: each from the noise that it has alone."""
        noise = [
            torch.randn(1, 3, self.height, self.width, generator=torch.Generator().manual_seed(self.seed + index))
            for index in indices
        ]
        x = photos.to_tokens(torch.cat(noise)).to(self.device)
        scheduler: Any = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(sigmas=photos.noise_levels(steps, self.height)[:-1], device=self.device)
        scheduler.set_begin_index(0)  # spares the GPU a look-up that waits for it
        ids = photos.position_ids(self.height, self.device)
        drawn = [self.classes[index] for index in indices]
        classes = (drawn, [photos.UNCONDITIONAL] * len(drawn))[: self.calls]
        conditions = [photos.condition(torch.tensor(c, device=self.device), self.dtype) for c in classes]
        for t in scheduler.timesteps:
            now = {"hidden_states": x.to(self.dtype), "timestep": t.expand(len(x)) / 1000, **ids, "return_dict": False}
            velocity, *free = [model(**now, **condition)[0].float() for condition in conditions]
            if free:  # classifier-free guidance
                velocity = free[0] + self.guidance * (velocity - free[0])
            x = scheduler.step(velocity, t, x, return_dict=False)[0]
        return (photos.to_images(x).cpu() / 2 + 0.5).clamp(0, 1)


class Prompted:
    """Any FLUX folder or hub name through diffusers' pipeline, text encoders and autoencoder included."""

    calls = 1

    def __init__(self, model: str, given: argparse.Namespace):
        if given.classes:
            raise ValueError("--classes belong to the bundled model; a pipeline takes --prompt")
        self.names: list[str] = [given.prompt or PROMPT] * (given.images or 1)
        self.seed = given.seed
        self.settings: dict[str, Any] = dict(zip(("height", "width"), given.size or (768, 1280), strict=True))
        if given.guidance is not None:
            self.settings["guidance_scale"] = given.guidance
        from diffusers import FluxPipeline  # here, because it loads transformers

        self.pipe: Any = FluxPipeline.from_pretrained(model, dtype=DTYPES[given.dtype]).to(given.device)
        self.pipe.set_progress_bar_config(disable=True)
        self.transformer: nn.Module = self.pipe.transformer

    def sample(self, model: nn.Module, index: int, steps: int) -> Tensor:
        self.pipe.transformer = model
        random = torch.Generator().manual_seed(self.seed + index)
        settings = {"num_inference_steps": steps, "generator": random, "output_type": "pt", **self.settings}
        return self.pipe(self.names[index], **settings).images[0].float().cpu()


class RandomWeights:
    """FLUX.1-dev's transformer with weights drawn on the device, fed with noise: times are real, pictures are not."""

    calls = 1

    def __init__(self, given: argparse.Namespace):
        if given.prompt or given.classes:
            raise ValueError(
                "--random-weights: no picture comes of it, so there is no --prompt and there are no --classes"
            )
        height, width = given.size or (768, 1280)
        self.grid = 1, height // 8, width // 8
        self.names: list[str] = ["random weights"] * (given.images or 1)
        self.seed, self.device, self.dtype = given.seed, torch.device(given.device), DTYPES[given.dtype]
        torch.manual_seed(given.seed)
        former = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        with self.device:
            self.transformer: nn.Module = FluxTransformer2DModel(guidance_embeds=True)
        torch.set_default_dtype(former)

    def sample(self, model: nn.Module, index: int, steps: int) -> Tensor:
        torch.manual_seed(self.seed + index)
        given = FAMILIES["FluxTransformer2DModel"].inputs(self.transformer.config, self.grid, 512)
        inputs = {
            k: v.to(self.device, self.dtype) if v.is_floating_point() else v.to(self.device) for k, v in given.items()
        }
        x = inputs.pop("hidden_states")
        for step in range(steps):
            time = inputs["timestep"].new_full((1,), 1 - step / steps)
            x = x - model(hidden_states=x, **inputs | {"timestep": time}, return_dict=False)[0] / steps
        height, width = self.grid[1] // 2, self.grid[2] // 2
        return x.view(height, width, -1)[..., :3].permute(2, 0, 1).float().cpu().sigmoid()


def load(given: argparse.Namespace) -> Sampler:
    """Raises ValueError or OSError where the model or what is asked of it does not fit."""
    if given.random_weights:
        return RandomWeights(given)
    folder = Path(given.model)
    on_hub = not folder.exists() and given.model.count("/") == 1
    if on_hub or (folder / "model_index.json").is_file():
        return Prompted(given.model, given)
    return Photographs(folder, given)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser()
    given = parser.parse_args(arguments)
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {given.device}: PyTorch finds no CUDA device here; use --device cpu")
    given.dtype = given.dtype or default_dtype(given.device)
    try:
        options = read_options(given)
        lowering = Config.from_options(options).lowering
        sampler = load(given)
    except (ConfigError, ValueError, OSError) as problem:
        parser.exit(2, f"{parser.prog}: {problem}\n")
    device = torch.device(given.device)
    with torch.no_grad():
        dense = run_dense(sampler, given.steps, device, lowering) if given.dense else None
        sparse, summary = run_sparse(sampler, given.steps, device, options)
        figures = compare(sampler, dense, sparse, summary, options)

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{figures['threads']} CPU threads"
    height, width = sparse.pictures[0].shape[1:]
    model = given.model
    if given.random_weights:  # whose pictures are of tokens, each of 16x16 pixels
        height, width, model = 16 * height, 16 * width, "random weights"
    print(f"{model}, {height}x{width}, {given.steps} steps, {given.dtype}, seed {given.seed}, {name}")
    print(table(dense, sparse, figures))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    if dense:
        labels = (f"dense, {dense.total:.1f} s", f"chipmunk, {sparse.total:.1f} s")
        side_by_side(dense.pictures, sparse.pictures, labels, given.out)
    else:
        to_picture(torch.cat(sparse.pictures, dim=2)).save(given.out)
    print(f"pictures: {given.out}")
    if given.json:
        asked = {key: value if isinstance(value, int | float) else str(value) for key, value in vars(given).items()}
        # JSON has no infinity, which is the PSNR of equal pictures
        finite = [None if value == math.inf else value for value in figures["psnr_db"] or ()] or None
        figures = {"device": name, "asked": asked, **figures, "psnr_db": finite}
        given.json.write_text(json.dumps(figures, indent=2) + "\n")


def read_options(given: argparse.Namespace) -> dict[str, Any]:
    """torch.compile's options. Raises ValueError where one is not KEY=VALUE."""
    options: dict[str, Any] = {"config": str(given.config)} if given.config else {}
    if given.lowering:
        options["lowering"] = given.lowering
    for text in given.option:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--option {text}: write KEY=VALUE, for example attention.density=0.1")
        options[key] = yaml.safe_load(value)
    return options


def size(text: str) -> tuple[int, int]:
    """Height and width of "256" or "768x1280"."""
    sides = [int(part) for part in text.split("x")]
    if not 1 <= len(sides) <= 2 or min(sides) < 1:
        raise ValueError(text)
    return sides[0], sides[-1]


def count(text: str) -> int:
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--model",
        default=str(BUNDLED),
        metavar="FOLDER_OR_HUB_NAME",
        help="a FLUX pipeline; default: the bundled model",
    )
    add("--random-weights", action="store_true", help="FLUX.1-dev's transformer alone, with weights drawn at random")
    add("--prompt", help="what a pipeline draws")
    add("--classes", nargs="+", metavar="CLASS", help=f"what the bundled model draws: {', '.join(photos.NAMES)}")
    add("--images", type=count, help="number of pictures, made one by one with seeds SEED, SEED + 1, ...")
    add("--size", type=size, metavar="SIDE|HxW", help="pixels (default: 256, or 768x1280 for a pipeline)")
    add("--steps", type=count, default=50, help="default: 50")
    add("--guidance", type=float, help="classifier-free for the bundled model (1: off), distilled for a pipeline")
    add("--seed", type=int, default=0, help="of the first picture; default: 0")
    add("--dtype", choices=tuple(DTYPES), help="default: bf16 where the device multiplies it, else fp32")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda if there is one")
    add("--option", action="append", default=[], metavar="KEY=VALUE", help="an option of the backend; repeatable")
    add("--config", type=Path, metavar="YAML", help="a config file of the backend")
    add("--lowering", choices=("inductor", "eager"), help="eager: run both models op by op")
    add("--no-dense", dest="dense", action="store_false", help="make the accelerated pictures only")
    add("--out", type=Path, default=Path("build/flux.png"), metavar="PNG", help="default: build/flux.png")
    add("--json", type=Path, metavar="FILE", help="write every figure there too")
    return parser


if __name__ == "__main__":
    main()
