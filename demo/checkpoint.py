"""The parts of the demo checkpoint, untrained, and the way a trained one is written to disk.

The parts are the ones of diffusers' `LattePipeline`, only narrow: nothing here is special to this checkpoint except
sizes and starting values, so whatever loads the real Latte-1 loads this one.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, LattePipeline, LatteTransformer3DModel
from torch import nn
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from demo import shapes

LATENT_CHANNELS = 4
LATENT_SIZE = 16
PATCH = 4
WIDTH = 128
HEADS = 4
PAIRS = 8
TEXT_WIDTH = 64


def make_vae() -> AutoencoderKL:
    """AutoencoderKL from 32x32 RGB frames to 16x16 latents of 4 channels; latents need no scaling factor."""
    return AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=shapes.SIZE,
        scaling_factor=1.0,
    )


def make_tokenizer() -> T5Tokenizer:
    """T5 tokenizer whose pieces are the whole words of the captions; all else becomes `<unk>`."""
    words = sorted({word for combination in shapes.combinations() for word in combination.caption.split()})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return T5Tokenizer(vocab=pieces + [(f"▁{word}", -1.0) for word in words], extra_ids=0)


def make_text_encoder(vocab_size: int) -> T5EncoderModel:
    """T5 encoder of two layers, float32."""
    return T5EncoderModel(
        T5Config(
            vocab_size=vocab_size,
            d_model=TEXT_WIDTH,
            d_kv=16,
            d_ff=4 * TEXT_WIDTH,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
        )
    )


def make_transformer() -> LatteTransformer3DModel:
    """Latte transformer of 8 spatial and 8 temporal blocks with the starting values of `initialise_transformer`."""
    transformer = LatteTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        in_channels=LATENT_CHANNELS,
        out_channels=2 * LATENT_CHANNELS,
        num_layers=PAIRS,
        cross_attention_dim=WIDTH,
        attention_bias=True,
        sample_size=LATENT_SIZE,
        patch_size=PATCH,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=TEXT_WIDTH,
        video_length=shapes.FRAMES,
    )
    initialise_transformer(transformer)
    return transformer


def make_scheduler() -> DDIMScheduler:
    """DDIM with Latte's linear betas; the network predicts the clean latents."""
    return DDIMScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        clip_sample=False,
        prediction_type="sample",
        timestep_spacing="leading",
        thresholding=False,
    )


@torch.no_grad()
def initialise_transformer(transformer: LatteTransformer3DModel) -> None:
    """Opens all gates, so that every block is in the signal path from the first step; overwrites all weights.

    PixArt's own start (gates near zero) leaves deep blocks without gradient for thousands of steps.
    """
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    blocks = [*transformer.transformer_blocks, *transformer.temporal_transformer_blocks]
    for block in blocks:
        branch_ends = [block.attn1.to_out[0], block.ff.net[2]]
        if block.attn2 is not None:
            branch_ends.append(block.attn2.to_out[0])
        for linear in branch_ends:
            linear.weight.mul_(len(blocks) ** -0.5)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = block.scale_shift_table
        for zero in (shift_msa, scale_msa, shift_mlp, scale_mlp):
            zero.zero_()
        for one in (gate_msa, gate_mlp):
            one.fill_(1.0)
    patches = transformer.pos_embed.proj
    nn.init.xavier_uniform_(patches.weight.view(patches.weight.shape[0], -1))
    nn.init.zeros_(patches.bias)
    nn.init.zeros_(transformer.adaln_single.linear.weight)
    nn.init.zeros_(transformer.scale_shift_table)
    nn.init.zeros_(transformer.proj_out.weight)


def save_checkpoint(
    folder: Path, vae: AutoencoderKL, text_encoder: T5EncoderModel, transformer: LatteTransformer3DModel
) -> None:
    """Writes a folder that `LattePipeline.from_pretrained` loads, float32, replacing what was there.

    The new folder is complete before it takes the place of the old one, so readers never see half a checkpoint.
    """
    pipeline = LattePipeline(
        tokenizer=make_tokenizer(),
        text_encoder=text_encoder,
        vae=vae,
        transformer=transformer,
        scheduler=make_scheduler(),
    )
    fresh, stale = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("fresh", "stale"))
    for leftover in (fresh, stale):
        shutil.rmtree(leftover, ignore_errors=True)
    pipeline.save_pretrained(fresh)
    for file in fresh.glob("*/config.json"):
        config = json.loads(file.read_text())
        config.pop("_name_or_path", None)  # where a part was read from concerns this machine alone
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    if folder.exists():
        os.rename(folder, stale)
    os.rename(fresh, folder)
    shutil.rmtree(stale, ignore_errors=True)
