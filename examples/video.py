"""What the video examples share: loading a pipeline, generating dense and accelerated, reporting; speed alone.

A model is one file that fills in a `Family`, and one YAML in configs/ with its settings.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from common import default_dtype, print_table
from torch import Tensor, nn

import chipmunk_fx
from chipmunk_fx import bench_model
from chipmunk_fx.errors import ChipmunkError

CONFIGS = Path(__file__).resolve().parent / "configs"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PROMPT = "a chipmunk runs along a stone wall, autumn leaves in the wind"
# A tiny model has few tokens: share lists among few rows, and let nothing decide that sparse is not worth it.
TINY: Mapping[str, Any] = {
    "gate": "off",
    "lowering": "eager",
    "attention.group_rows": 16,
    "attention.dense_layers": 0,
    "memory.offload": "none",
}

Settings = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """A video model. `hub`: its default weights, from text and from a picture. `pipelines`: diffusers' classes for the
    same. `guidance`: None keeps the pipeline's own. `tiny(image)` gives a pipeline with random weights, the names of its
    parts that are left out, and what a call of it takes in place of a prompt."""

    name: str  # also of its YAML and of its configuration in `chipmunk-fx bench model`
    hub: tuple[str, str | None]
    pipelines: tuple[str, str | None]
    size: tuple[int, int, int]  # height, width, frames
    frames_per_second: int
    tiny: Callable[[bool], tuple[Any, Settings]]
    fullgraph: bool = False
    vae_fp32: bool = False


@dataclass(frozen=True)
class Run:
    """One generation: frames [F, 3, H, W] in [0, 1], or latents; seconds of each call of a transformer, and of all."""

    frames: Tensor
    calls: list[float]
    seconds: float


def main(family: Family, description: str, arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Follow a command line; returns the figures that --json writes, and the frames of both runs."""
    parser = make_parser(family, description)
    given = parser.parse_args(arguments)
    given.dtype = given.dtype or default_dtype(given.device)
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {given.device}: PyTorch finds no CUDA device here; use --device cpu")
    try:
        options = options_of(family, given)
        eager = chipmunk_fx.Config.from_options(options).lowering == "eager"
        if given.random_weights:
            return measure_random(family, given, options)
        with opened(family, given) as (pipe, settings):
            return generate_twice(family, given, pipe, settings, options, eager)
    except (ChipmunkError, ValueError, OSError) as problem:
        parser.exit(2, f"{parser.prog}: {problem}\n")


def measure_random(family: Family, given: argparse.Namespace, options: Settings) -> dict[str, Any]:
    """The real configuration with random weights and embeddings: `chipmunk-fx bench model` under this example's settings."""
    given.model = family.name
    given.option = [f"{key}={yaml.safe_dump(value, default_flow_style=True)}" for key, value in options.items()]
    return {"ways": bench_model.run(given, resolve=_no_factory)}


def _no_factory(path: str) -> Any:
    raise ValueError(f"{path}: measured by name here")


def diffusers_class(name: str) -> Any:
    """Looked up when it is needed: diffusers' pipelines load transformers."""
    return getattr(import_module("diffusers"), name)


@contextmanager
def opened(family: Family, given: argparse.Namespace) -> Iterator[tuple[Any, Settings]]:
    """The pipeline on its device, and the settings of its call."""
    name = family.pipelines[given.image is not None]
    if name is None:
        raise ValueError(f"--image: diffusers has no pipeline of {family.name} that starts from a picture")
    kind = diffusers_class(name)
    height, width, frames = given.size or family.size
    settings: Settings = {"height": height, "width": width, "num_frames": frames}
    with TemporaryDirectory() as folder:
        if given.tiny:
            made, embeddings = family.tiny(given.image is not None)
            made.save_pretrained(folder)
            absent = {part: None for part, value in made.components.items() if value is None}
            pipe = kind.from_pretrained(folder, **absent)
            settings |= {"height": 128, "width": 128, "num_frames": 9, **embeddings}
            settings |= {"output_type": "latent"}
        else:
            path = given.model or family.hub[given.image is not None]
            pipe = kind.from_pretrained(path, dtype=DTYPES[given.dtype])
            settings |= {"prompt": given.prompt or PROMPT, "output_type": "pt"}
            if family.vae_fp32:
                pipe.vae.to(torch.float32)
            pipe.vae.enable_tiling()
        if given.image is not None:
            from PIL import Image

            settings["image"] = Image.open(given.image).convert("RGB").resize((settings["width"], settings["height"]))
        if given.guidance is not None:
            settings["guidance_scale"] = given.guidance
        pipe.enable_model_cpu_offload() if given.offload else pipe.to(given.device)
        yield pipe, settings


def generate_twice(
    family: Family, given: argparse.Namespace, pipe: Any, settings: Settings, options: Settings, eager: bool
) -> dict[str, Any]:
    """Dense, then accelerated, from the same noise; prints what each did and how far apart they are. `eager`: the dense
    pipeline is left uncompiled."""
    originals = transformers(pipe)
    if given.explain:
        inputs = first_inputs(pipe, settings)
        for name, model in originals.items():
            print(f"{name}\n{chipmunk_fx.explain(model, config=options, **inputs)}\n")
    dense = None
    if given.dense:
        with_transformers(pipe, {} if eager else compiled(family, originals, "inductor"))
        dense = timed(pipe, settings, given, warm_up=not eager)
    ours = compiled(family, originals, "chipmunk", options=options)
    with_transformers(pipe, ours)
    sparse = timed(pipe, settings, given, warm_up=not eager)

    summaries = {name: chipmunk_fx.summary(model) for name, model in ours.items()}
    for name, summary in summaries.items():
        print(f"{name}\n{summary}\n")
    figures = {
        "options": options,
        "steps": given.steps,
        "phases": {name: summary.phases for name, summary in summaries.items()},
        "flops_ratio": {name: summary.flops_ratio for name, summary in summaries.items()},
        "cache_bytes": {name: summary.cache_bytes for name, summary in summaries.items()},
        "fallbacks": {name: len(summary.fallbacks) for name, summary in summaries.items()},
        "chipmunk_s": sparse.seconds,
        "chipmunk_calls_s": sparse.calls,
        "dense_s": dense.seconds if dense else None,
        "speed_up": dense.seconds / sparse.seconds if dense else None,
        "psnr_db": psnr(dense.frames, sparse.frames) if dense and not given.tiny else None,
        "relative_error": relative(dense.frames, sparse.frames) if dense else None,
    }
    rows = [(name, run) for name, run in (("dense", dense), ("chipmunk", sparse)) if run]
    print_table([{"run": name, "all, s": run.seconds, "transformer, s": sum(run.calls)} for name, run in rows])
    if dense:
        near = (
            f"off by {figures['relative_error']:.2%} of the norm" if given.tiny else f"{figures['psnr_db']:.2f} dB PSNR"
        )
        print(f"speed-up {figures['speed_up']:.2f}x, {near} against dense")
    if not given.tiny:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        for name, run in rows:
            write_video(run.frames, given.out.with_stem(f"{given.out.stem}-{name}"), family.frames_per_second)
    if given.json:
        finite = {key: None if value == math.inf else value for key, value in figures.items()}  # JSON has no infinity
        given.json.write_text(json.dumps(finite, indent=2) + "\n")
    return figures | {"frames": {name: run.frames for name, run in rows}}


def transformers(pipe: Any) -> dict[str, nn.Module]:
    """Wan 2.2 has one for high and one for low noise."""
    parts = {name: getattr(pipe, name, None) for name in ("transformer", "transformer_2")}
    return {name: model for name, model in parts.items() if model is not None}


def with_transformers(pipe: Any, models: Mapping[str, Any]) -> None:
    for name, model in models.items():
        setattr(pipe, name, model)


def compiled(family: Family, models: Mapping[str, nn.Module], backend: str, **options: Any) -> dict[str, Any]:
    return {
        name: torch.compile(model, backend=backend, fullgraph=family.fullgraph, **options)
        for name, model in models.items()
    }


class _Seen(Exception):
    """Ends a generation at the transformer's first call."""


def first_inputs(pipe: Any, settings: Settings) -> Settings:
    """What the pipeline calls its transformer with first. A second one takes the same."""
    seen: Settings = {}

    def stop(module: nn.Module, args: tuple, kwargs: Settings) -> None:
        seen.update(kwargs)
        raise _Seen

    hook = pipe.transformer.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        pipe(**settings, num_inference_steps=2)
    except _Seen:
        pass
    finally:
        hook.remove()
    return seen


def timed(pipe: Any, settings: Settings, given: argparse.Namespace, warm_up: bool) -> Run:
    """A generation, after one that compiles where `warm_up`. Each call of a transformer is timed with its device's work."""
    device, calls = torch.device(given.device), []

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def before(*_: Any) -> None:
        calls.append(-now())

    def after(*_: Any) -> None:
        calls[-1] += now()

    hooks = []
    for model in transformers(pipe).values():
        hooks += [model.register_forward_pre_hook(before), model.register_forward_hook(after)]
    try:
        for _ in range(1 + warm_up):
            calls.clear()
            began = now()
            generator = torch.Generator().manual_seed(given.seed)
            made = pipe(**settings, num_inference_steps=given.steps, generator=generator, return_dict=False)[0]
            seconds = now() - began
    finally:
        for hook in hooks:
            hook.remove()
    return Run(made[0].float().cpu(), list(calls), seconds)


def psnr(a: Tensor, b: Tensor) -> float:
    """In dB, for a peak of 1; infinite where both are equal."""
    error = (a.double() - b.double()).square().mean().item()
    return -10 * math.log10(error) if error else math.inf


def relative(want: Tensor, got: Tensor) -> float:
    """Distance as a share of the norm of `want`."""
    return ((got - want).double().norm() / want.double().norm()).item()


def write_video(frames: Tensor, path: Path, frames_per_second: int) -> None:
    """[F, 3, H, W] in [0, 1]; the format follows the ending of `path`."""
    from common import to_picture
    from diffusers.utils import export_to_gif, export_to_video

    pictures = [to_picture(frame) for frame in frames]
    if path.suffix == ".gif":
        export_to_gif(pictures, str(path), fps=frames_per_second)
    else:
        export_to_video(pictures, str(path), fps=frames_per_second)
    print(f"video: {path}")


def options_of(family: Family, given: argparse.Namespace) -> Settings:
    """torch.compile's options: the model's YAML, or a preset in its place; what a tiny model needs; what else was said."""
    options: Settings = dict(TINY) if given.tiny else {}
    if given.lowering:
        options["lowering"] = given.lowering
    for text in given.option:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--option {text}: write KEY=VALUE, for example attention.density=0.1")
        options[key] = yaml.safe_load(value)
    if given.config or "preset" not in options:  # a preset lies below a file, which would hide it
        options["config"] = str(given.config or CONFIGS / f"{family.name}.yaml")
    return options


def size(text: str) -> tuple[int, int, int]:
    """Height, width and frames of "720x1280x81"."""
    height, width, frames = (int(part) for part in text.split("x"))
    if min(height, width, frames) < 1:
        raise ValueError(text)
    return height, width, frames


def make_parser(family: Family, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", metavar="FOLDER_OR_HUB_NAME", help=f"a pipeline; default: {family.hub[0]}")
    ways = parser.add_mutually_exclusive_group()
    ways.add_argument("--random-weights", action="store_true", help="the real configuration, for its speed alone")
    ways.add_argument("--tiny", action="store_true", help="a few blocks with random weights, saved and loaded again")
    add("--prompt", help="what the video shows")
    add("--image", type=Path, metavar="PICTURE", help="the first frame, for models that take one")
    default = "x".join(map(str, family.size))
    add("--size", type=size, metavar="HxWxF", help=f"pixels and frames; default: {default}")
    add("--steps", type=int, default=50, help="default: 50")
    add("--guidance", type=float, help="default: the pipeline's own")
    add("--seed", type=int, default=0, help="default: 0")
    add("--dtype", choices=tuple(DTYPES), help="default: bf16 where the device multiplies it, else fp32")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda if there is one")
    add("--offload", action="store_true", help="keep on the device only the part of the pipeline that is at work")
    add("--option", action="append", default=[], metavar="KEY=VALUE", help="an option of the backend; repeatable")
    add("--config", type=Path, metavar="YAML", help=f"of the backend; default: configs/{family.name}.yaml")
    add("--lowering", choices=("inductor", "eager"), help="eager: run both models op by op")
    add("--explain", action="store_true", help="first list every site, and why it is rewritten or not")
    add("--no-dense", dest="dense", action="store_false", help="make the accelerated video only")
    add("--out", type=Path, default=Path(f"build/{family.name}.mp4"), metavar="MP4", help="or a .gif")
    add("--json", type=Path, metavar="FILE", help="write every figure there too")
    bench_model.measuring_arguments(parser.add_argument_group("with --random-weights"))
    return parser
