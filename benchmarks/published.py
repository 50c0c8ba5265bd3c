"""The configurations that the real models are published with, and no weights.

That is all `export --dry-run` reads, and enough to trace, build and count a block at its real width and sizes. The
figures are those of the `config.json` files on the Hugging Face hub.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

T5_XXL = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_heads": 64,
    "num_layers": 24,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
LATTE_1 = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "cross_attention_dim": 1152,
    "attention_bias": True,
    "sample_size": 64,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "caption_channels": 4096,
    "video_length": 16,
}
STABLE_DIFFUSION_VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
}
COGVIDEOX_2B = {
    "num_attention_heads": 30,
    "attention_head_dim": 64,
    "in_channels": 16,
    "out_channels": 16,
    "time_embed_dim": 512,
    "text_embed_dim": 4096,
    "num_layers": 30,
    "attention_bias": True,
    "sample_width": 90,
    "sample_height": 60,
    "sample_frames": 49,
    "patch_size": 2,
    "temporal_compression_ratio": 4,
    "max_text_seq_length": 226,
    "activation_fn": "gelu-approximate",
    "norm_elementwise_affine": True,
    "norm_eps": 1e-5,
    "spatial_interpolation_scale": 1.875,
    "temporal_interpolation_scale": 1.0,
    "use_rotary_positional_embeddings": False,
}
COGVIDEOX_5B = COGVIDEOX_2B | {
    "num_attention_heads": 48,
    "num_layers": 42,
    "use_rotary_positional_embeddings": True,
}
COGVIDEOX_VAE = {
    "block_out_channels": [128, 256, 256, 512],
    "down_block_types": ["CogVideoXDownBlock3D"] * 4,
    "up_block_types": ["CogVideoXUpBlock3D"] * 4,
    "latent_channels": 16,
    "layers_per_block": 3,
    "norm_num_groups": 32,
    "temporal_compression_ratio": 4,
    "scaling_factor": 1.15258426,
}
STDIT3 = {
    "model_type": "STDiT3",
    "input_size": [None, None, None],
    "input_sq_size": 512,
    "in_channels": 4,
    "patch_size": [1, 2, 2],
    "hidden_size": 1152,
    "depth": 28,
    "num_heads": 16,
    "mlp_ratio": 4.0,
    "class_dropout_prob": 0.1,
    "pred_sigma": True,
    "drop_path": 0.0,
    "caption_channels": 4096,
    "model_max_length": 300,
    "qk_norm": True,
    "enable_flash_attn": True,
    "enable_layernorm_kernel": True,
    "enable_sequence_parallelism": False,
    "only_train_temporal": False,
    "freeze_y_embedder": True,
    "skip_y_embedder": False,
}

OPEN_SORA_VAE = {
    "model_type": "VideoAutoencoderPipeline",
    "architectures": ["VideoAutoencoderPipeline"],
    "cal_loss": False,
    "freeze_vae_2d": False,
    "from_pretrained": None,
    "micro_frame_size": 17,
    "scale": [3.85, 2.32, 2.33, 3.06],
    "shift": [-0.1, 0.34, 0.27, 0.98],
    "vae_2d": {
        "type": "VideoAutoencoderKL",
        "from_pretrained": "PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers",
        "subfolder": "vae",
        "micro_batch_size": 4,
    },
    "vae_temporal": {"type": "VAE_Temporal_SD", "from_pretrained": None},
}


def _pipeline(name: str, transformer: str, vae: str) -> dict[str, Any]:
    return {
        "_class_name": name,
        "text_encoder": ["transformers", "T5EncoderModel"],
        "transformer": ["diffusers", transformer],
        "vae": ["diffusers", vae],
    }


_COGVIDEOX = _pipeline("CogVideoXPipeline", "CogVideoXTransformer3DModel", "AutoencoderKLCogVideoX")
# model name -> file inside the checkpoint -> content
PUBLISHED: dict[str, dict[str, Any]] = {
    "latte": {
        "model_index.json": _pipeline("LattePipeline", "LatteTransformer3DModel", "AutoencoderKL"),
        "transformer/config.json": LATTE_1,
        "vae/config.json": STABLE_DIFFUSION_VAE,
        "text_encoder/config.json": T5_XXL,
    },
    "cogvideox-2b": {
        "model_index.json": _COGVIDEOX,
        "transformer/config.json": COGVIDEOX_2B,
        "vae/config.json": COGVIDEOX_VAE,
        "text_encoder/config.json": T5_XXL,
    },
    "cogvideox-5b": {
        "model_index.json": _COGVIDEOX,
        "transformer/config.json": COGVIDEOX_5B,
        "vae/config.json": COGVIDEOX_VAE | {"scaling_factor": 0.7},
        "text_encoder/config.json": T5_XXL,
    },
    "open-sora": {
        "transformer/config.json": STDIT3,
        "vae/config.json": OPEN_SORA_VAE,
        "text_encoder/config.json": T5_XXL,
    },
}


def write_published(model: str, folder: Path) -> Path:
    """Write a model's configurations as a checkpoint without weights; returns its folder."""
    for name, content in PUBLISHED[model].items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1))
    return folder
