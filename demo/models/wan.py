"""Wan: a causal video autoencoder and a transformer that reads the text by cross-attention, trained as a flow.

The parts are the ones of diffusers' `WanPipeline`, only narrow. The text encoder is Latte's, frozen and rewritten as
UMT5, which has the same layers.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from torch import Tensor, nn
from transformers import T5EncoderModel, T5Tokenizer, UMT5Config, UMT5EncoderModel

from demo import shapes
from demo.checkpoint import load_pipeline, save_pipeline
from demo.model import ROOT, Model, Sampling
from demo.models.wan_forward import latents_from_patches, patches_from_latents, predict, rotations
from demo.models.wan_vae import AUTOENCODER, FRAMES, LATENT_CHANNELS, LATENT_FRAMES, encode, statistics
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
"""Tokens that every caption is padded to; the transformer attends to padding, which is zeros, as the real one does."""
SETTINGS = Settings(
    work=ROOT / "work" / "wan",
    output=ROOT / "wan",
    records=ROOT / "records" / "wan",
    videos=5_120,
    vae_steps=4_800,
    vae_batch=2,
    vae_learning_rate=2e-3,
    samples=108_000,
)
LEVELS = NoiseLevels(centre=1.5, spread=1.25, mean_from=0.988, mean_share=0.15)


def make_transformer() -> WanTransformer3DModel:
    """Wan transformer of 10 blocks with the starting values of `initialise_transformer`."""
    transformer = WanTransformer3DModel(
        patch_size=(1, PATCH, PATCH),
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_WIDTH,
        ffn_dim=3 * WIDTH,
        num_layers=BLOCKS,
    )
    initialise_transformer(transformer)
    return transformer


@torch.no_grad()
def initialise_transformer(transformer: WanTransformer3DModel) -> None:
    """Opens all gates, so that every block is in the signal path from the first step; overwrites linear layers."""
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for block in transformer.blocks:
        for linear in (block.attn1.to_out[0], block.attn2.to_out[0], block.ffn.net[2]):
            linear.weight.mul_(BLOCKS**-0.5)
        block.scale_shift_table.view(2, 3, -1).copy_(torch.tensor([0.0, 0.0, 1.0])[:, None])  # the gates are last
    patches = transformer.patch_embedding
    nn.init.xavier_uniform_(patches.weight.view(patches.weight.shape[0], -1))
    nn.init.zeros_(patches.bias)
    for zero in (transformer.condition_embedder.time_proj, transformer.proj_out):
        nn.init.zeros_(zero.weight)
    nn.init.zeros_(transformer.scale_shift_table)


def make_scheduler() -> UniPCMultistepScheduler:
    """The scheduler of Wan 2.1 for small videos."""
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


# ---------------------------------------------------------------------------------------------------------------
# Text


def make_tokenizer() -> T5Tokenizer:
    """The tokenizer that all demos share, with the length that the transformer was trained with."""
    tokenizer = load_tokenizer()
    tokenizer.model_max_length = TEXT_LENGTH
    return tokenizer


@torch.no_grad()
def umt5_from_t5(encoder: T5EncoderModel) -> UMT5EncoderModel:
    """The same function as UMT5, whose layers have a table of relative positions each where T5's share the first's."""
    config = encoder.config
    names = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "dropout_rate", "feed_forward_proj")
    umt5 = UMT5EncoderModel(UMT5Config(**{name: getattr(config, name) for name in names}))
    weights = encoder.state_dict()
    table = "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"
    for layer in range(config.num_layers):
        weights[table.format(layer)] = weights[table.format(0)].clone()
    umt5.load_state_dict(weights)
    return umt5.eval().requires_grad_(False)


@torch.no_grad()
def caption_embeddings() -> Tensor:
    """What the pipeline passes for the captions of `shapes.trained()` and the empty one: (37, 8, 64), 0 at padding."""
    captions = [combination.caption for combination in shapes.trained()] + [""]
    tokens = make_tokenizer()(captions, padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt")
    encoder = umt5_from_t5(load_text_encoder())
    embeddings: Tensor = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    kept: Tensor = tokens.attention_mask.unsqueeze(2)
    return embeddings * kept


# ---------------------------------------------------------------------------------------------------------------
# Training


def noisy_latents(batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mixes clean latents with noise.

    The loss weight of the velocity is such that the clean latents it implies have the weight min(1 / (1 - alpha), 2) of
    `demo.models.latte`, where alpha is their share in the variance.

    Returns:
        Noisy latents and velocities like `batch.clean`; timesteps in [0, 1000), cut to whole numbers as the pipeline
        cuts them, and loss weights, float32 (batch,) each.
    """
    level = over_batch(batch.levels, batch.clean)
    noisy = (1 - level) * batch.clean + level * batch.noise
    signal, noise = (1 - batch.levels).square(), batch.levels.square()
    weight = torch.minimum(signal + noise, 2 * noise)
    return noisy, batch.noise - batch.target, (1000 * batch.levels).floor().clamp(max=999), weight


def train_denoiser(settings: Settings, clock: Clock) -> bool:
    """Trains the transformer, replacing the checkpoint now and then."""
    rank = dist.get_rank()
    vae = AutoencoderKLWan.from_pretrained(settings.work / "vae")
    mean, std = statistics(vae)

    def patches_from_videos(videos: shapes.Video) -> Tensor:
        return patches_from_latents((encode(vae, pixels_from_videos(videos)).mean - mean) / std, PATCH)

    examples = TrainingSet(*training_latents(settings, FRAMES, patches_from_videos))
    text = caption_embeddings()
    torch.manual_seed(settings.seed)
    transformer = make_transformer()
    check_forward(transformer)
    turns = rotations(transformer, (LATENT_FRAMES, LATENT_SIZE, LATENT_SIZE))
    optimiser = FlatAdamW([transformer], torch.float32)

    def loss(step: int) -> Tensor:
        batch = examples.draw(settings, LEVELS, generator_for(settings.seed, 2, step, rank))
        noisy, velocity, timesteps, weight = noisy_latents(batch)
        predicted = predict(transformer, noisy, timesteps, text[batch.captions], turns)
        return (weight * examples.errors(predicted - velocity, batch)).mean()

    def save() -> None:
        averaged = make_transformer()
        optimiser.copy_average_to([averaged])
        save_checkpoint(settings.output, vae, averaged)

    return train_denoiser_by(loss, save, optimiser, settings, clock)


@torch.no_grad()
def check_forward(transformer: WanTransformer3DModel) -> None:
    """Raises if `wan_forward` and diffusers disagree, with every weight moved away from its starting value."""
    with moved_weights(transformer) as generator:
        size = LATENT_FRAMES, LATENT_SIZE, LATENT_SIZE
        latents = torch.randn(2, LATENT_CHANNELS, *size, generator=generator)
        timesteps, text = torch.tensor([20, 999]), torch.randn(2, TEXT_LENGTH, TEXT_WIDTH, generator=generator)
        expected = transformer(latents, timesteps, text).sample
        patches = patches_from_latents(latents, PATCH)
        actual = predict(transformer, patches, timesteps, text, rotations(transformer, size))
    torch.testing.assert_close(latents_from_patches(actual, PATCH, LATENT_FRAMES), expected, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------------
# Checkpoint and sampling


def save_checkpoint(folder: Path, vae: AutoencoderKLWan, transformer: WanTransformer3DModel) -> None:
    """Writes a folder that `WanPipeline.from_pretrained` loads, float32, replacing what was there."""
    pipeline = WanPipeline(
        tokenizer=make_tokenizer(),
        text_encoder=umt5_from_t5(load_text_encoder()),
        vae=vae,
        transformer=transformer,
        scheduler=make_scheduler(),
    )
    save_pipeline(folder, pipeline)


def generate(pipeline: WanPipeline, prompt: str, seed: int, sampling: Sampling) -> shapes.Video:
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
    ).frames[0]
    video: shapes.Video = np.rint(frames * 255).astype(np.uint8)
    return video


MODEL = Model(
    name="wan",
    frames=FRAMES,
    settings=SETTINGS,
    stages=(AUTOENCODER.train, train_denoiser),
    sampling=Sampling(steps=50, guidance=2.0),
    load=partial(load_pipeline, WanPipeline),
    generate=generate,
)
