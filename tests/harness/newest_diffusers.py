"""Transformer classes of diffusers with sound, several texts or conditions, tiny: at least 256 tokens, and what is in them."""

from collections.abc import Callable

import torch
from torch import Tensor

from tests.harness.diffusers_models import position_ids
from tests.harness.more_diffusers import HEADS, VIDEO_HEADS, Inputs, Listed, video

Draw = Callable[..., Tensor]
_WORDS = 12


def _one_row(draw: Draw) -> Inputs:
    places = torch.cat([torch.arange(_WORDS)[:, None].expand(-1, 3), position_ids(1, 16, 16).long() + 65536])
    return {
        "hidden_states": draw(1, _WORDS + 256, 8),
        "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": draw(1, _WORDS + 256, 16),
        "position_ids": places[None],
        "segment_ids": torch.ones(1, _WORDS + 256, dtype=torch.long),
        "indicator": torch.tensor([3] * _WORDS + [2] * 256)[None],
    }


def _song(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw(1, 512, 4),
        "timestep": torch.tensor([0.5]),
        "timestep_r": torch.tensor([0.5]),
        "encoder_hidden_states": draw(1, 10, 32),
        "context_latents": draw(1, 512, 8),
    }


def _bundles(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw(1, 4, 32, 32),
        "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": draw(1, 2, _WORDS, 16),
    }


def _packed(draw: Draw) -> Inputs:
    """Without a batch."""
    count = 2 * 12 * 12
    picture = torch.arange(_WORDS, _WORDS + count)
    places = torch.cat([torch.arange(_WORDS)[:, None].expand(-1, 3), position_ids(2, 12, 12).long() + _WORDS])
    return {
        "input_ids": torch.arange(_WORDS),
        "text_indexes": torch.arange(_WORDS),
        "position_ids": places.T.contiguous(),
        "und_len": _WORDS,
        "sequence_length": _WORDS + count,
        "vision_tokens": [draw(1, 4, 2, 24, 24)],
        "vision_token_shapes": [(2, 12, 12)],
        "vision_sequence_indexes": picture,
        "vision_mse_loss_indexes": picture,
        "vision_timesteps": torch.full((count,), 500.0),
        "vision_noisy_frame_indexes": [torch.arange(2)],
    }


def _music(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw(1, 4, 256),
        "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": draw(1, 256, 8),
    }


def _three_in_a_row(draw: Draw) -> Inputs:
    text, picture, sound = torch.arange(10), torch.arange(10, 298), torch.arange(298, 330)
    line = torch.arange(32)[:, None].expand(-1, 3).float()
    return {
        "hidden_states": draw(1, 288, 16),
        "audio_hidden_states": draw(1, 32, 4),
        "encoder_hidden_states": draw(1, 10, 16),
        "timestep": torch.tensor([500.0]),
        "timestep_indices": torch.zeros(330, dtype=torch.long),
        "token_tags": torch.tensor([0] * 10 + [1] * 288 + [2] * 32),
        "position_ids": torch.cat([line[:10], position_ids(2, 12, 12), line]),
        **{"video_indices": picture, "audio_indices": sound, "text_indices": text},
    }


def _posed(draw: Draw) -> Inputs:
    return video(draw) | {
        "hidden_states": draw(1, 12, 3, 24, 24),
        "pose_hidden_states": draw(1, 4, 2, 24, 24),
        "face_pixel_values": draw(1, 3, 5, 16, 16),
    }


def _with_sound(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw(1, 2, 24, 24, 9),
        "encoder_hidden_states": draw(1, _WORDS, 16),
        "pooled_projections": draw(1, 8),
        "timestep": torch.tensor([500.0]),
        "audio_hidden_states": draw(1, 64, 4),
        "encoder_attention_mask": torch.arange(_WORDS)[None] < 9,
    }


def _remembered(draw: Draw) -> Inputs:
    past = {"long": range(4), "mid": range(4, 6), "short": range(6, 8)}
    return (
        video(draw)
        | {"indices_hidden_states": torch.arange(8, 10)[None]}
        | {f"indices_latents_history_{name}": torch.tensor([list(frames)]) for name, frames in past.items()}
        | {f"latents_history_{name}": draw(1, 4, len(frames), 24, 24) for name, frames in past.items()}
    )


def _face(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw(1, 2, 4, 24, 24),
        "encoder_hidden_states": draw(1, 8, 8),
        "timestep": torch.tensor([500]),
        "id_cond": draw(1, 2),
        "id_vit_hidden": [draw(1, 2, 2) for _ in range(5)],
    }


def _references(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw(1, 320, 4, 1, 2, 2),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": draw(1, _WORDS, 16),
        "encoder_hidden_states_mask": torch.ones(1, _WORDS),
        "shape_list": [[(1, 16, 16), (1, 8, 8)]],
    }


_IDEOGRAM = {
    **{"in_channels": 8, "num_layers": 2, "attention_head_dim": 12, "num_attention_heads": 2, "adaln_dim": 8},
    **{"intermediate_size": 48, "llm_features_dim": 16, "mrope_section": (2, 2, 2)},
}
_ACE = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16},
    **{"num_key_value_heads": 1, "in_channels": 12, "audio_acoustic_hidden_dim": 4, "sliding_window": 32},
}
_FIBO = {
    **{"in_channels": 4, "dim": 64, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 4, "cap_feat_dim": 16},
    **{"injection_layer_ids": (1,), "perceiver_num_layers": 1, "min_num_gist_tokens": 8, "max_num_gist_tokens": 16},
    **{"gist_step": 4, "gist_min_text_len": 8, "gist_max_text_len": 32},
    **{"axes_dims": (8, 4, 4), "axes_lens": (64, 64, 64)},
}
_COSMOS = {
    **{"head_dim": 12, "hidden_size": 24, "intermediate_size": 48, "latent_channel": 4, "patch_latent_dim": 16},
    **{"num_attention_heads": 2, "num_hidden_layers": 2, "num_key_value_heads": 1, "vocab_size": 32},
    "rope_axes_dim": [2, 2, 2],
}
_MUSIC = {
    **{**HEADS, "in_channels": 4, "condition_dim": 8, "num_layers": 2, "ff_inner_dim": 64, "rotary_dim": 8},
    "fourier_embedding_dim": 16,
}
_H3 = {
    **{**HEADS, "hidden_size": 32, "num_layers": 2, "num_refiner_layers": 1, "ffn_dim": 64, "in_channels": 4},
    **{"audio_in_channels": 4, "text_dim": 16, "freq_dim": 32, "time_embed_hidden_dim": 32, "time_embed_dim": 16},
    "rope_freq_dim": 2,
}
_ANIMATE = {
    **{**VIDEO_HEADS, "in_channels": 12, "latent_channels": 4, "out_channels": 4, "text_dim": 16, "freq_dim": 32},
    **{"ffn_dim": 64, "num_layers": 2, "image_dim": None, "rope_max_seq_len": 32, "motion_encoder_size": 16},
    **{"motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16}, "motion_style_dim": 8, "motion_dim": 4},
    **{"motion_encoder_dim": 16, "face_encoder_hidden_dim": 16, "face_encoder_num_heads": 2},
    "inject_face_latents_blocks": 2,
}
_KANDINSKY = {
    **{"in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 16, "in_text_dim2": 8, "time_dim": 16, "model_dim": 24},
    **{"ff_dim": 48, "num_text_blocks": 1, "num_visual_blocks": 2, "axes_dims": (4, 4, 4), "in_audio_dim": 4},
    **{"out_audio_dim": 4, "text_token_padding": True, "ca_rope": True, "cross_gates": True, "fix_modulation": True},
}
_HELIOS = {
    **{**VIDEO_HEADS, "in_channels": 4, "out_channels": 4, "text_dim": 16, "freq_dim": 32, "ffn_dim": 128},
    **{"num_layers": 2, "rope_dim": (4, 4, 4)},
}
_CONSISTENT = {
    **{**HEADS, "in_channels": 4, "out_channels": 4, "time_embed_dim": 8, "text_embed_dim": 8, "num_layers": 2},
    **{"sample_width": 24, "sample_height": 24, "sample_frames": 5, "max_text_seq_length": 8, "is_train_face": True},
    **{"cross_attn_interval": 1, "cross_attn_dim_head": 8, "cross_attn_num_heads": 2, "LFE_id_dim": 2},
    **{"LFE_vit_dim": 2, "LFE_depth": 5, "LFE_dim_head": 8, "LFE_num_heads": 2, "LFE_num_id_token": 1},
    **{"LFE_num_querie": 1, "LFE_output_dim": 21},
}
_JOY = {
    **{"in_channels": 4, "hidden_size": 32, "num_attention_heads": 2, "text_dim": 16, "num_layers": 2},
    "rope_dim_list": [4, 6, 6],
}

NEWEST: dict[str, Listed] = {
    # a mask of segments, one of a sliding window
    "Ideogram4Transformer2DModel": Listed(_IDEOGRAM, _one_row, horizon=1.0, dense=2),
    "AceStepTransformer1DModel": Listed(_ACE, _song, horizon=1.0, dense=1),
    # a refiner of image and one of text before the two layers
    "BriaFibo2Transformer2DModel": Listed(_FIBO, _bundles, 4, 4, 1.0),
    # text attends to itself causally; both have MLPs of their own
    "Cosmos3OmniTransformer": Listed(_COSMOS, _packed, mlp=4, names=("vision_tokens", "vision_timesteps")),
    "MiniMaxMusic3Transformer1DModel": Listed(_MUSIC, _music, horizon=1.0),
    # a refiner of text
    "MiniMaxH3Transformer3DModel": Listed(_H3, _three_in_a_row, 3, 3),
    "WanAnimateTransformer3DModel": Listed(_ANIMATE, _posed),
    # two layers of two towers, and one text layer of each
    "Kandinsky6Transformer3DModel": Listed(_KANDINSKY, _with_sound, 6, 6),
    "HeliosTransformer3DModel": Listed(_HELIOS, _remembered),
    # five layers look for a face
    "ConsisIDTransformer3DModel": Listed(_CONSISTENT, _face, 7, 7),
    "JoyImageEditPlusTransformer3DModel": Listed(_JOY, _references, mlp=4),
}
