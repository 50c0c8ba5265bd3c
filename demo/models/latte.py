"""Latte: an autoencoder for single frames, a T5 text encoder and a transformer of spatial and temporal blocks.

The parts are the ones of diffusers' `LattePipeline`, only narrow: nothing here is special to this checkpoint except
sizes and starting values, so whatever loads the real Latte-1 loads this one. The text encoder is trained with the
transformer; the other demo models use it as it then is.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from diffusers import AutoencoderKL, DDIMScheduler, LattePipeline, LatteTransformer3DModel
from torch import Tensor, nn
from transformers import T5EncoderModel

from demo import shapes
from demo.autoencoder import Autoencoder, Loss, vae_loss
from demo.checkpoint import load_pipeline, save_pipeline
from demo.model import ROOT, Model, Sampling
from demo.models.latte_forward import latents_from_patches, patches_from_latents, predict
from demo.optimiser import FlatAdamW
from demo.text import WIDTH as TEXT_WIDTH
from demo.text import make_text_encoder, make_tokenizer
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

LATENT_CHANNELS = 4
LATENT_SIZE = 16
PATCH = 4
WIDTH = 128
HEADS = 4
PAIRS = 8
SETTINGS = Settings(
    work=ROOT / "work" / "latte",
    output=ROOT / "latte",
    records=ROOT / "records" / "latte",
    processes=2,
    mean_targets_after=71_112,
)
LEVELS = NoiseLevels(centre=0.4, spread=1.0, mean_from=0.94, mean_share=0.0)
MEAN_SHARE = 0.2
"""Share of the batch that is drawn from the noisiest levels on purpose, once means are the targets there."""


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


# ---------------------------------------------------------------------------------------------------------------
# Autoencoder


def frames_from_videos(videos: shapes.Video) -> Tensor:
    """uint8 (videos, frames, height, width, 3) to float32 (videos * frames, 3, height, width) in [-1, 1]."""
    return pixels_from_videos(videos).transpose(1, 2).flatten(0, 1)


def losses(vae: AutoencoderKL, videos: shapes.Video, settings: Settings) -> Loss:
    """Of single frames."""
    frames = videos.reshape(-1, 1, *videos.shape[2:])

    def loss(step: int, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(frames), (settings.vae_batch // settings.processes,), generator=generator)
        return vae_loss(vae, frames_from_videos(frames[chosen.numpy()]), generator)

    return loss


@torch.no_grad()
def whiten_latents(vae: AutoencoderKL, videos: shapes.Video) -> None:
    """Changes the 1x1 convolutions around the latents so that these have mean 0 and covariance 1 over `videos`.

    Decoding an encoded frame gives the same picture as before. The posterior's variance is not per channel any more
    after the channels are mixed, and nothing downstream samples from it, so its average is stored as a constant.
    """
    posterior = vae.encode(frames_from_videos(videos)).latent_dist
    means = posterior.mean.transpose(0, 1).flatten(1).double()
    centre, (values, vectors) = means.mean(1), torch.linalg.eigh(torch.cov(means))
    whiten = (vectors * values.rsqrt()) @ vectors.T
    restore = (vectors * values.sqrt()) @ vectors.T
    channels = len(centre)
    into, out_of = vae.quant_conv, vae.post_quant_conv
    weight, bias = into.weight[:channels, :, 0, 0].double(), into.bias[:channels].double()
    into.weight[:channels] = (whiten @ weight).float()[:, :, None, None]
    into.bias[:channels] = (whiten @ (bias - centre)).float()
    into.weight[channels:] = 0
    into.bias[channels:] = (whiten.square() @ posterior.var.mean((0, 2, 3)).double()).log().float()
    weight = out_of.weight[:, :, 0, 0].double()
    out_of.bias.add_((weight @ centre).float())
    out_of.weight.copy_((weight @ restore).float()[:, :, None, None])


AUTOENCODER = Autoencoder(
    frames=shapes.FRAMES,
    make=make_vae,
    losses=losses,
    finish=lambda vae, videos: whiten_latents(vae, videos[:256]),
    pixels=frames_from_videos,
)


# ---------------------------------------------------------------------------------------------------------------
# Text encoder and transformer


def caption_tokens() -> tuple[Tensor, Tensor]:
    """Token ids and attention masks, int64 (37, 6): the captions of `shapes.trained()`, then the empty caption.

    The pipeline pads to 120 tokens, encodes, and cuts prompt and empty prompt to the length of the prompt. Padding is
    masked in the encoder and relative positions do not depend on length, so cutting first gives the same embeddings.
    """
    tokenizer = make_tokenizer()
    captions = [combination.caption for combination in shapes.trained()] + [""]
    tokens = tokenizer(captions, padding="longest", return_tensors="pt")
    return tokens.input_ids, tokens.attention_mask


def noisy_latents(batch: Batch, alphas: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Adds noise to clean latents, which are to be predicted, with a loss weight of min(1 / (1 - alpha), 2).

    Returns:
        Noisy latents like `batch.clean`, timesteps int64 (batch,) and loss weights float32 (batch,).
    """
    timesteps = (1000 * batch.levels).long().clamp(0, 999)
    alpha = alphas[timesteps]
    scale = over_batch(alpha, batch.clean)
    noisy = scale.sqrt() * batch.clean + (1 - scale).sqrt() * batch.noise
    return noisy, timesteps, (1 / (1 - alpha)).clamp(max=2)


def levels_after(settings: Settings, step: int) -> NoiseLevels:
    """Noise levels of a step: the noisiest latents have means as targets from `mean_targets_after` samples on."""
    if step * settings.batch >= settings.mean_targets_after:
        return NoiseLevels(LEVELS.centre, LEVELS.spread, LEVELS.mean_from, MEAN_SHARE)
    return NoiseLevels(LEVELS.centre, LEVELS.spread, float("inf"), 0.0)


def train_denoiser(settings: Settings, clock: Clock) -> bool:
    """Trains text encoder and transformer together, replacing the checkpoint now and then."""
    rank = dist.get_rank()
    vae = AutoencoderKL.from_pretrained(settings.work / "vae")

    def patches_from_videos(videos: shapes.Video) -> Tensor:
        latents = vae.encode(frames_from_videos(videos)).latent_dist.mean
        return patches_from_latents(latents.unflatten(0, videos.shape[:2]).transpose(1, 2), PATCH)

    examples = TrainingSet(*training_latents(settings, shapes.FRAMES, patches_from_videos))
    ids, mask = caption_tokens()
    torch.manual_seed(settings.seed)
    text_encoder, transformer = make_text_encoder(len(make_tokenizer())), make_transformer()
    check_forward(transformer)
    optimiser = FlatAdamW([text_encoder, transformer], torch.bfloat16)
    alphas = make_scheduler().alphas_cumprod

    def loss(step: int) -> Tensor:
        generator = generator_for(settings.seed, 2, step, rank)
        batch = examples.draw(settings, levels_after(settings, step), generator)
        noisy, timesteps, weight = noisy_latents(batch, alphas)
        text = text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state[batch.captions]
        predicted = predict(transformer, noisy.bfloat16(), timesteps, text).float()
        return (weight * (predicted - batch.target).square().mean((1, 2, 3))).mean()

    def save() -> None:
        averaged = make_text_encoder(len(make_tokenizer())), make_transformer()
        optimiser.copy_average_to(averaged)
        save_checkpoint(settings.output, vae, *averaged)

    return train_denoiser_by(loss, save, optimiser, settings, clock)


@torch.no_grad()
def check_forward(transformer: LatteTransformer3DModel) -> None:
    """Raises if `latte_forward` and diffusers disagree, with every weight moved away from zero for the comparison."""
    with moved_weights(transformer) as generator:
        latents = torch.randn(2, 4, shapes.FRAMES, 16, 16, generator=generator)
        timesteps, text = torch.tensor([20, 900]), torch.randn(2, 6, 64, generator=generator)
        expected = transformer(latents, timesteps, text).sample[:, :4]
        actual = latents_from_patches(
            predict(transformer, patches_from_latents(latents, PATCH), timesteps, text), PATCH
        )
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------------
# Checkpoint and sampling


def save_checkpoint(
    folder: Path, vae: AutoencoderKL, text_encoder: T5EncoderModel, transformer: LatteTransformer3DModel
) -> None:
    """Writes a folder that `LattePipeline.from_pretrained` loads, float32, replacing what was there."""
    pipeline = LattePipeline(
        tokenizer=make_tokenizer(),
        text_encoder=text_encoder,
        vae=vae,
        transformer=transformer,
        scheduler=make_scheduler(),
    )
    save_pipeline(folder, pipeline)


def generate(pipeline: LattePipeline, prompt: str, seed: int, sampling: Sampling) -> shapes.Video:
    """Runs diffusers' pipeline; uint8 (8, 32, 32, 3)."""
    frames = pipeline(
        prompt,
        num_inference_steps=sampling.steps,
        guidance_scale=sampling.guidance,
        video_length=shapes.FRAMES,
        height=shapes.SIZE,
        width=shapes.SIZE,
        clean_caption=False,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).frames[0]
    video: shapes.Video = np.rint(frames * 255).astype(np.uint8)
    return video


MODEL = Model(
    name="latte",
    frames=shapes.FRAMES,
    settings=SETTINGS,
    stages=(AUTOENCODER.train, train_denoiser),
    sampling=Sampling(steps=50, guidance=2.0),
    load=partial(load_pipeline, LattePipeline),
    generate=generate,
)
