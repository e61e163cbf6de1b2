"""Real pipelines of diffusers with their schedulers around the tiny transformers of the zoo.

There are no text encoders and no VAE: prompts are given as random embeddings, latents are returned as they are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.harness.zoo import build

STEPS = 8
TEXT = 12  # tokens of a prompt


@dataclass
class Run:
    """A pipeline, what its call is given, the attention sites in its blocks, and its calls of the model a step."""

    name: str
    pipe: Any
    arguments: dict[str, Any]
    attention: int
    branches: int = 1

    def __call__(self, seed: int = 0) -> Tensor:
        self.pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(seed)
        given = {"num_inference_steps": STEPS, "output_type": "latent", "return_dict": False}
        return self.pipe(**given, **self.arguments, generator=generator)[0]

    @property
    def model(self) -> nn.Module:
        return self.pipe.transformer

    def compile(self, options: dict[str, Any]) -> None:
        torch._dynamo.reset()
        self.pipe.transformer = torch.compile(self.model, backend="chipmunk", options=options)


def words(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def flux() -> Run:
    """Guidance is distilled: one call a step. 16x16 image tokens."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    encoders = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    pipe = FluxPipeline(scheduler, transformer=build("Flux")[0], **encoders)
    prompt = {"prompt_embeds": words(1, 1, TEXT, 32), "pooled_prompt_embeds": words(2, 1, 32)}
    return Run("Flux", pipe, prompt | {"height": 256, "width": 256}, attention=4)


def wan() -> Run:
    """Two calls a step, with and without the prompt; a multistep solver. 2x8x8 video tokens."""
    from diffusers import UniPCMultistepScheduler, WanPipeline

    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe = WanPipeline(None, None, None, scheduler, transformer=build("Wan")[0])
    prompt = {"prompt_embeds": words(1, 1, TEXT, 16), "negative_prompt_embeds": words(2, 1, TEXT, 16)}
    size = {"height": 128, "width": 128, "num_frames": 5}
    return Run("Wan", pipe, prompt | size | {"guidance_scale": 5.0}, attention=2, branches=2)


def sd3() -> Run:
    """One call a step with a batch of two: without and with the prompt. 16x16 image tokens."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    names = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = StableDiffusion3Pipeline(build("SD3")[0], scheduler, **dict.fromkeys(names))
    prompt = {
        "prompt_embeds": words(1, 1, TEXT, 32),
        "negative_prompt_embeds": words(2, 1, TEXT, 32),
        "pooled_prompt_embeds": words(3, 1, 64),
        "negative_pooled_prompt_embeds": words(4, 1, 64),
    }
    return Run("SD3", pipe, prompt | {"height": 128, "width": 128}, attention=4)


def hunyuan_video() -> Run:
    """One call a step; 5 of 12 text tokens are words, the others are masked. 2x8x8 video tokens."""
    from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline

    encoders = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    pipe = HunyuanVideoPipeline(transformer=build("HunyuanVideo")[0], scheduler=scheduler, **encoders)
    prompt = {
        "prompt_embeds": words(1, 1, TEXT, 16),
        "pooled_prompt_embeds": words(2, 1, 8),
        "prompt_attention_mask": (torch.arange(TEXT) < 5).long()[None],
    }
    return Run("HunyuanVideo", pipe, prompt | {"height": 64, "width": 64, "num_frames": 5}, attention=4)


PIPELINES: dict[str, Callable[[], Run]] = {"Flux": flux, "Wan": wan, "SD3": sd3, "HunyuanVideo": hunyuan_video}
