"""The autoencoder of the Wan demo: causal over time, coded one latent at a time by diffusers and all at once here.

Training begins with single frames, which need but the last time step of every kernel. The others are zero until then,
so that a still video is first coded as its frame is, and what is left to learn is to code two frames as one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanAttentionBlock,
    WanCausalConv3d,
    WanMidBlock,
    WanResample,
    WanResidualBlock,
    WanRMS_norm,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from demo import shapes
from demo.autoencoder import Autoencoder, Loss, coding_loss
from demo.training import Settings, moved_weights, pixels_from_videos

FRAMES = 9
LATENT_FRAMES = 5
LATENT_CHANNELS = 4
IMAGE_SHARE = 0.4
"""Share of the steps that see single frames, as many as the videos of the other steps have together."""
START_LOGVAR = -4.0


def make_vae() -> AutoencoderKLWan:
    """9 RGB frames of 32x32 to 5 latents of 4 channels and 16x16: the first frame's, then one for every two frames."""
    vae = AutoencoderKLWan(
        base_dim=16,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
        scale_factor_temporal=2,
        scale_factor_spatial=2,
    )
    initialise_vae(vae)
    return vae


@torch.no_grad()
def initialise_vae(vae: AutoencoderKLWan) -> None:
    """Makes what goes beyond a frame zero, and what halves and doubles frames keep them as they are."""
    for module in vae.modules():
        if isinstance(module, WanCausalConv3d):
            module.weight[:, :, :-1] = 0
        if isinstance(module, WanResample) and hasattr(module, "time_conv"):
            weight = module.time_conv.weight
            nn.init.zeros_(weight)
            nn.init.zeros_(module.time_conv.bias)
            weight[:, :, -1, 0, 0] = torch.eye(weight.shape[1]).repeat(weight.shape[0] // weight.shape[1], 1)
    for convolution in (vae.quant_conv, vae.post_quant_conv):
        convolution.weight.copy_(torch.eye(len(convolution.weight)).view_as(convolution.weight))
        nn.init.zeros_(convolution.bias)
    last = vae.encoder.conv_out
    last.weight[LATENT_CHANNELS:] = 0
    last.bias[LATENT_CHANNELS:] = START_LOGVAR


# ---------------------------------------------------------------------------------------------------------------
# All frames at once


def encode(vae: AutoencoderKLWan, pixels: Tensor) -> DiagonalGaussianDistribution:
    """What `vae.encode` makes of pixels (batch, 3, frames, height, width)."""
    hidden = _convolve(vae.encoder.conv_in, pixels)
    for layer in vae.encoder.down_blocks:
        hidden = _halve(layer, hidden) if isinstance(layer, WanResample) else _residual(layer, hidden)
    hidden = _middle(vae.encoder.mid_block, hidden)
    hidden = _convolve(vae.encoder.conv_out, F.silu(_normed(vae.encoder.norm_out, hidden)))
    return DiagonalGaussianDistribution(vae.quant_conv(hidden))


def decode(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """What `vae.decode` makes of latents, not clamped."""
    decoder = vae.decoder
    hidden = _middle(decoder.mid_block, _convolve(decoder.conv_in, vae.post_quant_conv(latents)))
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            hidden = _residual(resnet, hidden)
        for upsampler in block.upsamplers or ():
            hidden = _double(upsampler, hidden)
    return _convolve(decoder.conv_out, F.silu(_normed(decoder.norm_out, hidden)))


def _convolve(layer: WanCausalConv3d, hidden: Tensor) -> Tensor:
    if hidden.shape[2] > 1:
        output: Tensor = layer(hidden)
        return output
    padding = layer._padding[2], layer._padding[0]
    return F.conv2d(hidden[:, :, 0], layer.weight[:, :, -1], layer.bias, padding=padding).unsqueeze(2)


def _residual(block: WanResidualBlock, hidden: Tensor) -> Tensor:
    change = _convolve(block.conv1, F.silu(_normed(block.norm1, hidden)))
    change = _convolve(block.conv2, F.silu(_normed(block.norm2, change)))
    shortcut: Tensor = block.conv_shortcut(hidden)
    return change + shortcut


def _middle(block: WanMidBlock, hidden: Tensor) -> Tensor:
    first, second = cast("list[WanResidualBlock]", block.resnets)
    attention = partial(_attention, cast("WanAttentionBlock", block.attentions[0]))
    hidden = _residual(first, hidden)
    return _residual(second, hidden + _frame_by_frame(attention, hidden))


def _attention(block: WanAttentionBlock, frames: Tensor) -> Tensor:
    pixels = block.to_qkv(_normed(block.norm, frames)).flatten(2).transpose(1, 2)
    query, key, value = pixels.chunk(3, dim=-1)
    scores = torch.matmul(query * query.shape[-1] ** -0.5, key.transpose(1, 2))
    attended = torch.matmul(scores.softmax(-1), value).transpose(1, 2)
    output: Tensor = block.proj(attended.reshape(frames.shape))
    return output


def _normed(norm: WanRMS_norm, hidden: Tensor) -> Tensor:
    factors = hidden.square().sum(1, keepdim=True).clamp(min=1e-24).rsqrt()
    output: Tensor = hidden * factors * (norm.gamma * norm.scale)
    return output


def _halve(layer: WanResample, hidden: Tensor) -> Tensor:
    # The first frame stays alone; every other two become one, with the one before them in view.
    hidden = _frame_by_frame(layer.resample, hidden)
    return torch.cat([hidden[:, :, :1], layer.time_conv(hidden)], dim=2) if hidden.shape[2] > 1 else hidden


def _double(layer: WanResample, hidden: Tensor) -> Tensor:
    # The first frame stays alone and is out of sight of the others, which become two each.
    if hidden.shape[2] > 1:
        batch, channels, frames, height, width = hidden.shape
        pairs = layer.time_conv(hidden[:, :, 1:]).view(batch, 2, channels, frames - 1, height, width)
        others = pairs.permute(0, 2, 3, 1, 4, 5).reshape(batch, channels, -1, height, width)
        hidden = torch.cat([hidden[:, :, :1], others], dim=2)
    return _frame_by_frame(layer.resample, hidden)


def _frame_by_frame(module: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    frames = module(hidden.transpose(1, 2).flatten(0, 1))
    return frames.view(*hidden.transpose(1, 2).shape[:2], *frames.shape[1:]).transpose(1, 2)


@torch.no_grad()
def check_coding(vae: AutoencoderKLWan) -> None:
    """Raises if `encode` or `decode` and diffusers disagree, with every weight moved away from its starting value."""
    with moved_weights(vae) as generator:
        expected, actual = [], []
        for frames in (1, FRAMES):
            pixels = torch.randn(2, 3, frames, shapes.SIZE, shapes.SIZE, generator=generator)
            means = vae.encode(pixels).latent_dist.mean
            expected += [means, vae.decode(means).sample]
            actual += [encode(vae, pixels).mean, decode(vae, means).clamp(-1, 1)]
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------------
# Training


def losses(vae: AutoencoderKLWan, videos: shapes.Video, settings: Settings) -> Loss:
    """Of single frames at first, then of videos."""
    frames = videos.reshape(-1, 1, *videos.shape[2:])
    batch = settings.vae_batch // settings.processes

    def loss(step: int, generator: torch.Generator) -> Tensor:
        still = step < IMAGE_SHARE * settings.vae_steps
        source, count = (frames, batch * FRAMES) if still else (videos, batch)
        chosen = torch.randint(len(source), (count,), generator=generator)
        pixels = pixels_from_videos(source[chosen.numpy()])
        posterior = encode(vae, pixels)
        return coding_loss(posterior, decode(vae, posterior.sample(generator)), pixels)

    return loss


@torch.no_grad()
def find_axes(vae: AutoencoderKLWan, videos: shapes.Video) -> None:
    """Turns the latents so that their channels are uncorrelated over `videos`; videos decode as before.

    Mean and deviation of the channels go into the configuration, from which pipelines take them. The posterior's
    variance becomes the same everywhere: its mean over `videos`.
    """
    posterior = encode(vae, pixels_from_videos(videos))
    means = posterior.mean.transpose(0, 1).flatten(1).double()
    turn = torch.linalg.eigh(torch.cov(means))[1].T
    into, out = vae.quant_conv, vae.post_quant_conv
    channels = len(turn)
    into.weight[:channels] = torch.einsum("ij,jcthw->icthw", turn, into.weight[:channels].double()).float()
    into.bias[:channels] = (turn @ into.bias[:channels].double()).float()
    into.weight[channels:] = 0
    into.bias[channels:] = (turn.square() @ posterior.var.mean((0, 2, 3, 4)).double()).log().float()
    out.weight.copy_(torch.einsum("octhw,ic->oithw", out.weight.double(), turn).float())
    turned = turn @ means
    vae.register_to_config(latents_mean=turned.mean(1).tolist(), latents_std=turned.std(1).tolist())


def statistics(vae: AutoencoderKLWan) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the latents' channels, to be broadcast against latents."""
    config: Any = vae.config
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (config.latents_mean, config.latents_std))
    return mean, std


AUTOENCODER = Autoencoder(
    frames=FRAMES,
    make=make_vae,
    losses=losses,
    finish=lambda vae, videos: find_axes(vae, videos[:256]),
    prepare=check_coding,
)
