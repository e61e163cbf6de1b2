"""Tiny configurations of diffusers models: one function a model, returning the module and its inputs.

`draw(*shape)` gives reproducible normal numbers. `large` asks for at least 512 image or video tokens and wide enough
MLPs, so that a sparse step computes fewer than half of the columns; otherwise sizes are the smallest that run.
diffusers is imported when a model is made, not before.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

BUNDLED = Path(__file__).parents[2] / "examples" / "flux-photos"

Draw = Callable[..., Tensor]
Made = tuple[nn.Module, dict[str, Any]]


def transformer(class_name: str, **config: Any) -> nn.Module:
    import diffusers

    return getattr(diffusers, class_name)(**config)


def position_ids(t: int, h: int, w: int) -> Tensor:
    """[t*h*w, 3] float: the (t, h, w) position of each token of a grid, in raster order."""
    axes = torch.meshgrid(torch.arange(t), torch.arange(h), torch.arange(w), indexing="ij")
    return torch.stack(axes, -1).reshape(-1, 3).float()


def times(batch: int) -> Tensor:
    return torch.tensor([44, 239, 933, 760][:batch])


def dit(draw: Draw, large: bool) -> Made:
    side, batch = (48, 2) if large else (8, 4)
    model = transformer(
        "DiTTransformer2DModel",
        in_channels=4,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16 if large else 4,
        num_layers=2,
        patch_size=2,
        sample_size=side,
        activation_fn="gelu-approximate",
        attention_bias=True,
        norm_type="ada_norm_zero",
        num_embeds_ada_norm=8,
    )
    return model, {
        "hidden_states": draw(batch, 4, side, side),
        "timestep": times(batch),
        "class_labels": torch.tensor([0, 3, 1, 0][:batch]),
    }


def pixart(draw: Draw, large: bool) -> Made:
    side, batch = (48, 2) if large else (8, 4)
    model = transformer(
        "PixArtTransformer2DModel",
        sample_size=side,
        num_layers=2,
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=16 if large else 2,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=32 if large else 8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=8,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        use_additional_conditions=False,
        caption_channels=None,
    )
    return model, {
        "hidden_states": draw(batch, 4, side, side),
        "timestep": times(batch),
        "encoder_hidden_states": draw(batch, 8, 32 if large else 8),
        "added_cond_kwargs": {"aspect_ratio": None, "resolution": None},
    }


def sd3(draw: Draw, large: bool) -> Made:
    side, text = (24, 40) if large else (32, 154)
    model = transformer(
        "SD3Transformer2DModel",
        sample_size=32,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        num_attention_heads=4,
        attention_head_dim=8,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        pos_embed_max_size=96,
        dual_attention_layers=(),
        qk_norm=None,
    )
    return model, {
        "hidden_states": draw(2, 4, side, side),
        "encoder_hidden_states": draw(2, text, 32),
        "pooled_projections": draw(2, 64),
        "timestep": times(2),
    }


def flux(draw: Draw, large: bool) -> Made:
    side = 24 if large else 4
    model = transformer(
        "FluxTransformer2DModel",
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    )
    return model, {
        "hidden_states": draw(1, side * side, 4),
        "encoder_hidden_states": draw(1, 48, 32),
        "pooled_projections": draw(1, 32),
        "img_ids": position_ids(1, side, side),
        "txt_ids": torch.zeros(48, 3),
        "timestep": torch.ones(1),
    }


def flux2(draw: Draw, large: bool) -> Made:
    side = 24 if large else 4
    model = transformer(
        "Flux2Transformer2DModel",
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        joint_attention_dim=32,
        timestep_guidance_channels=256,
        axes_dims_rope=[4, 4, 4, 4],
    )
    image, text = torch.zeros(1, side * side, 4).long(), torch.zeros(1, 48, 4).long()  # rows are (t, h, w, text)
    image[0, :, :3] = position_ids(1, side, side).long()
    text[0, :, 3] = torch.arange(48)
    return model, {
        "hidden_states": draw(1, side * side, 4),
        "encoder_hidden_states": draw(1, 48, 32),
        "img_ids": image,
        "txt_ids": text,
        "timestep": torch.ones(1),
        "guidance": torch.ones(1),
    }


def hunyuan_video(draw: Draw, large: bool) -> Made:
    frames = 2 if large else 1
    model = transformer(
        "HunyuanVideoTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
        image_condition_type=None,
    )
    return model, {
        "hidden_states": draw(1, 4, frames, 16, 16),
        "timestep": torch.full((1,), 44.0),
        "encoder_hidden_states": draw(1, 12, 16),
        "pooled_projections": draw(1, 8),
        "encoder_attention_mask": torch.ones(1, 12),
        "guidance": torch.full((1,), 44.0),
    }


def wan(draw: Draw, large: bool, **image: Any) -> Made:
    side = 32 if large else 16
    model = transformer(
        "WanTransformer3DModel",
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=256,
        ffn_dim=128 if large else 32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
        **image,
    )
    return model, {
        "hidden_states": draw(1, 4, 2, side, side),
        "timestep": torch.tensor([44]),
        "encoder_hidden_states": draw(1, 12, 16),
    }


def wan_i2v(draw: Draw, large: bool) -> Made:
    """Wan 2.1 image-to-video: cross attention has keys of its own for image tokens, after exactly 512 text tokens."""
    model, inputs = wan(draw, large, image_dim=20, added_kv_proj_dim=24)
    image = {"encoder_hidden_states": draw(1, 512, 16), "encoder_hidden_states_image": draw(1, 12, 20)}
    return model, inputs | image


def mochi(draw: Draw, large: bool) -> Made:
    side = 32 if large else 16
    model = transformer(
        "MochiTransformer3DModel",
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=4,
        out_channels=None,
        qk_norm="rms_norm",
        text_embed_dim=16,
        time_embed_dim=4,
        activation_fn="swiglu",
        max_sequence_length=16,
    )
    return model, {
        "hidden_states": draw(2, 4, 2, side, side),
        "encoder_hidden_states": draw(2, 16, 16),
        "timestep": times(2),
        "encoder_attention_mask": torch.ones(2, 16, dtype=torch.bool),
    }


def cogvideox(draw: Draw, large: bool) -> Made:
    side, frames = (32, 2) if large else (8, 1)
    model = transformer(
        "CogVideoXTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=16 if large else 8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=8,
        num_layers=2,
        sample_width=side,
        sample_height=side,
        sample_frames=8,
        patch_size=2,
        patch_size_t=None,
        temporal_compression_ratio=4,
        max_text_seq_length=8,
    )
    return model, {
        "hidden_states": draw(2, frames, 4, side, side),
        "encoder_hidden_states": draw(2, 8, 8),
        "timestep": times(2),
    }


def ltx(draw: Draw, large: bool) -> Made:
    """512 tokens at either size."""
    model = transformer(
        "LTXVideoTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16 if large else 8,
        cross_attention_dim=32 if large else 16,
        num_layers=2,
        qk_norm="rms_norm_across_heads",
        caption_channels=16,
    )
    return model, {
        "hidden_states": draw(2, 512, 4),
        "encoder_hidden_states": draw(2, 16, 16),
        "timestep": times(2),
        "encoder_attention_mask": torch.ones(2, 16, dtype=torch.bool),
        "num_frames": 2,
        "height": 16,
        "width": 16,
    }


def auraflow(draw: Draw, large: bool) -> Made:
    side, text = (48, 32) if large else (32, 256)
    model = transformer(
        "AuraFlowTransformer2DModel",
        sample_size=side,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        num_attention_heads=4,
        attention_head_dim=8,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pos_embed_max_size=1024 if large else 256,
    )
    return model, {
        "hidden_states": draw(2, 4, side, side),
        "encoder_hidden_states": draw(2, text, 32),
        "timestep": times(2) / 1000,
    }


def qwen_image(draw: Draw, large: bool) -> Made:
    side = 24 if large else 4
    model = transformer(
        "QwenImageTransformer2DModel",
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        num_attention_heads=4,
        attention_head_dim=16,
        joint_attention_dim=16,
        guidance_embeds=False,
        axes_dims_rope=(8, 4, 4),
    )
    return model, {
        "hidden_states": draw(1, side * side, 16),
        "encoder_hidden_states": draw(1, 8, 16),
        "encoder_hidden_states_mask": torch.ones(1, 8, dtype=torch.int64),
        "timestep": torch.ones(1),
        "img_shapes": [(1, side, side)],
    }


def kandinsky5(draw: Draw, large: bool) -> Made:
    side = 32 if large else 8
    model = transformer(
        "Kandinsky5Transformer3DModel",
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=16,
        in_text_dim2=12,
        time_dim=16,
        model_dim=32,
        ff_dim=128 if large else 64,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
    )
    return model, {
        "hidden_states": draw(1, 2, side, side, 4),
        "encoder_hidden_states": draw(1, 6, 16),
        "timestep": torch.full((1,), 44.0),
        "pooled_projections": draw(1, 12),
        "visual_rope_pos": [torch.arange(2), torch.arange(side // 2), torch.arange(side // 2)],
        "text_rope_pos": torch.arange(6),
    }


def hunyuan_dit(draw: Draw, large: bool) -> Made:
    side = 48 if large else 8
    tokens, width = (side // 2) ** 2, 16 if large else 8  # of a head
    model = transformer(
        "HunyuanDiT2DModel",
        sample_size=side,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=width,
        cross_attention_dim=8,
        cross_attention_dim_t5=8,
        pooled_projection_dim=4,
        hidden_size=2 * width,
        text_len=4,
        text_len_t5=4,
        activation_fn="gelu-approximate",
    )
    return model, {
        "hidden_states": draw(2, 4, side, side),
        "encoder_hidden_states": draw(2, 4, 8),
        "text_embedding_mask": torch.ones(2, 4),
        "encoder_hidden_states_t5": draw(2, 4, 8),
        "text_embedding_mask_t5": torch.ones(2, 4),
        "timestep": times(2).float(),
        "image_meta_size": torch.tensor([[1024.0, 1024.0, 16.0, 16.0, 0.0, 0.0]] * 2),
        "style": torch.zeros(2, dtype=torch.int64),
        "image_rotary_emb": [torch.ones(tokens, width), torch.zeros(tokens, width)],
    }


def latte(draw: Draw, large: bool) -> Made:
    """Spatial attention (frames in the batch) and temporal attention (pixels in the batch) alternate; one frame."""
    side = 48 if large else 8
    model = transformer(
        "LatteTransformer3DModel",
        sample_size=side,
        num_layers=2,
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=16 if large else 4,
        caption_channels=8,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=32 if large else 8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
    )
    return model, {
        "hidden_states": draw(2, 4, 1, side, side),
        "encoder_hidden_states": draw(2, 8, 8),
        "timestep": times(2),
        "enable_temporal_attentions": True,
    }


def lumina2(draw: Draw, large: bool) -> Made:
    side = 48 if large else 16
    model = transformer(
        "Lumina2Transformer2DModel",
        sample_size=16,
        patch_size=2,
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=2,
        ffn_dim_multiplier=None,
        norm_eps=1e-5,
        scaling_factor=1.0,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(128, 128, 128),
        cap_feat_dim=32,
    )
    return model, {
        "hidden_states": draw(2, 4, side, side),
        "encoder_hidden_states": draw(2, 16, 32),
        "timestep": torch.tensor([0.4963, 0.7682]),
        "encoder_attention_mask": torch.ones(2, 16, dtype=torch.bool),
    }


def sana(draw: Draw, large: bool) -> Made:
    del large  # linear attention and convolutional MLPs: no site at any size
    model = transformer(
        "SanaTransformer2DModel",
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=32,
    )
    return model, {
        "hidden_states": draw(2, 4, 32, 32),
        "encoder_hidden_states": draw(2, 8, 8),
        "timestep": times(2),
    }


def bundled(draw: Draw, large: bool) -> Made:
    """The trained model of examples/, drawing a cat (class 1 of 16) at 128 or 64 pixels."""
    import diffusers

    side = 32 if large else 16  # tokens of 4x4 pixels
    label = torch.eye(16)[1:2]
    return diffusers.FluxTransformer2DModel.from_pretrained(BUNDLED, torch_dtype=torch.float32), {
        "hidden_states": draw(1, side * side, 48),
        "encoder_hidden_states": torch.cat([label.expand(16, -1), torch.eye(16)], dim=1)[None],
        "pooled_projections": label,
        "img_ids": position_ids(1, side, side) * (64 / side),
        "txt_ids": torch.zeros(16, 3),
        "timestep": torch.ones(1),
    }
