"""CogVideoX: a causal video autoencoder and a transformer in which text and video attend to each other jointly.

The parts are the ones of diffusers' `CogVideoXPipeline`, only narrow. Positions are rotary, as in CogVideoX-5b; noise
schedule and prediction of the velocity are those of CogVideoX-2b. The text encoder is Latte's, frozen.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from torch import Tensor, nn

from demo import shapes
from demo.checkpoint import load_pipeline, save_pipeline
from demo.model import ROOT, Model, Sampling
from demo.models.cogvideox_forward import (
    latents_from_patches,
    patches_from_latents,
    predict,
    rotary_embedding,
    rotations,
)
from demo.models.cogvideox_vae import AUTOENCODER, FRAMES, LATENT_CHANNELS, LATENT_FRAMES
from demo.optimiser import FlatAdamW
from demo.text import WIDTH as TEXT_WIDTH
from demo.text import load_text_encoder, load_tokenizer
from demo.training import (
    Batch,
    Clock,
    NoiseLevels,
    Settings,
    TrainingSet,
    generator_for,
    moved_weights,
    over_batch,
    pixels_from_videos,
    train_denoiser_by,
    training_latents,
)

LATENT_SIZE = 16
PATCH = 4
WIDTH = 128
HEADS = 4
BLOCKS = 10
TEXT_LENGTH = 8
"""Tokens that every caption is padded to; the transformer attends to padding, as the real one does."""
SETTINGS = Settings(
    work=ROOT / "work" / "cogvideox",
    output=ROOT / "cogvideox",
    records=ROOT / "records" / "cogvideox",
    vae_steps=2_600,
    vae_batch=2,
    vae_learning_rate=2e-3,
)
LEVELS = NoiseLevels(centre=0.6, spread=1.35, mean_from=0.95, mean_share=0.15)


def make_transformer() -> CogVideoXTransformer3DModel:
    """CogVideoX transformer of 10 blocks with the starting values of `initialise_transformer`."""
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        time_embed_dim=64,
        text_embed_dim=TEXT_WIDTH,
        num_layers=BLOCKS,
        sample_width=LATENT_SIZE,
        sample_height=LATENT_SIZE,
        sample_frames=FRAMES,
        patch_size=PATCH,
        temporal_compression_ratio=2,
        max_text_seq_length=TEXT_LENGTH,
        spatial_interpolation_scale=1.0,
        use_rotary_positional_embeddings=True,
    )
    initialise_transformer(transformer)
    return transformer


@torch.no_grad()
def initialise_transformer(transformer: CogVideoXTransformer3DModel) -> None:
    """Opens all gates, so that every block is in the signal path from the first step; overwrites linear layers."""
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for block in transformer.transformer_blocks:
        for linear in (block.attn1.to_out[0], block.ff.net[2]):
            linear.weight.mul_(BLOCKS**-0.5)
        for norm in (block.norm1, block.norm2):
            nn.init.zeros_(norm.linear.weight)
            norm.linear.bias.view(2, 3, -1)[:, 2] = 1.0  # the gates, of video and text
    patches = transformer.patch_embed.proj
    nn.init.xavier_uniform_(patches.weight.view(patches.weight.shape[0], -1))
    nn.init.zeros_(patches.bias)
    nn.init.zeros_(transformer.norm_out.linear.weight)
    nn.init.zeros_(transformer.proj_out.weight)


def make_scheduler() -> CogVideoXDDIMScheduler:
    """The scheduler of CogVideoX-2b: its last timestep is noise alone, and the network predicts the velocity."""
    return CogVideoXDDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=3.0,
        timestep_spacing="trailing",
    )


# ---------------------------------------------------------------------------------------------------------------
# Training


@torch.no_grad()
def caption_embeddings() -> Tensor:
    """What the pipeline passes for the captions of `shapes.trained()` and the empty one: (37, 8, 64).

    The pipeline gives the encoder no mask, so padding changes the embeddings, too.
    """
    captions = [combination.caption for combination in shapes.trained()] + [""]
    tokens = load_tokenizer()(captions, padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt")
    embeddings: Tensor = load_text_encoder()(tokens.input_ids).last_hidden_state
    return embeddings


def noisy_latents(batch: Batch, alphas: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Adds noise to clean latents.

    The loss weight of the velocity is min(1, 2 (1 - alpha)); for the clean latents that it implies, this is a weight
    of min(1 / (1 - alpha), 2), as in `demo.models.latte`.

    Returns:
        Noisy latents and velocities like `batch.clean`, timesteps int64 (batch,), loss weights float32 (batch,).
    """
    timesteps = (1000 * batch.levels).long().clamp(0, 999)
    alpha = over_batch(alphas[timesteps], batch.clean)
    noisy = alpha.sqrt() * batch.clean + (1 - alpha).sqrt() * batch.noise
    velocity = alpha.sqrt() * batch.noise - (1 - alpha).sqrt() * batch.target
    return noisy, velocity, timesteps, (2 * (1 - alphas[timesteps])).clamp(max=1)


def train_denoiser(settings: Settings, clock: Clock) -> bool:
    """Trains the transformer, replacing the checkpoint now and then."""
    rank = dist.get_rank()
    vae = AutoencoderKLCogVideoX.from_pretrained(settings.work / "vae")

    def patches_from_videos(videos: shapes.Video) -> Tensor:
        latents = vae.encode(pixels_from_videos(videos)).latent_dist.mean
        return patches_from_latents(latents.transpose(1, 2), PATCH)

    examples = TrainingSet(*training_latents(settings, FRAMES, patches_from_videos))
    text, alphas = caption_embeddings(), make_scheduler().alphas_cumprod.float()
    torch.manual_seed(settings.seed)
    transformer = make_transformer()
    check_forward(transformer)
    turns = rotations(transformer, LATENT_FRAMES)
    optimiser = FlatAdamW([transformer], torch.float32)

    def loss(step: int) -> Tensor:
        batch = examples.draw(settings, LEVELS, generator_for(settings.seed, 2, step, rank))
        noisy, velocity, timesteps, weight = noisy_latents(batch, alphas)
        predicted = predict(transformer, noisy, timesteps, text[batch.captions], turns)
        return (weight * examples.errors(predicted - velocity, batch)).mean()

    def save() -> None:
        averaged = make_transformer()
        optimiser.copy_average_to([averaged])
        save_checkpoint(settings.output, vae, averaged)

    return train_denoiser_by(loss, save, optimiser, settings, clock)


@torch.no_grad()
def check_forward(transformer: CogVideoXTransformer3DModel) -> None:
    """Raises if `cogvideox_forward` and diffusers disagree, with every weight moved away from its starting value."""
    with moved_weights(transformer) as generator:
        latents = torch.randn(2, LATENT_FRAMES, LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE, generator=generator)
        timesteps = torch.tensor([20, 999])
        text = torch.randn(2, TEXT_LENGTH, TEXT_WIDTH, generator=generator)
        rotary = rotary_embedding(transformer, LATENT_FRAMES)
        expected = transformer(latents, text, timesteps, image_rotary_emb=rotary).sample
        turns = rotations(transformer, LATENT_FRAMES)
        patches = predict(transformer, patches_from_latents(latents, PATCH), timesteps, text, turns)
    torch.testing.assert_close(latents_from_patches(patches, PATCH, LATENT_FRAMES), expected, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------------
# Checkpoint and sampling


def save_checkpoint(folder: Path, vae: AutoencoderKLCogVideoX, transformer: CogVideoXTransformer3DModel) -> None:
    """Writes a folder that `CogVideoXPipeline.from_pretrained` loads, float32, replacing what was there."""
    pipeline = CogVideoXPipeline(
        tokenizer=load_tokenizer(),
        text_encoder=load_text_encoder(),
        vae=vae,
        transformer=transformer,
        scheduler=make_scheduler(),
    )
    save_pipeline(folder, pipeline)


def generate(pipeline: CogVideoXPipeline, prompt: str, seed: int, sampling: Sampling) -> shapes.Video:
    """Runs diffusers' pipeline; uint8 (9, 32, 32, 3)."""
    frames = pipeline(
        prompt,
        num_inference_steps=sampling.steps,
        guidance_scale=sampling.guidance,
        num_frames=FRAMES,
        height=shapes.SIZE,
        width=shapes.SIZE,
        max_sequence_length=TEXT_LENGTH,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).frames[0]
    video: shapes.Video = np.rint(frames * 255).astype(np.uint8)
    return video


MODEL = Model(
    name="cogvideox",
    frames=FRAMES,
    settings=SETTINGS,
    stages=(AUTOENCODER.train, train_denoiser),
    sampling=Sampling(steps=50, guidance=2.0),
    load=partial(load_pipeline, CogVideoXPipeline),
    generate=generate,
)
