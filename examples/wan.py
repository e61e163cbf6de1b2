"""Make a video with Wan twice, dense and with backend="chipmunk", and compare time and frames.

    python examples/wan.py                                                         # Wan2.1-T2V-14B, from the hub
    python examples/wan.py --model Wan-AI/Wan2.2-T2V-A14B-Diffusers --prompt "a lighthouse in a storm"
    python examples/wan.py --image first.png --model Wan-AI/Wan2.1-I2V-14B-720P-Diffusers
    python examples/wan.py --random-weights --blocks 4                             # speed alone, no download
    python examples/wan.py --tiny --steps 12                                       # seconds on a CPU

Guidance calls the transformer twice a step, and each branch has caches of its own. Wan 2.2 has two transformers, one for
high and one for low noise: each counts its own steps, the first of which is a refresh.
"""

import sys
from functools import partial
from typing import Any

import torch
from video import Family, Settings, diffusers_class, main

WORDS, TEXT = 12, 16  # tokens of a tiny prompt, and their width


def tiny(image: bool) -> tuple[Any, Settings]:
    """Two experts, as in Wan 2.2; from a picture, one that attends to it, as in Wan 2.1."""
    torch.manual_seed(0)
    scheduler = diffusers_class("UniPCMultistepScheduler")(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    settings: Settings = {
        "prompt_embeds": torch.randn(1, 512 if image else WORDS, TEXT),
        "negative_prompt_embeds": torch.randn(1, 512 if image else WORDS, TEXT),
        "guidance_scale": 5.0,
    }
    if not image:
        experts = {"transformer": transformer(), "transformer_2": transformer()}
        pipe = diffusers_class("WanPipeline")(None, None, None, scheduler, boundary_ratio=0.875, **experts)
        return pipe, settings
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    seen = CLIPVisionConfig(
        hidden_size=20, intermediate_size=20, num_attention_heads=2, num_hidden_layers=2, image_size=28, patch_size=14
    )
    encoder, processor = CLIPVisionModel(seen), CLIPImageProcessor(crop_size=28, size=28)
    vae = diffusers_class("AutoencoderKLWan")(
        base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    # latents, a mask of the four frames in each of them, and the encoded picture
    seeing = transformer(in_channels=4 + 4 + 4, image_dim=20, added_kv_proj_dim=24)
    eyes = {"image_encoder": encoder, "image_processor": processor}
    return diffusers_class("WanImageToVideoPipeline")(None, None, vae, scheduler, transformer=seeing, **eyes), settings


def transformer(in_channels: int = 4, **image: int) -> Any:
    return diffusers_class("WanTransformer3DModel")(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=in_channels,
        out_channels=4,
        text_dim=TEXT,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
        **image,
    )


FAMILY = Family(
    name="wan",
    hub=("Wan-AI/Wan2.1-T2V-14B-Diffusers", "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers"),
    pipelines=("WanPipeline", "WanImageToVideoPipeline"),
    size=(720, 1280, 81),
    frames_per_second=16,
    tiny=tiny,
    vae_fp32=True,
)
run = partial(main, FAMILY, __doc__ or "")

if __name__ == "__main__":
    run(sys.argv[1:])
