"""Wan, by diffusers: 2.1 in two sizes, the A14B of 2.2, and its 5B with a VAE of its own."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from zoo.base import Config, Example, Family, Published
from zoo.components import (
    FUSED_HEAD_DIM,
    T5_XXL,
    TINY_T5,
    diffusers_module,
    diffusers_original,
    pipeline_index,
    write_index,
    write_text,
)

ENCODER = "UMT5EncoderModel"
INDEX = pipeline_index("WanPipeline", "WanTransformer3DModel", "AutoencoderKLWan", ENCODER) | {
    "transformer_2": [None, None],
    "boundary_ratio": None,
    "expand_timesteps": False,
}
INDEX_A14B = INDEX | {"transformer_2": ["diffusers", "WanTransformer3DModel"], "boundary_ratio": 0.875}
INDEX_5B = INDEX | {"expand_timesteps": True}
UMT5_XXL = T5_XXL | {"vocab_size": 256384}
WAN_1_3B: Config = {
    "patch_size": [1, 2, 2],
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 8960,
    "num_layers": 30,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "image_dim": None,
    "added_kv_proj_dim": None,
    "rope_max_seq_len": 1024,
    "pos_embed_seq_len": None,
}
WAN_14B = WAN_1_3B | {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}
WAN_5B = WAN_1_3B | {"num_attention_heads": 24, "ffn_dim": 14336, "in_channels": 48, "out_channels": 48}
VAE: Config = {
    "base_dim": 96,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
    "scale_factor_spatial": 8,
    "scale_factor_temporal": 4,
}
# the published means and deviations are of 48 channels; those here have the right number
VAE_5B = VAE | {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
}
SCHEDULE: Config = {
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
    "num_train_timesteps": 1000,
    "solver_order": 2,
    "solver_type": "bh2",
}
KEPT = 7  # by UniPC: three samples, and four outputs in six steps
SMALL = {"height": 32, "width": 16, "frames": 5}


def write_random(
    folder: Path,
    *,
    residual: bool = False,
    boundary: float | None = None,
    heads: int = 2,
    head_dim: int = 16,
    layers: int = 2,
    transformer: Config | None = None,
    text: Config | None = None,
    vae: Config | None = None,
    scheduler: str = "UniPCMultistepScheduler",
    scheduler_settings: Config | None = None,
    seed: int = 0,
) -> Path:
    """Write a random WanPipeline and return its folder.

    `scheduler` is a class of diffusers. With `residual` it is like the 5B of Wan 2.2, otherwise like Wan 2.1. Its VAE
    makes 4 x 4 pixels of a latent, or 8 x 8 with `residual`, and of every latent frame but the first two frames. With a
    `boundary`, a share of the timesteps, it has a second transformer, like the A14B of Wan 2.2.
    """
    import diffusers
    import torch

    torch.manual_seed(seed)
    encoder = TINY_T5 | (text or {})
    decoder: Config = {
        "base_dim": 4,
        "z_dim": 4,
        "dim_mult": [1, 2, 2],
        "num_res_blocks": 0,
        "temperal_downsample": [False, True],
        "latents_mean": [0.3, -0.2, 0.1, -0.4],
        "latents_std": [1.5, 2.0, 0.8, 1.2],
        "scale_factor_spatial": 4,
        "scale_factor_temporal": 2,
    }
    if residual:
        decoder |= {
            "is_residual": True,
            "decoder_base_dim": 6,
            "in_channels": 12,
            "out_channels": 12,
            "patch_size": 2,
            "scale_factor_spatial": 8,
        }
    decoder |= vae or {}
    config: Config = {
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "in_channels": decoder["z_dim"],
        "out_channels": decoder["z_dim"],
        "text_dim": encoder["d_model"],
        "freq_dim": 16,
        "ffn_dim": 48,
        "num_layers": layers,
    }
    for component in ("transformer", *([] if boundary is None else ["transformer_2"])):
        model = diffusers.WanTransformer3DModel(**config | (transformer or {}))
        model.save_pretrained(folder / component)
    write_text(folder, encoder, ENCODER)
    diffusers.AutoencoderKLWan(**decoder).save_pretrained(folder / "vae")
    schedule = getattr(diffusers, scheduler)(**SCHEDULE | (scheduler_settings or {}))
    schedule.save_pretrained(folder / "scheduler")
    index = INDEX_5B if residual else INDEX
    write_index(folder, index if boundary is None else INDEX_A14B | {"boundary_ratio": boundary}, scheduler)
    return folder


def _published(index: Config, transformer: Config, vae: Config, flow_shift: float) -> dict[str, Config]:
    """The configurations of a checkpoint, by their names in it."""
    return {
        "model_index.json": index | {"scheduler": ["diffusers", "UniPCMultistepScheduler"]},
        "transformer/config.json": transformer,
        "vae/config.json": vae,
        "text_encoder/config.json": UMT5_XXL,
        "scheduler/scheduler_config.json": SCHEDULE | {"flow_shift": flow_shift},
    }


FAMILY = Family(
    title="Wan",
    published={
        "wan-1.3b": Published(
            files=_published(INDEX, WAN_1_3B, VAE, 3.0),
            dtype="bf16",
            sizes={"Wan 2.1 1.3B": {}},
            small={"head_dim": FUSED_HEAD_DIM},
            small_sizes=SMALL,
            kept=KEPT,
        ),
        "wan-14b": Published(
            files=_published(INDEX, WAN_14B, VAE, 3.0),
            dtype="bf16",
            sizes={"Wan 2.1 14B, 480p": {}, "Wan 2.1 14B, 720p": {"height": 720, "width": 1280}},
            small={"head_dim": FUSED_HEAD_DIM},
            small_sizes=SMALL,
            kept=KEPT,
        ),
        "wan-a14b": Published(
            files=_published(INDEX_A14B, WAN_14B, VAE, 3.0) | {"transformer_2/config.json": WAN_14B},
            dtype="bf16",
            sizes={"Wan 2.2 A14B, 480p": {}, "Wan 2.2 A14B, 720p": {"height": 720, "width": 1280}},
            small={"head_dim": FUSED_HEAD_DIM, "boundary": 0.875},
            small_sizes=SMALL,
            kept=KEPT,
        ),
        "wan-ti2v-5b": Published(
            files=_published(INDEX_5B, WAN_5B, VAE_5B, 5.0),
            dtype="bf16",
            sizes={"Wan 2.2 5B": {}},
            small={"head_dim": FUSED_HEAD_DIM, "residual": True},
            small_sizes=SMALL,
            kept=KEPT,
        ),
    },
    # one stream, rotary positions, a sampler with a memory of three steps, and five frames decoded one after the other
    example=Example("wan-1.3b", {"layers": 3}, SMALL),
    write_random=write_random,
    original=partial(diffusers_module, INDEX),
    load_original=partial(diffusers_original, INDEX),
)
