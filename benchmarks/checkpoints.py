"""Random Latte checkpoints of any size, in the folder layout of diffusers' LattePipeline.

Good for measuring time and memory and for comparing outputs with diffusers; never for judging what reuse costs in
quality, because random blocks hardly change the stream.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, LatteTransformer3DModel
from transformers import T5Config, T5EncoderModel, T5Tokenizer

WORDS = ["a", "red", "blue", "circle", "square", "moving", "right", "left", "dog", "in", "the", "snow"]


def random_latte(
    folder: Path,
    *,
    heads: int = 2,
    head_dim: int = 8,
    pairs: int = 2,
    frames: int = 3,
    sample_size: int = 8,
    text: dict[str, Any] | None = None,
    vae_channels: tuple[int, ...] = (8, 16),
    scheduler: dict[str, Any] | None = None,
    seed: int = 0,
) -> Path:
    """Write a random checkpoint and return its folder. `text` overrides the T5 configuration."""
    torch.manual_seed(seed)
    dim = heads * head_dim
    t5 = T5Config(
        **{
            "vocab_size": 128,
            "d_model": 32,
            "d_kv": 8,
            "num_heads": 4,
            "d_ff": 64,
            "num_layers": 2,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
        }
        | (text or {})
    )
    transformer = LatteTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        in_channels=4,
        out_channels=8,
        num_layers=pairs,
        cross_attention_dim=dim,
        attention_bias=True,
        sample_size=sample_size,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=t5.d_model,
        video_length=frames,
    )
    transformer.save_pretrained(folder / "transformer")
    del transformer
    encoder = T5EncoderModel(t5)
    encoder.save_pretrained(folder / "text_encoder")
    del encoder
    vae = AutoencoderKL(
        block_out_channels=vae_channels,
        down_block_types=["DownEncoderBlock2D"] * len(vae_channels),
        up_block_types=["UpDecoderBlock2D"] * len(vae_channels),
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
    )
    vae.save_pretrained(folder / "vae")
    config = {"clip_sample": False, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
    DDIMScheduler(**(config | (scheduler or {}))).save_pretrained(folder / "scheduler")
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -10.0)]
    pieces += [(f"▁{word}", -1.0) for word in WORDS] + [(letter, -8.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    T5Tokenizer(vocab=pieces, extra_ids=0).save_pretrained(folder / "tokenizer")
    index = {
        "_class_name": "LattePipeline",
        "tokenizer": ["transformers", "T5Tokenizer"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "transformer": ["diffusers", "LatteTransformer3DModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder
