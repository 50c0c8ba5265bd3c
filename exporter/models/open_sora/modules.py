"""The graphs of Open-Sora 1.2: modules of tensors alone, around the layers of STDiT3 and of the VAE.

What one bundle has fixed is constant in them: frames per second, the pixels that positions are scaled by, rotations.
Conditioning on given frames is left out, see stdit3: without given frames it changes nothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..base import bias_from_mask, mean_squared_change
from .schedule import rounded_pixels
from .stdit3 import (
    STDiT3,
    STDiT3Block,
    latents_from_patches,
    position_embedding,
    rotation_table,
    sinusoid,
)
from .vae import SPATIAL_FACTOR, VideoVAE


class Condition(nn.Module):
    """What no step changes.

    text_states (B, L, C); text_mask (B, L) int64, 1 at tokens; unconditional (B,) int64, 1 where a row reads the first
    L rows of the trained empty prompt instead -> text (B, L, D), text_bias (B, 1, 1, L). L is at most
    model_max_length.
    """

    def __init__(self, transformer: STDiT3) -> None:
        super().__init__()
        self.y_embedder = transformer.y_embedder

    def forward(self, text_states: Tensor, text_mask: Tensor, unconditional: Tensor) -> tuple[Tensor, Tensor]:
        text = self.y_embedder(text_states, unconditional)
        return text, bias_from_mask(text_mask, text.dtype)


class Prologue(nn.Module):
    """latents (B, C, T, h, w) fp32, timestep (B,) fp32 -> hidden (B, T, S, D), modulation (B, 6, D), time (B, D)."""

    def __init__(self, transformer: STDiT3, latents: tuple[int, ...], height: int, width: int, fps: float) -> None:
        """For latents (C, T, h, w) of a video of height x width pixels, as they were asked for."""
        super().__init__()
        self.x_embedder = transformer.x_embedder
        self.t_embedder = transformer.t_embedder
        self.fps_embedder = transformer.fps_embedder
        self.t_block = transformer.t_block
        config, dtype = transformer.config, transformer.x_embedder.proj.weight.dtype
        scale = math.sqrt(rounded_pixels(height, dtype) * rounded_pixels(width, dtype)) / config.input_sq_size
        positions = position_embedding(config.hidden_size, config.patches(*latents[2:]), scale, dtype)
        self.positions: Tensor
        self.register_buffer("positions", positions, persistent=False)
        self.speed: Tensor
        self.register_buffer("speed", sinusoid(torch.tensor([float(fps)])).to(dtype), persistent=False)

    def forward(self, latents: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dtype = self.positions.dtype
        hidden = self.x_embedder(latents.to(dtype)) + self.positions
        time = self.t_embedder(timestep.to(dtype)) + self.fps_embedder.mlp(self.speed)
        return hidden, self.t_block(time).unflatten(1, (6, -1)), time


class Block(nn.Module):
    """One spatial block, or with a rotation a temporal one.

    hidden (B, T, S, D); modulation (B, 6, D); cached_hidden (B, T, S, D); text (B, L, D); text_bias (B, 1, 1, L).
    Returns the new hidden and the mean squared change from cached_hidden, (B,) fp32.
    """

    def __init__(self, block: STDiT3Block, rotation: tuple[Tensor, Tensor] | None = None) -> None:
        """`rotation` is that of temporal_rotation()."""
        super().__init__()
        self.block = block
        cosine, sine = rotation or (None, None)
        self.cosine: Tensor | None
        self.register_buffer("cosine", cosine, persistent=False)
        self.sine: Tensor | None
        self.register_buffer("sine", sine, persistent=False)

    def forward(
        self, hidden: Tensor, modulation: Tensor, cached_hidden: Tensor, text: Tensor, text_bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        rotation = None if self.cosine is None or self.sine is None else (self.cosine, self.sine)
        new = self.block(hidden, modulation, text, text_bias, rotation)
        return new, mean_squared_change(new, cached_hidden)


def temporal_rotation(frequencies: Tensor, frames: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What temporal blocks rotate by, (frames, head dim) each, from the checkpoint's `rope.freqs`.

    Angles are computed in the model's dtype, as in the original.
    """
    return rotation_table(frequencies.detach().to(dtype), frames)


class Epilogue(nn.Module):
    """hidden (B, T, S, D), time (B, D) -> model_output (B, C, T, h, w) fp32: the velocity, without the variance."""

    def __init__(self, transformer: STDiT3, latents: tuple[int, ...]) -> None:
        """For latents (C, T, h, w)."""
        super().__init__()
        self.final_layer = transformer.final_layer
        self.channels, _, self.height, self.width = latents
        self.size = transformer.config.patches(self.height, self.width)
        self.patch = transformer.config.patch_size[1:]
        self.outputs = transformer.config.out_channels

    def forward(self, hidden: Tensor, time: Tensor) -> Tensor:
        patches = self.final_layer(hidden, time)
        velocity = patches.unflatten(-1, (-1, self.outputs))[..., : self.channels].flatten(-2)
        output = latents_from_patches(velocity, self.size, self.patch)
        return output[..., : self.height, : self.width].float()


class TemporalDecoder(nn.Module):
    """One chunk of a video's latents (4, n, h, w) fp32 -> latents of each of its frames, (F, 4, h, w) fp32."""

    def __init__(self, vae: VideoVAE, frames: int) -> None:
        """For chunks of `frames` frames, which are n = ceil(frames / time factor) latents."""
        super().__init__()
        self.scale = vae.scale
        self.shift = vae.shift
        self.post_quant_conv = vae.temporal_vae.post_quant_conv
        self.decoder = vae.temporal_vae.decoder
        self.padding = -frames % vae.config.time_factor  # frames that encoding put in front

    def forward(self, latents: Tensor) -> Tensor:
        scaled = latents[None].to(self.scale.dtype) * self.scale + self.shift
        states = self.decoder(self.post_quant_conv(scaled))[0, :, self.padding :]
        return states.transpose(0, 1).float()  # type: ignore[no-any-return]


class SpatialDecoder(nn.Module):
    """latents (N, 4, h, w) fp32 of N frames -> frames (N, H, W, 3) uint8, frame_means (N,) fp32."""

    def __init__(self, vae: VideoVAE) -> None:
        super().__init__()
        module = vae.spatial_vae.module
        self.post_quant_conv = module.post_quant_conv if module.config.use_post_quant_conv else nn.Identity()
        self.decoder = module.decoder

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        scaled = latents.to(self.decoder.conv_in.weight.dtype) / SPATIAL_FACTOR
        pixels = self.decoder(self.post_quant_conv(scaled)).float().permute(0, 2, 3, 1)
        shades = (pixels.clamp(-1, 1) + 1) / 2 * 255
        # rounded half up, as in the original; the cast is last: TensorRT has uint8 at the border of a graph only
        return (shades + 0.5).floor().to(torch.uint8), pixels.mean((1, 2, 3))
