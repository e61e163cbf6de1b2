"""Further transformer classes of diffusers, mostly of 2025 and 2026, tiny: at least 256 tokens, and what is in them."""

from collections.abc import Callable

import torch
from torch import Tensor

from tests.harness.diffusers_models import position_ids
from tests.harness.more_diffusers import HEADS, VIDEO_HEADS, Inputs, Listed, packed, video

Draw = Callable[..., Tensor]


def _packed_in_time(draw: Draw) -> Inputs:
    places = torch.cat([position_ids(1, 16, 16), torch.zeros(256, 1)], 1)
    return packed(draw) | {"img_ids": places, "txt_ids": torch.zeros(24, 4)}


def _layers_of_text(draw: Draw) -> Inputs:
    return packed(draw) | {"text_encoder_layers": [draw(1, 24, 16) for _ in range(4)]}


def _prior(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw(1, 4, 32, 32),
        "encoder_hidden_states": draw(1, 12, 16),
        "prior_token_id": (torch.arange(256) % 32)[None],
        "prior_token_drop": torch.zeros(1, 256, dtype=torch.bool),
        "timestep": torch.tensor([500]),
        "target_size": torch.full((1, 2), 32.0),
        "crop_coords": torch.zeros(1, 2),
    }


def _padded_frames(draw: Draw) -> Inputs:
    present = torch.ones(1, 2, 24, 24)
    present[:, :, 20:] = 0
    angles = (torch.ones(32, 4), torch.zeros(32, 4))
    return video(draw) | {
        "attention_mask": present,
        "encoder_attention_mask": torch.ones(1, 10),
        "image_rotary_emb": ([angles] * 3, list(position_ids(2, 12, 12).long().T[:, None])),
    }


def _two_texts(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw(1, 4, 2, 12, 12),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": draw(1, 12, 16),
        "encoder_attention_mask": (torch.arange(12)[None] < 9).float(),
        "encoder_hidden_states_2": draw(1, 8, 8),
        "encoder_attention_mask_2": (torch.arange(8)[None] < 6).float(),
        "image_embeds": torch.zeros(1, 4, 12),
    }


def _lists(draw: Draw) -> Inputs:
    return {"x": [draw(4, 1, 32, 32)], "t": torch.tensor([0.5]), "cap_feats": [draw(20, 16)]}


def _turned(draw: Draw) -> Inputs:
    turns = torch.polar(torch.ones(384, 384, 8), draw(384, 384, 8))
    return {
        "hidden_states": draw(1, 4, 32, 32),
        "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": draw(1, 10, 16),
        "encoder_mask": torch.ones(1, 10),
        "image_rotary_emb": turns,
        "cross_attention_kwargs": {},
    }


def _text_in_layers(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw(1, 256, 8),
        "encoder_hidden_states": draw(1, 16, 3, 16),
        "timestep": torch.tensor([0.5]),
        "position_ids": torch.cat([torch.zeros(16, 3), position_ids(1, 16, 16)]),
        "encoder_attention_mask": torch.arange(16)[None] < 13,
    }


def _counted_text(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw(1, 4, 16, 16),
        "timestep": torch.tensor([500.0]),
        "text_bth": draw(1, 10, 16),
        "text_lens": torch.tensor([8]),
    }


def _llama(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw(2, 4, 32, 32),
        "encoder_hidden_states_t5": draw(2, 8, 8),
        "encoder_hidden_states_llama3": draw(2, 2, 8, 4),
        "pooled_embeds": draw(2, 8),
        "timesteps": torch.tensor([500, 500]),
    }


def _music(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw(1, 4, 256),
        "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": draw(1, 10, 16),
        "global_hidden_states": draw(1, 16),
        "local_add_cond": draw(1, 5, 256),
    }


def _speech(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw(1, 256, 8),
        "encoder_hidden_states": draw(1, 10, 16),
        "encoder_attention_mask": torch.ones(1, 10, dtype=torch.bool),
        "timestep": torch.tensor([0.5]),
        "attention_mask": torch.ones(1, 256, dtype=torch.bool),
        "latent_cond": draw(1, 256, 8),
    }


_SMALL = {**HEADS, "in_channels": 4, "num_layers": 2}
_BOTH_WAYS = _SMALL | {"out_channels": 4}
_TWO_STREAMS = _SMALL | {"num_single_layers": 2}
_WAN = {
    **VIDEO_HEADS,
    **{"in_channels": 4, "out_channels": 4, "text_dim": 16, "freq_dim": 32, "ffn_dim": 64, "rope_max_seq_len": 32},
    "num_layers": 2,
}
_KREA = {
    **{"in_channels": 8, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"intermediate_size": 32, "timestep_embed_dim": 8, "text_hidden_dim": 16, "num_text_layers": 3},
    **{"text_num_attention_heads": 2, "text_num_key_value_heads": 1, "text_intermediate_size": 16},
    **{"num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1, "axes_dims_rope": (4, 2, 2)},
}
_HIDREAM = {
    **{"patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 1},
    **{"attention_head_dim": 8, "num_attention_heads": 4, "caption_channels": [8, 4], "text_emb_dim": 8},
    **{"num_routed_experts": 2, "axes_dims_rope": (4, 2, 2), "max_resolution": (32, 32), "llama_layers": [0, 1]},
    "force_inference_output": True,
}
_GLM = _BOTH_WAYS | {
    **{"attention_head_dim": 8, "text_embed_dim": 16, "time_embed_dim": 16, "condition_dim": 8},
    "prior_vq_quantizer_codebook_size": 32,
}
_ALLEGRO = {
    **{**VIDEO_HEADS, "num_layers": 2, "cross_attention_dim": 24, "caption_channels": 16},
    **{"sample_height": 24, "sample_width": 24, "sample_frames": 2},
}
_HUNYUAN_15 = _BOTH_WAYS | {
    **{"num_refiner_layers": 1, "mlp_ratio": 2.0, "text_embed_dim": 16, "text_embed_2_dim": 8, "image_embed_dim": 12},
    **{"rope_axes_dim": (4, 6, 6), "target_size": 16, "task_type": "t2v"},
}
_LUMINA = {
    **{"sample_size": 32, "hidden_size": 32, "num_layers": 2, "num_attention_heads": 2, "num_kv_heads": 1},
    **{"multiple_of": 16, "cross_attention_dim": 16},
}
_Z = {
    **{"in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2},
    **{"cap_feat_dim": 16, "axes_dims": [8, 4, 4], "axes_lens": [256, 32, 32]},
}
_ERNIE = {
    **{"hidden_size": 32, "num_attention_heads": 2, "num_layers": 2, "ffn_hidden_size": 64, "in_channels": 4},
    **{"out_channels": 4, "text_in_dim": 16, "rope_axes_dim": (8, 4, 4)},
}
_STABLE_AUDIO = {
    **{"io_channels": 4, "embed_dim": 64, "depth": 2, "num_heads": 2, "cond_token_dim": 16, "global_cond_dim": 16},
    **{"local_add_cond_dim": 5, "timestep_features_dim": 32, "num_memory_tokens": 8},
}
_JOY = {
    **{"in_channels": 4, "hidden_size": 32, "num_attention_heads": 2, "text_dim": 16, "num_layers": 2},
    "rope_dim_list": [4, 6, 6],
}
_EASY = _BOTH_WAYS | {
    **{"patch_size": 2, "sample_width": 16, "sample_height": 16, "mmdit_layers": 2, "time_embed_dim": 8},
    "text_embed_dim": 16,
}
_COSMOS = _BOTH_WAYS | {"mlp_ratio": 2, "text_embed_dim": 16, "adaln_lora_dim": 4, "max_size": (4, 32, 32)}
_FLUX_3 = _TWO_STREAMS | {
    **{"cond_in_channels": 4, "joint_attention_dim": 32, "timestep_channels": 32, "mlp_ratio": 2.0},
    "axes_dims_rope": (4, 4, 4, 4),
}

NEWER: dict[str, Listed] = {
    "EasyAnimateTransformer3DModel": Listed(_EASY, video, mlp=4),
    "CosmosTransformer3DModel": Listed(
        _COSMOS | {"concat_padding_mask": False, "extra_pos_embed_type": "learnable"},
        lambda draw: video(draw) | {"timestep": torch.tensor([0.5]), "fps": 30},
        horizon=1.0,
    ),
    "LongCatImageTransformer2DModel": Listed(
        _TWO_STREAMS | {"joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": [4, 4, 8]},
        *(packed, 4, 6, 1.0),
    ),
    "BriaFiboTransformer2DModel": Listed(
        _TWO_STREAMS | {"joint_attention_dim": 32, "axes_dims_rope": [0, 8, 8], "text_encoder_dim": 16},
        *(_layers_of_text, 4, 6),
    ),
    # text blocks, image blocks and joint blocks
    "Flux3Transformer2DModel": Listed(_FLUX_3, _packed_in_time, 6, 6, 1.0),
    "WanVACETransformer3DModel": Listed(
        _WAN | {"vace_layers": [0], "vace_in_channels": 6},
        lambda draw: video(draw) | {"control_hidden_states": draw(1, 6, 2, 24, 24)},
        *(3, 3),
    ),
    "AnyFlowTransformer3DModel": Listed(
        _WAN,
        lambda draw: (
            video(draw)
            | {"hidden_states": draw(1, 2, 4, 24, 24)}
            | {"timestep": torch.full((1, 2), 500), "r_timestep": torch.full((1, 2), 400)}
        ),
    ),
    "GlmImageTransformer2DModel": Listed(_GLM, _prior, mlp=4),
    "AllegroTransformer3DModel": Listed(_ALLEGRO, _padded_frames),
    # the attention of the text refiner has a mask that differs from row to row
    "HunyuanVideo15Transformer3DModel": Listed(_HUNYUAN_15, _two_texts, 3, 5, dense=1),
    # refiners of image and of text before the two layers
    "ZImageTransformer2DModel": Listed(_Z, _lists, 4, 4, 1.0, names=("x", "t")),
    "LuminaNextDiT2DModel": Listed(_LUMINA, _turned, horizon=1.0),
    # two text blocks
    "Krea2Transformer2DModel": Listed(_KREA, _text_in_layers, 4, 4, 1.0),
    "ErnieImageTransformer2DModel": Listed(_ERNIE, _counted_text),
    # of the experts those that every token goes to
    "HiDreamImageTransformer2DModel": Listed(_HIDREAM, _llama, 2, 2, names=("hidden_states", "timesteps")),
    "JoyImageEditTransformer3DModel": Listed(
        _JOY, lambda draw: video(draw) | {"hidden_states": draw(1, 1, 4, 2, 24, 24)}, mlp=4
    ),
    "MotifVideoTransformer3DModel": Listed(
        _TWO_STREAMS | {"out_channels": 4, "patch_size": 2, "text_embed_dim": 16, "rope_axes_dim": (4, 6, 6)},
        lambda draw: video(draw) | {"encoder_attention_mask": torch.arange(10)[None] < 8},
        *(4, 6),
    ),
    # differential attention: two a layer; two MLPs embed what is added to the latents
    "StableAudio3DiTModel": Listed(_STABLE_AUDIO, _music, 4, 4, 1.0),
    # two MLPs embed the latents
    "LongCatAudioDiTTransformer": Listed(
        {"dit_dim": 32, "dit_depth": 2, "dit_heads": 2, "dit_text_dim": 16, "latent_dim": 8, "ff_mult": 2.0},
        *(_speech, 2, 4, 1.0),
    ),
}
