"""Make a video with Mochi twice, dense and with backend="chipmunk", and compare time and frames.

    python examples/mochi.py                              # genmo/mochi-1-preview, from the hub
    python examples/mochi.py --random-weights --blocks 4  # speed alone, no download
    python examples/mochi.py --tiny --steps 12            # seconds on a CPU

Mochi picks the valid tokens of a prompt by a mask. That is one graph with fullgraph=True and breaks into eleven without
it, so that the model is compiled with it here. Guidance is one call with a batch of two.
"""

import sys
from functools import partial
from typing import Any

import torch
from video import Family, Settings, diffusers_class, main

WORDS, TEXT = 16, 16  # tokens of a tiny prompt, and their width


def tiny(image: bool) -> tuple[Any, Settings]:
    del image  # there is no such pipeline
    torch.manual_seed(0)
    transformer = diffusers_class("MochiTransformer3DModel")(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=12,
        qk_norm="rms_norm",
        text_embed_dim=TEXT,
        time_embed_dim=4,
        activation_fn="swiglu",
        max_sequence_length=WORDS,
    )
    scheduler = diffusers_class("FlowMatchEulerDiscreteScheduler")(invert_sigmas=True)
    return diffusers_class("MochiPipeline")(scheduler, None, None, None, transformer), {
        "prompt_embeds": torch.randn(1, WORDS, TEXT),
        "prompt_attention_mask": (torch.arange(WORDS) < 9)[None],
        "negative_prompt_embeds": torch.randn(1, WORDS, TEXT),
        "negative_prompt_attention_mask": (torch.arange(WORDS) < 1)[None],
    }


FAMILY = Family(
    name="mochi",
    hub=("genmo/mochi-1-preview", None),
    pipelines=("MochiPipeline", None),
    size=(480, 848, 163),
    frames_per_second=30,
    tiny=tiny,
    fullgraph=True,
)
run = partial(main, FAMILY, __doc__ or "")

if __name__ == "__main__":
    run(sys.argv[1:])
