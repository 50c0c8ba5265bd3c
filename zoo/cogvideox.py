"""CogVideoX, by diffusers: the 2b with sinusoidal positions and the 5b with rotary ones."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from zoo.base import Config, Example, Family, Original, Published, Step
from zoo.components import (
    FUSED_HEAD_DIM,
    T5_XXL,
    TINY_T5,
    diffusers_arguments,
    diffusers_module,
    diffusers_transformer,
    pipeline_index,
    with_blocks,
    write_index,
    write_text,
)

if TYPE_CHECKING:
    from foresight.engines.manifest import Manifest

INDEX = pipeline_index("CogVideoXPipeline", "CogVideoXTransformer3DModel", "AutoencoderKLCogVideoX")
COGVIDEOX_2B: Config = {
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
VAE: Config = {
    "block_out_channels": [128, 256, 256, 512],
    "down_block_types": ["CogVideoXDownBlock3D"] * 4,
    "up_block_types": ["CogVideoXUpBlock3D"] * 4,
    "latent_channels": 16,
    "layers_per_block": 3,
    "norm_num_groups": 32,
    "temporal_compression_ratio": 4,
    "scaling_factor": 1.15258426,
}
SCHEDULE: Config = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "rescale_betas_zero_snr": True,
    "snr_shift_scale": 3.0,
    "clip_sample": False,
    "set_alpha_to_one": True,
}
BLOCKS = ("CogVideoXDownBlock3D", "CogVideoXUpBlock3D")


def write_random(
    folder: Path,
    *,
    rotary: bool = False,
    heads: int = 2,
    head_dim: int = 16,
    layers: int = 2,
    time_embed_dim: int = 16,
    text_tokens: int = 12,
    latents: tuple[int, int, int] = (3, 4, 6),
    frames: int = 9,
    transformer: Config | None = None,
    text: Config | None = None,
    vae: Config | None = None,
    scheduler: str = "CogVideoXDDIMScheduler",
    scheduler_settings: Config | None = None,
    seed: int = 0,
) -> Path:
    """Write a random CogVideoXPipeline and return its folder.

    `latents` are frames, height and width of `frames` frames, `scheduler` is a class of diffusers. Without `rotary` it
    is like the 2b, with it like the 5b.
    """
    import diffusers
    import torch

    torch.manual_seed(seed)
    t5 = TINY_T5 | (text or {})
    config: Config = {
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "in_channels": 16,
        "out_channels": 16,
        "time_embed_dim": time_embed_dim,
        "text_embed_dim": t5["d_model"],
        "num_layers": layers,
        "sample_width": latents[2],
        "sample_height": latents[1],
        "sample_frames": frames,
        "max_text_seq_length": text_tokens,
        "spatial_interpolation_scale": 1.875,
        "use_rotary_positional_embeddings": rotary,
    }
    model = diffusers.CogVideoXTransformer3DModel(**config | (transformer or {}))
    model.save_pretrained(folder / "transformer")
    write_text(folder, t5)
    sizes: Config = {
        "block_out_channels": (8, 8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "scaling_factor": 1.15258426,
    }
    decoder = diffusers.AutoencoderKLCogVideoX(**with_blocks(sizes | (vae or {}), *BLOCKS))
    decoder.save_pretrained(folder / "vae")
    schedule = getattr(diffusers, scheduler)(**SCHEDULE | (scheduler_settings or {}))
    schedule.save_pretrained(folder / "scheduler")
    write_index(folder, INDEX, scheduler)
    return folder


def load_original(checkpoint: Path, manifest: Manifest, step: Step) -> Original:
    """The transformer, with weights."""
    from foresight.exporter.models.cogvideox.modules import rotary_tables

    module = diffusers_transformer(INDEX, checkpoint, manifest)
    rotary = None
    if module.config.use_rotary_positional_embeddings:
        tables = rotary_tables(module, manifest.shape.latents)
        rotary = tuple(table.to(step.latents.device) for table in tables)
    return Original(step, module, diffusers_arguments(step) | {"image_rotary_emb": rotary})


FAMILY = Family(
    title="CogVideoX",
    published={
        "cogvideox-2b": Published(
            files={
                "model_index.json": INDEX,
                "transformer/config.json": COGVIDEOX_2B,
                "vae/config.json": VAE,
                "text_encoder/config.json": T5_XXL,
            },
            dtype="fp16",
            sizes={"CogVideoX-2b": {}},
            small={"head_dim": FUSED_HEAD_DIM},
        ),
        "cogvideox-5b": Published(
            files={
                "model_index.json": INDEX,
                "transformer/config.json": COGVIDEOX_5B,
                "vae/config.json": VAE | {"scaling_factor": 0.7},
                "text_encoder/config.json": T5_XXL,
            },
            dtype="bf16",
            sizes={"CogVideoX-5b": {}},
            small={"head_dim": FUSED_HEAD_DIM, "rotary": True},
        ),
    },
    # two streams, rotary positions, a sampler that adds noise, and 17 frames that are decoded in two chunks
    example=Example("cogvideox-5b", {"rotary": True, "layers": 3, "frames": 17, "scheduler": "CogVideoXDPMScheduler"}),
    write_random=write_random,
    original=partial(diffusers_module, INDEX),
    load_original=load_original,
)
