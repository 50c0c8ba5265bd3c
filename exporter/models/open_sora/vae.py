"""The VAE of Open-Sora 1.2: an image VAE over each frame, then a causal VAE over time.

Names and shapes of the weights are the original's. Time is cut into chunks of 17 frames that know nothing of each
other, each of which becomes 5 latents: the front is filled up with zeros to 20 frames, which decoding drops again.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from .config import CHANNELS, VideoVAEConfig

SPATIAL_FACTOR = 0.18215  # what the image VAE's latents are multiplied by
FRAMES_AT_A_TIME = 4  # through the image VAE
LOGVAR_RANGE = (-30.0, 20.0)


class CausalConv3d(nn.Module):
    """A convolution that sees no later frame: time is padded in front only, with zeros."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, bias: bool = True, stride: int = 1) -> None:
        super().__init__()
        side = kernel // 2
        self.padding = (side, side, side, side, kernel - stride, 0)
        self.conv = nn.Conv3d(channels_in, channels_out, kernel, (stride, 1, 1), bias=bias)

    def forward(self, states: Tensor) -> Tensor:
        return self.conv(F.pad(states, self.padding))  # type: ignore[no-any-return]


class ResBlock(nn.Module):
    """Twice group normalisation, SiLU and a convolution, around a skip connection."""

    def __init__(self, channels_in: int, channels_out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels_in)
        self.conv1 = CausalConv3d(channels_in, channels_out, 3, bias=False)
        self.norm2 = nn.GroupNorm(groups, channels_out)
        self.conv2 = CausalConv3d(channels_out, channels_out, 3, bias=False)
        if channels_in != channels_out:
            self.conv3 = CausalConv3d(channels_in, channels_out, 1, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        new = self.conv1(F.silu(self.norm1(states)))
        new = self.conv2(F.silu(self.norm2(new)))
        skip = self.conv3(states) if hasattr(self, "conv3") else states
        return new + skip  # type: ignore[no-any-return]


def res_blocks(count: int, channels_in: int, channels_out: int, groups: int) -> nn.ModuleList:
    """Several in a row, the first of which changes the number of channels."""
    return nn.ModuleList(ResBlock(channels_out if i else channels_in, channels_out, groups) for i in range(count))


class TemporalEncoder(nn.Module):
    """(B, 4, T, h, w) -> (B, 8, T / time factor, h, w)."""

    def __init__(self, config: VideoVAEConfig) -> None:
        super().__init__()
        widths = [config.filters * multiplier for multiplier in config.channel_multipliers]
        count, groups = config.num_res_blocks, config.num_groups
        self.conv_in = CausalConv3d(CHANNELS, config.filters, 3, bias=False)
        self.block_res_blocks = nn.ModuleList(
            res_blocks(count, before, width, groups)
            for before, width in zip([config.filters, *widths[:-1]], widths, strict=True)
        )
        self.conv_blocks = nn.ModuleList(
            CausalConv3d(width, width, 3, stride=2) if halve else nn.Identity()
            for width, halve in zip(widths[:-1], config.temporal_downsample, strict=True)
        )
        self.res_blocks = res_blocks(count, widths[-1], widths[-1], groups)
        self.norm1 = nn.GroupNorm(groups, widths[-1])
        self.conv2 = CausalConv3d(widths[-1], 2 * CHANNELS, 1)

    def forward(self, states: Tensor) -> Tensor:
        states = self.conv_in(states)
        for stage, blocks in enumerate(self.block_res_blocks):
            states = _in_a_row(blocks, states)
            if stage < len(self.conv_blocks):
                states = self.conv_blocks[stage](states)
        states = _in_a_row(self.res_blocks, states)
        return self.conv2(F.silu(self.norm1(states)))  # type: ignore[no-any-return]


class TemporalDecoder(nn.Module):
    """(B, 4, T, h, w) -> (B, 4, T · time factor, h, w). Stages are numbered as the encoder's and run backwards."""

    def __init__(self, config: VideoVAEConfig) -> None:
        super().__init__()
        widths = [config.filters * multiplier for multiplier in config.channel_multipliers]
        count, groups = config.num_res_blocks, config.num_groups
        self.conv1 = CausalConv3d(CHANNELS, widths[-1], 3)
        self.res_blocks = res_blocks(count, widths[-1], widths[-1], groups)
        self.block_res_blocks = nn.ModuleList(
            res_blocks(count, before, width, groups)
            for width, before in zip(widths, [*widths[1:], widths[-1]], strict=True)
        )
        self.conv_blocks = nn.ModuleList(
            CausalConv3d(width, 2 * width, 3) if double else nn.Identity()
            for width, double in zip(widths[1:], config.temporal_downsample, strict=True)
        )
        self.doubles = config.temporal_downsample
        self.norm1 = nn.GroupNorm(groups, widths[0])
        self.conv_out = CausalConv3d(widths[0], CHANNELS, 3)

    def forward(self, states: Tensor) -> Tensor:
        states = _in_a_row(self.res_blocks, self.conv1(states))
        for stage in reversed(range(len(self.block_res_blocks))):
            states = _in_a_row(self.block_res_blocks[stage], states)
            if stage and self.doubles[stage - 1]:
                states = frames_from_channels(self.conv_blocks[stage - 1](states))
        return self.conv_out(F.silu(self.norm1(states)))  # type: ignore[no-any-return]


def frames_from_channels(states: Tensor) -> Tensor:
    """(B, 2 C, T, h, w) -> (B, C, 2 T, h, w): neighbouring channels become neighbouring frames."""
    return torch.unflatten(states, 1, (-1, 2)).transpose(2, 3).flatten(2, 3)


class TemporalVAE(nn.Module):
    """Between the image VAE's latents of each frame and the latents of a video, one chunk at a time."""

    def __init__(self, config: VideoVAEConfig) -> None:
        super().__init__()
        self.time_factor = config.time_factor
        self.encoder = TemporalEncoder(config)
        self.quant_conv = CausalConv3d(2 * CHANNELS, 2 * CHANNELS, 1)
        self.post_quant_conv = CausalConv3d(CHANNELS, CHANNELS, 1)
        self.decoder = TemporalDecoder(config)

    def encode(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 4, T, h, w) -> mean and log variance of the latents, each (B, 4, ceil(T / time factor), h, w)."""
        padded = F.pad(states, (0, 0, 0, 0, -states.shape[2] % self.time_factor, 0))
        mean, logvar = self.quant_conv(self.encoder(padded)).chunk(2, dim=1)
        return mean, logvar.clamp(*LOGVAR_RANGE)

    def decode(self, latents: Tensor, frames: int) -> Tensor:
        """(B, 4, ceil(frames / time factor), h, w) -> (B, 4, frames, h, w)."""
        states = self.decoder(self.post_quant_conv(latents))
        return states[:, :, -frames % self.time_factor :]  # type: ignore[no-any-return]


class SpatialVAE(nn.Module):
    """diffusers' AutoencoderKL over every frame, a few at a time."""

    def __init__(self, config: VideoVAEConfig) -> None:
        super().__init__()
        self.module = AutoencoderKL.from_config(dict(config.spatial))

    def encode(self, video: Tensor, generator: torch.Generator | None = None, sample: bool = True) -> Tensor:
        """(B, 3, T, H, W) in -1 … 1 -> (B, 4, T, h, w)."""
        frames = video.transpose(1, 2)
        latents = []
        for some in torch.split(frames.flatten(0, 1), FRAMES_AT_A_TIME):
            distribution = self.module.encode(some).latent_dist
            latents.append(distribution.sample(generator) if sample else distribution.mode())
        scaled = torch.cat(latents) * SPATIAL_FACTOR
        return torch.unflatten(scaled, 0, frames.shape[:2]).transpose(1, 2)

    def decode(self, states: Tensor) -> Tensor:
        """(B, 4, T, h, w) -> (B, 3, T, H, W), about -1 … 1."""
        frames = states.transpose(1, 2)
        scaled = torch.split(frames.flatten(0, 1) / SPATIAL_FACTOR, FRAMES_AT_A_TIME)
        pixels = torch.cat([self.module.decode(some).sample for some in scaled])
        return torch.unflatten(pixels, 0, frames.shape[:2]).transpose(1, 2)


class VideoVAE(nn.Module):
    """Both stages; `scale` and `shift` bring the latents to about mean 0 and variance 1."""

    def __init__(self, config: VideoVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.spatial_vae = SpatialVAE(config)
        self.temporal_vae = TemporalVAE(config)
        # not buffers, as in the original, because what an export loads is parameters
        self.scale = nn.Parameter(torch.tensor([3.85, 2.32, 2.33, 3.06])[None, :, None, None, None], False)
        self.shift = nn.Parameter(torch.tensor([-0.10, 0.34, 0.27, 0.98])[None, :, None, None, None], False)

    def encode(self, video: Tensor, generator: torch.Generator | None = None, sample: bool = True) -> Tensor:
        """Video (B, 3, T, H, W) in -1 … 1 -> latents (B, 4, latent_frames(T), h, w); without `sample`, their means."""
        states = self.spatial_vae.encode(video, generator, sample)
        chunks = []
        for chunk in torch.split(states, self.config.micro_frame_size, dim=2):
            mean, logvar = self.temporal_vae.encode(chunk)
            if sample:
                noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
                mean = mean + (logvar / 2).exp() * noise
            chunks.append(mean)
        return (torch.cat(chunks, dim=2) - self.shift) / self.scale

    def decode(self, latents: Tensor, frames: int) -> Tensor:
        """Latents (B, 4, latent_frames(frames), h, w) -> video (B, 3, frames, H, W), about -1 … 1."""
        states = latents * self.scale + self.shift
        lengths = self._chunk_lengths(frames)
        chunks = zip(torch.split(states, self.config.micro_latents, dim=2), lengths, strict=True)
        return self.spatial_vae.decode(torch.cat([self.temporal_vae.decode(*chunk) for chunk in chunks], dim=2))

    def _chunk_lengths(self, frames: int) -> Iterator[int]:
        for start in range(0, frames, self.config.micro_frame_size):
            yield min(self.config.micro_frame_size, frames - start)


def _in_a_row(blocks: nn.Module, states: Tensor) -> Tensor:
    for block in blocks.children():
        states = block(states)
    return states
