"""Transformer classes of diffusers beside those of the zoo, tiny: at least 256 tokens, and what is in them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.harness.diffusers_models import position_ids

Inputs = dict[str, Any]
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
VIDEO_HEADS = {"num_attention_heads": 2, "attention_head_dim": 12}


@dataclass(frozen=True)
class Listed:
    """`inputs` of `draw`; attention and MLP sites by reading the class; the timestep of step 0.

    `dense`: how many of the sites have a mask that keeps them dense; `names` of latents and timestep.
    """

    config: dict[str, Any]
    inputs: Callable[[Callable[..., Tensor]], Inputs]
    attention: int = 2
    mlp: int = 2
    horizon: float = 1000.0
    dense: int = 0
    names: tuple[str, str] = ("hidden_states", "timestep")


def _sized(draw: Callable[..., Tensor]) -> Inputs:
    sizes = {"original_size": torch.full((2, 2), 32.0), "target_size": torch.full((2, 2), 32.0)}
    return sizes | {
        "hidden_states": draw(2, 4, 32, 32),
        "encoder_hidden_states": draw(2, 12, 16),
        "timestep": torch.tensor([5, 500]),
        "crop_coords": torch.zeros(2, 2),
    }


def packed(draw: Callable[..., Tensor]) -> Inputs:
    return {
        "hidden_states": draw(1, 256, 4),
        "encoder_hidden_states": draw(1, 24, 32),
        "img_ids": position_ids(1, 16, 16),
        "txt_ids": torch.zeros(24, 3),
        "timestep": torch.ones(1),
    }


def video(draw: Callable[..., Tensor]) -> Inputs:
    return {
        "hidden_states": draw(1, 4, 2, 24, 24),
        "encoder_hidden_states": draw(1, 10, 16),
        "timestep": torch.tensor([500]),
    }


def _sound_and_video(draw: Callable[..., Tensor]) -> Inputs:
    return {
        "hidden_states": draw(1, 256, 4),
        "audio_hidden_states": draw(1, 64, 4),
        "encoder_hidden_states": draw(1, 12, 16),
        "audio_encoder_hidden_states": draw(1, 12, 16),
        "timestep": torch.tensor([500.0]),
        **{"num_frames": 1, "height": 16, "width": 16, "audio_num_frames": 64, "fps": 25.0},
    }


def _sound(draw: Callable[..., Tensor]) -> Inputs:
    return {
        "hidden_states": draw(2, 4, 255),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": draw(2, 7, 12),
        "global_hidden_states": draw(2, 1, 8),
        "rotary_embedding": (torch.ones(256, 8), torch.zeros(256, 8)),
    }


def _image(draw: Callable[..., Tensor]) -> Inputs:
    return {
        "hidden_states": draw(2, 4, 32, 32),
        "timestep": torch.tensor([1.0, 0.5]),
        "encoder_hidden_states": draw(2, 6, 8),
    }


_COGVIEW = {
    **HEADS,
    **{"patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2, "sample_size": 16},
    **{"text_embed_dim": 16, "time_embed_dim": 16, "condition_dim": 8, "pos_embed_max_size": 16},
}
_TWO_STREAMS = {**HEADS, "in_channels": 4, "num_layers": 2, "num_single_layers": 2, "joint_attention_dim": 32}
_WAN = {
    **VIDEO_HEADS,
    **{"in_channels": 4, "out_channels": 4, "text_dim": 16, "freq_dim": 32, "ffn_dim": 64, "rope_max_seq_len": 32},
}
_APPROXIMATOR = {"approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1}
_SOUND_AND_VIDEO = {
    **{"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2},
    **{"cross_attention_dim": 16, "audio_in_channels": 4, "audio_out_channels": 4, "audio_num_attention_heads": 2},
    **{"audio_attention_head_dim": 4, "audio_cross_attention_dim": 8, "caption_channels": 16},
    "rope_double_precision": False,
}
_SOUND = {
    **HEADS,
    **{"sample_size": 4, "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_key_value_attention_heads": 2},
    **{"cross_attention_dim": 32, "time_proj_dim": 16, "global_states_input_dim": 8, "cross_attention_input_dim": 12},
}
_PRX = {"in_channels": 4, "context_in_dim": 8, "hidden_size": 32, "mlp_ratio": 2.0, "num_heads": 2, "depth": 2}

LISTED: dict[str, Listed] = {
    "CogView3PlusTransformer2DModel": Listed(_COGVIEW, _sized),
    "CogView4Transformer2DModel": Listed(_COGVIEW | {"rope_axes_dim": (8, 8)}, _sized, mlp=4),
    # the approximator of the modulation is a stack of MLPs over tokens of its own
    "ChromaTransformer2DModel": Listed(
        _TWO_STREAMS | _APPROXIMATOR | {"axes_dims_rope": (4, 4, 8)}, packed, attention=4, mlp=7, horizon=1.0
    ),
    "OvisImageTransformer2DModel": Listed(
        _TWO_STREAMS | {"out_channels": 4, "axes_dims_rope": (4, 4, 8)}, packed, attention=4, mlp=6, horizon=1.0
    ),
    "BriaTransformer2DModel": Listed(_TWO_STREAMS | {"axes_dims_rope": [0, 8, 8]}, packed, attention=4, mlp=6),
    "SkyReelsV2Transformer3DModel": Listed(_WAN | {"num_layers": 2}, video),
    "ChronoEditTransformer3DModel": Listed(_WAN | {"num_layers": 2}, video),
    # two layers of two towers
    "LTX2VideoTransformer3DModel": Listed(_SOUND_AND_VIDEO, _sound_and_video, attention=4, mlp=4),
    "StableAudioDiTModel": Listed(_SOUND, _sound),
    "PRXTransformer2DModel": Listed(_PRX | {"axes_dim": [8, 8]}, _image, horizon=1.0),
}
