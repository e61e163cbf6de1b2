"""Twenty-two tiny Diffusion Transformers with random weights and the bundled one, with inputs and what is known of them.

    model, inputs = build("Flux")          # eval mode, CPU, fp32
    model(**step_inputs("Flux", inputs, i=3, n=50, drift=0.05))

`build` gives the smallest inputs that run; `enlarged` at least 512 image or video tokens where the architecture has
a site at all, for tests in which sparsity must be real. `facts` tells what a matcher should find.
"""

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.harness import diffusers_models as d
from tests.harness.hand_models import (
    EinsumAttention,
    FusedAttention,
    GeluMlp,
    ModuleAttention,
    SoftmaxAttention,
    SwigluMlp,
    hand,
)

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """make(draw, large) -> (module, inputs); which inputs are latents and timestep; the timestep of step 0;
    whether the model runs on CPU with all its weights in bf16 (two mix dtypes unless CUDA autocast helps)."""

    make: Callable[[Callable[..., Tensor], bool], tuple[nn.Module, Inputs]]
    latents: str = "hidden_states"
    timestep: str = "timestep"
    horizon: float = 1000.0
    bf16: bool = True


_hand = partial(Entry, latents="x", timestep="t")

ZOO: dict[str, Entry] = {
    "DiT": Entry(d.dit),
    "PixArt": Entry(d.pixart),
    "SD3": Entry(d.sd3),
    "Flux": Entry(d.flux, horizon=1.0),
    "HunyuanVideo": Entry(d.hunyuan_video),
    "Wan": Entry(d.wan),
    "Mochi": Entry(d.mochi),
    "CogVideoX": Entry(d.cogvideox),
    "LTX": Entry(d.ltx),
    "AuraFlow": Entry(d.auraflow, horizon=1.0),
    "QwenImage": Entry(d.qwen_image, horizon=1.0),
    "Kandinsky5": Entry(d.kandinsky5, bf16=False),
    "HunyuanDiT": Entry(d.hunyuan_dit, bf16=False),
    "Latte": Entry(d.latte),
    "Flux2": Entry(d.flux2, horizon=1.0),
    "WanI2V": Entry(d.wan_i2v),
    "Lumina2": Entry(d.lumina2, horizon=1.0),
    "Sana": Entry(d.sana),
    "Bundled": Entry(d.bundled, horizon=1.0),
    "H-fused-sdpa/gelu": _hand(hand(FusedAttention, GeluMlp)),
    "H-softmax/gelu": _hand(hand(SoftmaxAttention, GeluMlp)),
    "H-einsum/swiglu": _hand(hand(EinsumAttention, SwigluMlp)),
    "H-mha/gelu": _hand(hand(ModuleAttention, GeluMlp)),
}


def names() -> list[str]:
    return list(ZOO)


@cache
def _all_facts() -> dict[str, dict[str, Any]]:
    return json.loads(Path(__file__).with_name("facts.json").read_text())


def facts(name: str) -> dict[str, Any]:
    """What is in the model of `build`: attention, cross, mlp (counts of sites), mlp_forms, timestep, latents, ..."""
    return _all_facts()[name]


def build(name: str, seed: int = 0) -> tuple[nn.Module, Inputs]:
    """The model, with weights and inputs drawn from `seed`, and the smallest inputs that it runs on."""
    return _make(name, seed, large=False)


def enlarged(name: str, seed: int = 0) -> tuple[nn.Module, Inputs]:
    """Like `build` with at least 512 image or video tokens (and the same sites)."""
    return _make(name, seed, large=True)


def _make(name: str, seed: int, large: bool) -> tuple[nn.Module, Inputs]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, inputs = ZOO[name].make(partial(torch.randn, generator=torch.Generator().manual_seed(seed)), large)
    _fill_blank_parameters(model, seed)
    return model.eval().float(), inputs


def _fill_blank_parameters(model: nn.Module, seed: int) -> None:
    """Zero gates would hide numerical errors and torch.empty is not reproducible: draw such parameters by name."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            blank = not parameter.any() or not parameter.isfinite().all() or "pad_token" in name
            if parameter.is_floating_point() and parameter.numel() and blank:
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)


def step_inputs(name: str, inputs: Inputs, i: int, n: int, drift: float = 0.05, seed: int = 0) -> Inputs:
    """Inputs of denoising step i of n: the timestep falls from its highest value towards 0, and the latents have
    taken i steps of a random walk, each of standard deviation `drift`. All other inputs stay the same objects."""
    entry = ZOO[name]
    latents, timestep = inputs[entry.latents], inputs[entry.timestep]
    generator = torch.Generator().manual_seed(seed)
    walk = sum(torch.randn(latents.shape, generator=generator) for _ in range(i))
    moved = (latents.float() + drift * walk).to(latents.dtype)
    return inputs | {entry.latents: moved, entry.timestep: torch.full_like(timestep, entry.horizon * (n - i) / n)}


def cast(name: str, model: nn.Module, inputs: Inputs, dtype: torch.dtype) -> tuple[nn.Module, Inputs]:
    """Model and inputs in another floating type; timesteps, position ids and rotary tables keep theirs, as in
    diffusers' pipelines. Converts the module in place."""

    def convert(key: str, value: Any) -> Any:
        kept = key == ZOO[name].timestep or "ids" in key or "rotary" in key
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() and not kept else value

    return model.to(dtype), {key: convert(key, value) for key, value in inputs.items()}


def first_tensor(output: Any) -> Tensor:
    """The prediction, whether a model returns a tensor, a tuple or a diffusers output, of a tensor or a list of them."""
    return output if isinstance(output, Tensor) else first_tensor(output[0])
