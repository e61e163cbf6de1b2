"""Make a video with HunyuanVideo twice, dense and with backend="chipmunk", and compare time and frames.

    python examples/hunyuan.py                                    # hunyuanvideo-community/HunyuanVideo, from the hub
    python examples/hunyuan.py --image first.png --prompt "the lights of the harbour go out"
    python examples/hunyuan.py --random-weights --blocks 4        # speed alone, no download
    python examples/hunyuan.py --tiny --steps 12                  # seconds on a CPU

Prompts are padded to 256 tokens, and the mask of the padding keeps attention off the fast kernels. The backend drops the
padded keys in every phase, dense ones included, which changes no result. --random-weights measures that gain by itself.
"""

import sys
from functools import partial
from typing import Any

import torch
from video import Family, Settings, diffusers_class, main

WORDS, TEXT = 12, 16  # tokens of a tiny prompt, and their width


def tiny(image: bool) -> tuple[Any, Settings]:
    """5 of 12 tokens are words. From a picture, its latents and a mask are channels beside those of the video."""
    torch.manual_seed(0)
    transformer = diffusers_class("HunyuanVideoTransformer3DModel")(
        in_channels=4 + 4 + 1 if image else 4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        guidance_embeds=not image,
        text_embed_dim=TEXT,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
        image_condition_type="latent_concat" if image else None,
    )
    scheduler = diffusers_class("FlowMatchEulerDiscreteScheduler")(shift=7.0)
    settings: Settings = {
        "prompt_embeds": torch.randn(1, WORDS, TEXT),
        "pooled_prompt_embeds": torch.randn(1, 8),
        "prompt_attention_mask": (torch.arange(WORDS) < 5).long()[None],
    }
    parts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    parts |= {"transformer": transformer, "scheduler": scheduler}
    if not image:
        return diffusers_class("HunyuanVideoPipeline")(vae=None, **parts), settings
    vae = diffusers_class("AutoencoderKLHunyuanVideo")(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        mid_block_add_attention=False,
    )
    return diffusers_class("HunyuanVideoImageToVideoPipeline")(vae=vae, image_processor=None, **parts), settings


FAMILY = Family(
    name="hunyuan",
    hub=("hunyuanvideo-community/HunyuanVideo", "hunyuanvideo-community/HunyuanVideo-I2V"),
    pipelines=("HunyuanVideoPipeline", "HunyuanVideoImageToVideoPipeline"),
    size=(720, 1280, 129),
    frames_per_second=24,
    tiny=tiny,
)
run = partial(main, FAMILY, __doc__ or "")

if __name__ == "__main__":
    run(sys.argv[1:])
