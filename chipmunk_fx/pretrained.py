"""A model and example inputs from a folder that diffusers saved, so that it can be looked at without a script.

Only config.json is read: weights are left uninitialised, which costs no memory as long as nothing computes with them.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from chipmunk_fx.errors import ChipmunkError

DTYPE = torch.bfloat16
Size = tuple[int, ...]  # (height, width) or (height, width, frames) in pixels


class PretrainedError(ChipmunkError, ValueError):
    """A folder from which no model or no inputs can be made."""


@dataclass(frozen=True)
class Family:
    """What a pipeline feeds one class of model: its usual size in pixels, the factors by which the autoencoder
    shrinks height and width (space) and frames (time), the text tokens, and `inputs(config, (t, h, w), text)`."""

    size: Size
    text: int
    inputs: Callable[[Any, tuple[int, int, int], int], dict[str, Any]]
    space: int = 8
    time: int = 4


def from_folder(path: Path, size: Size | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a saved transformer, or of a saved pipeline's `transformer` folder, with inputs for one call.

    `size` is in pixels and defaults to the usual one. Raises PretrainedError where the folder has no model, or
    one of a class whose inputs are not known.
    """
    try:
        import diffusers
        from accelerate import init_empty_weights
    except ImportError as missing:
        raise PretrainedError("--model needs diffusers and accelerate: pip install diffusers accelerate") from missing
    files = [folder / "config.json" for folder in (path, path / "transformer")]
    if not (found := [file for file in files if file.is_file()]):
        raise PretrainedError(f"neither {files[0]} nor {files[1]} exists; give the folder of a saved diffusers model")
    config = json.loads(found[0].read_text())
    name = config.get("_class_name")
    if name not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise PretrainedError(
            f"{found[0]} is of class {name!r}; inputs are known for {known}. For another class write a function that "
            "returns (model, keyword inputs) and use MODULE:FACTORY"
        )
    with init_empty_weights():
        model = getattr(diffusers, name).from_config(config)
    _allocate(model)
    return model.eval(), example_inputs(model, size)


def example_inputs(model: nn.Module, size: Size | None = None) -> dict[str, Any]:
    """Random inputs of one call, batch 1, in bf16; `size` in pixels, by default the usual one."""
    family = FAMILIES[type(model).__name__]
    height, width, frames = (*(size or family.size), 1)[:3]
    grid = ((frames - 1) // family.time + 1, height // family.space, width // family.space)
    return family.inputs(model.config, grid, family.text)


def _allocate(model: nn.Module) -> None:
    """Replace meta parameters by uninitialised ones, whose pages the system provides when they are first written.
    Buffers stay as they were computed."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            empty = nn.Parameter(torch.empty(parameter.shape, dtype=DTYPE), requires_grad=False)
            module.register_parameter(name, empty)


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=DTYPE)


def _time(value: float = 500.0) -> Tensor:
    return torch.full((1,), value)


def _flux(config: Any, grid: tuple[int, int, int], text: int) -> dict[str, Any]:
    _, h, w = grid
    rows, columns = torch.meshgrid(torch.arange(h // 2), torch.arange(w // 2), indexing="ij")  # 2 x 2 latents a token
    inputs = {
        "hidden_states": _normal(1, h * w // 4, config.in_channels),
        "encoder_hidden_states": _normal(1, text, config.joint_attention_dim),
        "pooled_projections": _normal(1, config.pooled_projection_dim),
        "img_ids": torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).float(),
        "txt_ids": torch.zeros(text, 3),
        "timestep": _time(0.5),
    }
    return inputs | ({"guidance": _time(3.5)} if config.guidance_embeds else {})


def _qwen(config: Any, grid: tuple[int, int, int], text: int) -> dict[str, Any]:
    _, h, w = grid
    return {
        "hidden_states": _normal(1, h * w // 4, config.in_channels),
        "encoder_hidden_states": _normal(1, text, config.joint_attention_dim),
        "encoder_hidden_states_mask": torch.ones(1, text, dtype=torch.int64),
        "timestep": _time(0.5),
        "img_shapes": [(1, h // 2, w // 2)],
    }


def _sd3(config: Any, grid: tuple[int, int, int], text: int) -> dict[str, Any]:
    return {
        "hidden_states": _normal(1, config.in_channels, *grid[1:]),
        "encoder_hidden_states": _normal(1, text, config.joint_attention_dim),
        "pooled_projections": _normal(1, config.pooled_projection_dim),
        "timestep": _time(),
    }


def _dit(config: Any, grid: tuple[int, int, int], text: int) -> dict[str, Any]:
    del text  # conditioned on a class
    return {
        "hidden_states": _normal(1, config.in_channels, *grid[1:]),
        "timestep": _time().long(),
        "class_labels": torch.zeros(1, dtype=torch.int64),
    }


def _pixart(config: Any, grid: tuple[int, int, int], text: int) -> dict[str, Any]:
    return {
        "hidden_states": _normal(1, config.in_channels, *grid[1:]),
        "encoder_hidden_states": _normal(1, text, config.caption_channels or config.cross_attention_dim),
        "timestep": _time().long(),
        "added_cond_kwargs": {
            "resolution": torch.tensor([[8.0 * grid[1], 8.0 * grid[2]]], dtype=DTYPE),
            "aspect_ratio": torch.tensor([[grid[1] / grid[2]]], dtype=DTYPE),
        },
    }


def _wan(config: Any, grid: tuple[int, int, int], text: int) -> dict[str, Any]:
    return {
        "hidden_states": _normal(1, config.in_channels, *grid),
        "encoder_hidden_states": _normal(1, text, config.text_dim),
        "timestep": _time().long(),
    }


def _hunyuan(config: Any, grid: tuple[int, int, int], text: int) -> dict[str, Any]:
    inputs = {
        "hidden_states": _normal(1, config.in_channels, *grid),
        "encoder_hidden_states": _normal(1, text, config.text_embed_dim),
        "encoder_attention_mask": torch.ones(1, text, dtype=torch.int64),
        "pooled_projections": _normal(1, config.pooled_projection_dim),
        "timestep": _time(),
    }
    return inputs | ({"guidance": _time(6000.0)} if config.guidance_embeds else {})


def _mochi(config: Any, grid: tuple[int, int, int], text: int) -> dict[str, Any]:
    return {
        "hidden_states": _normal(1, config.in_channels, *grid),
        "encoder_hidden_states": _normal(1, text, config.text_embed_dim),
        "encoder_attention_mask": torch.ones(1, text, dtype=torch.bool),
        "timestep": _time(),
    }


def _cogvideox(config: Any, grid: tuple[int, int, int], text: int) -> dict[str, Any]:
    t, h, w = grid
    del text  # the model knows the length of its text
    return {
        "hidden_states": _normal(1, t, config.in_channels, h, w),
        "encoder_hidden_states": _normal(1, config.max_text_seq_length, config.text_embed_dim),
        "timestep": _time(),
    }


def _ltx(config: Any, grid: tuple[int, int, int], text: int) -> dict[str, Any]:
    t, h, w = grid
    return {
        "hidden_states": _normal(1, t * h * w, config.in_channels),
        "encoder_hidden_states": _normal(1, text, config.caption_channels),
        "encoder_attention_mask": torch.ones(1, text, dtype=torch.bool),
        "timestep": _time(),
        "num_frames": t,
        "height": h,
        "width": w,
    }


FAMILIES = {
    "CogVideoXTransformer3DModel": Family((480, 720, 49), 226, _cogvideox),
    "DiTTransformer2DModel": Family((256, 256), 0, _dit),
    "FluxTransformer2DModel": Family((768, 1280), 512, _flux),
    "HunyuanVideoTransformer3DModel": Family((720, 1280, 129), 256, _hunyuan),
    "LTXVideoTransformer3DModel": Family((512, 704, 161), 128, _ltx, space=32, time=8),
    "MochiTransformer3DModel": Family((480, 848, 163), 256, _mochi, time=6),
    "PixArtTransformer2DModel": Family((1024, 1024), 300, _pixart),
    "QwenImageTransformer2DModel": Family((1328, 1328), 128, _qwen),
    "SD3Transformer2DModel": Family((1024, 1024), 333, _sd3),
    "WanTransformer3DModel": Family((720, 1280, 81), 512, _wan),
}
