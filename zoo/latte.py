"""Latte, by diffusers."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from zoo.base import Config, Example, Family, Published
from zoo.components import (
    FUSED_HEAD_DIM,
    IMAGE_BLOCKS,
    T5_XXL,
    TINY_T5,
    diffusers_module,
    diffusers_original,
    pipeline_index,
    with_blocks,
    write_index,
    write_text,
)

INDEX = pipeline_index("LattePipeline", "LatteTransformer3DModel", "AutoencoderKL")
LATTE_1: Config = {
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
STABLE_DIFFUSION_VAE: Config = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
}


def write_random(
    folder: Path,
    *,
    heads: int = 2,
    head_dim: int = 8,
    pairs: int = 2,
    frames: int = 3,
    sample_size: int = 8,
    gates: float = 1.0,
    transformer: Config | None = None,
    text: Config | None = None,
    vae: Config | None = None,
    scheduler: Config | None = None,
    seed: int = 0,
) -> Path:
    """Write a random LattePipeline and return its folder.

    Its blocks hardly change the stream, unless `gates` multiplies those of their attention and feed-forward.
    """
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, LatteTransformer3DModel

    torch.manual_seed(seed)
    t5 = TINY_T5 | (text or {})
    config: Config = LATTE_1 | {
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "num_layers": pairs,
        "cross_attention_dim": heads * head_dim,
        "sample_size": sample_size,
        "caption_channels": t5["d_model"],
        "video_length": frames,
    }
    model = LatteTransformer3DModel(**config | (transformer or {}))
    for name, parameter in model.named_parameters():
        if "blocks." in name and name.endswith("scale_shift_table"):
            parameter.data[2::3] *= gates
    model.save_pretrained(folder / "transformer")
    write_text(folder, t5)
    sizes: Config = {"block_out_channels": (8, 16), "latent_channels": 4, "norm_num_groups": 4, "layers_per_block": 1}
    AutoencoderKL(**with_blocks(sizes | (vae or {}), *IMAGE_BLOCKS)).save_pretrained(folder / "vae")
    schedule: Config = {"clip_sample": False, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
    DDIMScheduler(**schedule | (scheduler or {})).save_pretrained(folder / "scheduler")
    write_index(folder, INDEX, "DDIMScheduler")
    return folder


FAMILY = Family(
    title="Latte",
    published={
        "latte": Published(
            files={
                "model_index.json": INDEX,
                "transformer/config.json": LATTE_1,
                "vae/config.json": STABLE_DIFFUSION_VAE,
                "text_encoder/config.json": T5_XXL,
            },
            dtype="fp16",
            sizes={"Latte-1": {}},
            small={"head_dim": FUSED_HEAD_DIM},
        )
    },
    # the model predicts the sample, so nothing explodes; three frames of 16 x 16
    example=Example("latte", {"heads": 5, "gates": 8, "scheduler": {"prediction_type": "sample"}}),
    write_random=write_random,
    original=partial(diffusers_module, INDEX),
    load_original=partial(diffusers_original, INDEX),
)
