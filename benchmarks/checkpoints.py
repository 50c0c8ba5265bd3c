"""Random checkpoints of every family and of any size, in the layout that the real ones are published in.

`transformer`, `text` (T5) and `vae` override what their config.json would have; so do those of benchmarks/published.py.
Good for measuring time and memory and for comparing outputs with diffusers; never for judging what reuse costs in
quality, because random blocks hardly change the stream.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    LatteTransformer3DModel,
    SchedulerMixin,
)
from safetensors.torch import save_file
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from foresight.exporter.models.open_sora.config import STDiT3Config, VideoVAEConfig
from foresight.exporter.models.open_sora.stdit3 import STDiT3
from foresight.exporter.models.open_sora.vae import VideoVAE

Config = dict[str, Any]

COGVIDEOX_SCHEDULE: Config = {
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
IMAGE_BLOCKS = ("DownEncoderBlock2D", "UpDecoderBlock2D")
VIDEO_BLOCKS = ("CogVideoXDownBlock3D", "CogVideoXUpBlock3D")
WORDS = ["a", "red", "blue", "circle", "square", "moving", "right", "left", "dog", "in", "the", "snow"]


def random_latte(
    folder: Path,
    *,
    heads: int = 2,
    head_dim: int = 8,
    pairs: int = 2,
    frames: int = 3,
    sample_size: int = 8,
    transformer: Config | None = None,
    text: Config | None = None,
    vae: Config | None = None,
    scheduler: Config | None = None,
    seed: int = 0,
) -> Path:
    """Write a random LattePipeline and return its folder."""
    torch.manual_seed(seed)
    t5 = _t5_config(text)
    config: Config = {
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": pairs,
        "cross_attention_dim": heads * head_dim,
        "attention_bias": True,
        "sample_size": sample_size,
        "patch_size": 2,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "caption_channels": t5.d_model,
        "video_length": frames,
    }
    LatteTransformer3DModel(**config | (transformer or {})).save_pretrained(folder / "transformer")
    _write_text(folder, t5)
    sizes: Config = {"block_out_channels": (8, 16), "latent_channels": 4, "norm_num_groups": 4, "layers_per_block": 1}
    AutoencoderKL(**_with_blocks(sizes | (vae or {}), *IMAGE_BLOCKS)).save_pretrained(folder / "vae")
    schedule: Config = {"clip_sample": False, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
    DDIMScheduler(**schedule | (scheduler or {})).save_pretrained(folder / "scheduler")
    _write_index(folder, "LattePipeline", "LatteTransformer3DModel", "AutoencoderKL", "DDIMScheduler")
    return folder


def random_cogvideox(
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
    scheduler: type[SchedulerMixin] = CogVideoXDDIMScheduler,
    scheduler_settings: Config | None = None,
    seed: int = 0,
) -> Path:
    """Write a random CogVideoXPipeline and return its folder.

    `latents` are frames, height and width of `frames` frames. Without `rotary` it is like the 2b, with it like the 5b.
    """
    torch.manual_seed(seed)
    t5 = _t5_config(text)
    config: Config = {
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "in_channels": 16,
        "out_channels": 16,
        "time_embed_dim": time_embed_dim,
        "text_embed_dim": t5.d_model,
        "num_layers": layers,
        "sample_width": latents[2],
        "sample_height": latents[1],
        "sample_frames": frames,
        "max_text_seq_length": text_tokens,
        "spatial_interpolation_scale": 1.875,
        "use_rotary_positional_embeddings": rotary,
    }
    CogVideoXTransformer3DModel(**config | (transformer or {})).save_pretrained(folder / "transformer")
    _write_text(folder, t5)
    sizes: Config = {
        "block_out_channels": (8, 8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "scaling_factor": 1.15258426,
    }
    AutoencoderKLCogVideoX(**_with_blocks(sizes | (vae or {}), *VIDEO_BLOCKS)).save_pretrained(folder / "vae")
    scheduler(**COGVIDEOX_SCHEDULE | (scheduler_settings or {})).save_pretrained(folder / "scheduler")
    _write_index(
        folder, "CogVideoXPipeline", "CogVideoXTransformer3DModel", "AutoencoderKLCogVideoX", scheduler.__name__
    )
    return folder


def random_open_sora(
    folder: Path,
    *,
    heads: int = 2,
    head_dim: int = 8,
    pairs: int = 2,
    patch: int = 2,
    input_size: tuple[int, int, int] | None = (5, 4, 6),
    text_tokens: int = 16,
    transformer: Config | None = None,
    text: Config | None = None,
    vae: Config | None = None,
    seed: int = 0,
) -> Path:
    """Write a random Open-Sora checkpoint and return its folder; `input_size` are frames, height, width of latents."""
    torch.manual_seed(seed)
    t5 = _t5_config(text)
    config: Config = {
        "model_type": "STDiT3",
        "hidden_size": heads * head_dim,
        "num_heads": heads,
        "depth": pairs,
        "patch_size": [1, patch, patch],
        "caption_channels": t5.d_model,
        "model_max_length": text_tokens,
        "input_sq_size": 32,
        "input_size": list(input_size) if input_size else [None] * 3,
    } | (transformer or {})
    sizes: Config = {"block_out_channels": [8, 8], "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 4}
    vae = vae or {
        "model_type": "VideoAutoencoderPipeline",
        "vae_2d": {"type": "VideoAutoencoderKL", "config": _with_blocks(sizes, *IMAGE_BLOCKS)},
        "vae_temporal": {
            "type": "VAE_Temporal",
            "filters": 8,
            "num_res_blocks": 1,
            "channel_multipliers": [1, 2, 2, 4],
            "temporal_downsample": [False, True, True],
            "num_groups": 4,
        },
    }
    model = STDiT3(STDiT3Config.from_json(config))
    for name, parameter in model.named_parameters():
        if name.endswith("scale_shift_table"):
            torch.nn.init.normal_(parameter, std=0.5)
    for component, content, module in (
        ("transformer", config, model),
        ("vae", vae, VideoVAE(VideoVAEConfig.from_json(vae))),
    ):
        (folder / component).mkdir(parents=True)
        (folder / component / "config.json").write_text(json.dumps(content, indent=1))
        save_file(module.state_dict(), folder / component / "model.safetensors", metadata={"format": "pt"})
    _write_text(folder, t5)
    return folder


def _with_blocks(sizes: Config, down: str, up: str) -> Config:
    """An autoencoder's configuration with as many blocks each way as it has widths, unless it names them itself."""
    count = len(sizes["block_out_channels"])
    return {"down_block_types": [down] * count, "up_block_types": [up] * count} | sizes


def _t5_config(overrides: Config | None) -> T5Config:
    return T5Config(
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
        | (overrides or {})
    )


def _write_text(folder: Path, t5: T5Config) -> None:
    """Text encoder and tokenizer."""
    T5EncoderModel(t5).save_pretrained(folder / "text_encoder")
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -10.0)]
    pieces += [(f"▁{word}", -1.0) for word in WORDS] + [(letter, -8.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    T5Tokenizer(vocab=pieces, extra_ids=0).save_pretrained(folder / "tokenizer")


def _write_index(folder: Path, pipeline: str, transformer: str, vae: str, scheduler: str) -> None:
    index = {
        "_class_name": pipeline,
        "tokenizer": ["transformers", "T5Tokenizer"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "vae": ["diffusers", vae],
        "transformer": ["diffusers", transformer],
        "scheduler": ["diffusers", scheduler],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
