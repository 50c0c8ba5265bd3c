"""Wan's VAE decoder, one latent frame at a time; what its causal convolutions remember are tensors.

It computes what AutoencoderKLWan.decode computes, for both kinds: Wan 2.1's, and Wan 2.2's with residual shortcuts
and patches of pixels. It differs in how. The original has three cases for what a convolution remembers, and here there
is one: before the first frame come two of zeros, also for the convolutions that double the frames, which the first
frame passes by. And the two factors of a norm are multiplied with each other before they are with every pixel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    DupUp3D,
    WanAttentionBlock,
    WanCausalConv3d,
    WanDecoder3d,
    WanResample,
    WanResidualBlock,
    WanRMS_norm,
    unpatchify,
)
from torch import Tensor, nn

from ....engines.errors import CheckpointError, InvalidRequest
from ....engines.manifest import Dtype, Shape
from ...checkpoint import Checkpoint
from ..base import StagePlan
from ..causal import REMEMBERED, WithNamedArguments, causal_stage
from ..parts import frames_from_pixels


class FrameDecoder(nn.Module):
    """latents (C, 1, h, w) fp32 of a frame -> frames (G, H, W, 3) uint8, new_state_000 …, frame_means (G,) fp32.

    The first latent frame makes one frame, every other as many as the VAE compresses to one. The state is as in
    causal.py; all but the `first` are given the one before. Where there is an `only` one, none is returned.
    """

    def __init__(self, vae: AutoencoderKLWan, first: bool, only: bool = False) -> None:
        super().__init__()
        self.only = only
        self.post_quant_conv = vae.post_quant_conv
        self.decoder = vae.decoder
        self.patch = vae.config.patch_size or 1
        for name in ("mean", "std"):
            values = torch.tensor(vae.config[f"latents_{name}"], dtype=torch.float32)
            self.register_buffer(name, values.view(-1, 1, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor
        self.remembering = sum(_remembers(layer) for layer in self.decoder.modules())
        states = () if first else (f"state_{index:03d}" for index in range(self.remembering))
        self.forward = WithNamedArguments(self.decode, ("latents", *states))

    def decode(self, latents: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """What `forward` does."""
        pixels, *new = self.pixels(latents, *state)
        return self._result(pixels, new)

    def pixels(self, latents: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """The frames before they are rounded, (1, 3, G, H, W) about -1 … 1 in the VAE's dtype, and the new state."""
        frame = _Frame(latents, state)
        hidden = frame.decode(self.decoder, self._unscaled(latents))
        return unpatched(hidden, self.patch), *frame.new_state

    def reference(self, latents: Tensor, **state: Tensor) -> tuple[Tensor, ...]:
        """The same by the original decoder's own forward."""
        cache: list[Any] = [None] * self.remembering
        for index, frames in enumerate(state.values()):
            cache[index] = frames.flatten(4, 5).flatten(2, 3)[None]
        hidden = self.decoder(self._unscaled(latents), feat_cache=cache, feat_idx=[0], first_chunk=not state)
        new = []
        for frames, (channels, s) in zip(cache, () if self.only else self.state_sizes(), strict=not self.only):
            new.append(torch.zeros(channels, REMEMBERED, latents.shape[2], s, latents.shape[3], s, dtype=hidden.dtype))
            if isinstance(frames, Tensor):  # else the first frame passed by
                new[-1][:, -frames.shape[2] :] = torch.unflatten(torch.unflatten(frames[0], 3, (-1, s)), 2, (-1, s))
        return self._result(unpatchify(hidden, self.patch), new)

    def _unscaled(self, latents: Tensor) -> Tensor:
        scaled = (latents * self.std + self.mean)[None].to(self.post_quant_conv.weight.dtype)
        unscaled: Tensor = self.post_quant_conv(scaled)
        return unscaled

    def _result(self, pixels: Tensor, new: Sequence[Tensor]) -> tuple[Tensor, ...]:
        frames, means = frames_from_pixels(pixels[0].float().permute(1, 2, 3, 0))
        return frames, *([] if self.only else new), means

    @torch.no_grad()
    def state_sizes(self) -> list[tuple[int, int]]:
        """Channels and s of every tensor of the state, in order."""
        weight = self.post_quant_conv.weight
        smallest = weight.new_zeros(1, weight.shape[1], 1, 1, 1)
        frame = _Frame(smallest[0], ())
        frame.decode(self.decoder, smallest)
        return [(frames.shape[0], frames.shape[3]) for frames in frame.new_state]


def _remembers(layer: nn.Module) -> bool:
    return isinstance(layer, WanCausalConv3d) and layer.kernel_size[0] > 1


class _Frame:
    """One latent frame on its way through the decoder, (1, channels, frames, height, width) all along."""

    def __init__(self, latents: Tensor, state: Sequence[Tensor]) -> None:
        self.state = state
        self.new_state: list[Tensor] = []
        self.height, self.width = latents.shape[2:]
        self.scale = 1

    def decode(self, decoder: WanDecoder3d, hidden: Tensor) -> Tensor:
        hidden = self._convolve(decoder.conv_in, hidden)
        hidden = self._resnet(decoder.mid_block.resnets[0], hidden)
        for attention, resnet in zip(decoder.mid_block.attentions, decoder.mid_block.resnets[1:], strict=True):
            hidden = self._resnet(resnet, attend(attention, hidden))
        for block in decoder.up_blocks:
            hidden = self._up(block, hidden)
        hidden = decoder.nonlinearity(normed(decoder.norm_out, hidden))
        return self._convolve(decoder.conv_out, hidden)

    def _up(self, block: Any, hidden: Tensor) -> Tensor:
        before = hidden
        for resnet in block.resnets:
            hidden = self._resnet(resnet, hidden)
        shortcut = getattr(block, "avg_shortcut", None)
        for upsampler in (block.upsampler,) if hasattr(block, "upsampler") else block.upsamplers or ():
            if upsampler is not None:
                hidden = self._upsample(upsampler, hidden)
        return hidden if shortcut is None else hidden + self._duplicated(shortcut, before)

    def _resnet(self, resnet: WanResidualBlock, hidden: Tensor) -> Tensor:
        change = self._convolve(resnet.conv1, resnet.nonlinearity(normed(resnet.norm1, hidden)))
        change = self._convolve(resnet.conv2, resnet.nonlinearity(normed(resnet.norm2, change)))
        shortcut: Tensor = resnet.conv_shortcut(hidden)
        return change + shortcut

    def _upsample(self, upsampler: WanResample, hidden: Tensor) -> Tensor:
        if upsampler.mode == "upsample3d":
            hidden = self._twice_the_frames(upsampler.time_conv, hidden)
        self.scale *= 2
        _, channels, frames, height, width = hidden.shape
        hidden = hidden[0, ..., None, :, None].expand(-1, -1, -1, 2, -1, 2)
        hidden = hidden.reshape(channels, frames, height * 2, width * 2).transpose(0, 1)
        convolved: Tensor = upsampler.resample[1](hidden).transpose(0, 1)[None]
        return convolved

    def _twice_the_frames(self, layer: WanCausalConv3d, hidden: Tensor) -> Tensor:
        if not self.state:
            self._remember(torch.zeros_like(hidden).expand(-1, -1, REMEMBERED, -1, -1))
            return hidden
        pairs = torch.unflatten(self._convolve(layer, hidden), 1, (2, -1))
        return pairs.movedim(1, 3).flatten(2, 3)

    def _duplicated(self, shortcut: DupUp3D, hidden: Tensor) -> Tensor:
        time, space = shortcut.factor_t, shortcut.factor_s
        hidden = hidden[:, :, None].expand(-1, -1, shortcut.repeats, -1, -1, -1).flatten(1, 2)
        hidden = torch.unflatten(hidden, 1, (-1, time, space, space)).permute(0, 1, 5, 2, 6, 3, 7, 4)
        frames = hidden.flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return frames if self.state else frames[:, :, time - 1 :]

    def _convolve(self, layer: WanCausalConv3d, hidden: Tensor) -> Tensor:
        _, channels, frames, height, width = hidden.shape
        if self.state:
            before = self.state[len(self.new_state)].reshape(1, channels, REMEMBERED, height, width)
            seen = torch.cat([before, hidden], 2)
        else:
            seen = F.pad(hidden, (0, 0, 0, 0, REMEMBERED, 0))
        self._remember(seen[:, :, frames:])
        wide, _, high, *_ = layer._padding
        return F.conv3d(seen, layer.weight, layer.bias, padding=(0, high, wide))

    def _remember(self, frames: Tensor) -> None:
        by_latent = (frames.shape[1], REMEMBERED, self.height, self.scale, self.width, self.scale)
        self.new_state.append(frames.reshape(by_latent))


def attend(layer: WanAttentionBlock, hidden: Tensor) -> Tensor:
    """Every pixel of (1, channels, frames, height, width) attends to its own frame, with one head."""
    frames, size = hidden[0].transpose(0, 1), hidden.shape[3:]
    states = layer.to_qkv(normed(layer.norm, frames))
    query, key, value = states.flatten(2).transpose(1, 2)[:, None].chunk(3, -1)  # (frames, 1, pixels, channels)
    attended = F.scaled_dot_product_attention(query, key, value)
    change: Tensor = layer.proj(torch.unflatten(attended[:, 0].transpose(1, 2), -1, size))
    return hidden + change.transpose(0, 1)[None]


def normed(norm: WanRMS_norm, hidden: Tensor) -> Tensor:
    """Every pixel's channels, dimension 1, divided by their root mean square, in fp32; then weighted."""
    wide = hidden.float()
    lengths = wide.norm(dim=1, keepdim=True).clamp_min(1e-12)
    weighted: Tensor = (wide / lengths).to(hidden.dtype) * (norm.gamma * norm.scale)
    return weighted


def unpatched(hidden: Tensor, patch: int) -> Tensor:
    """(1, channels x patch x patch, frames, height, width) to patches of pixels; widths vary faster than heights."""
    if patch == 1:
        return hidden
    patches = torch.unflatten(hidden, 1, (-1, patch, patch)).permute(0, 1, 4, 5, 3, 6, 2)
    return patches.flatten(5, 6).flatten(3, 4)


def decoder_stage(vae: AutoencoderKLWan, shape: Shape, dtype: Dtype) -> StagePlan:
    """The decoder of videos of that shape: the first latent frame, and all later ones, which are given a state."""
    return causal_stage(
        lambda first, only: FrameDecoder(vae, first, only),
        shape,
        dtype,
        axis=1,
        chunks=(1,) * shape.latents[1],
        frames=(1, vae.config.scale_factor_temporal),
    )


def count_latent_frames(frames: int, ratio: int) -> int:
    """The latent frames for a video of `frames`. Raises InvalidRequest for other than one more than a multiple."""
    if (frames - 1) % ratio:
        below = (frames - 1) // ratio * ratio + 1
        raise InvalidRequest(
            f"frames: got {frames}, expected one more than a multiple of {ratio}; choose {below} or {below + ratio}"
        )
    return (frames - 1) // ratio + 1


def check_vae(checkpoint: Checkpoint, vae: AutoencoderKLWan) -> None:
    """Refuse configurations that contradict themselves. Raises CheckpointError."""
    config, patch = vae.config, vae.config.patch_size or 1
    for name in ("latents_mean", "latents_std"):
        count = len(config[name] or ())
        if count != config.z_dim:
            raise CheckpointError(
                f"checkpoint {checkpoint.name}: vae {name} has {count} numbers, expected {config.z_dim}, one of each "
                "channel of its latents; correct its config.json"
            )
    for name, expected in (
        ("scale_factor_spatial", 2 ** (len(config.dim_mult) - 1) * patch),
        ("scale_factor_temporal", 2 ** sum(config.temperal_downsample)),
        ("out_channels", 3 * patch**2),
    ):
        if config[name] != expected:
            raise CheckpointError(
                f"checkpoint {checkpoint.name}: vae {name} is {config[name]}, expected {expected}, as its blocks and "
                "patch_size make; correct its config.json"
            )
