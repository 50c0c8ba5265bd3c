"""CogVideoX's VAE decoder, a few latent frames at a time; what its causal convolutions remember are tensors.

It computes what AutoencoderKLCogVideoX.decode computes, in the same chunks, because a group norm sees one chunk at a
time. It differs in how: the latents that condition every norm are enlarged once per size, not once per norm, and no
convolution splits its input, which the original does from 2 GB on.
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import (
    CogVideoXCausalConv3d,
    CogVideoXDecoder3D,
    CogVideoXResnetBlock3D,
    CogVideoXSpatialNorm3D,
)
from diffusers.models.upsampling import CogVideoXUpsample3D
from torch import Tensor, nn

from ....engines.errors import CheckpointError, InvalidRequest
from ....engines.manifest import Dtype, Shape
from ...checkpoint import Checkpoint
from ..base import StagePlan
from ..causal import REMEMBERED, WithNamedArguments, causal_stage
from ..parts import frames_from_pixels

CHUNK = 2  # latent frames, AutoencoderKLCogVideoX.num_latent_frames_batch_size


class ChunkDecoder(nn.Module):
    """latents (T, C, h, w) fp32 of one chunk -> frames (G, H, W, 3) uint8, new_state_000 …, frame_means (G,) fp32.

    What is new is for the next chunk.
    The state is one tensor per causal convolution, in the order in which they run: the last two frames that it saw,
    (channels, 2, h, s, w, s) in the VAE's dtype, where those are s times as high and wide as the latents. Every chunk
    but the `first` is also given the state, state_000 …, that the one before it left. Where there is `only` one chunk,
    none is returned.
    """

    def __init__(self, vae: AutoencoderKLCogVideoX, first: bool, only: bool = False) -> None:
        super().__init__()
        self.only = only
        self.decoder = vae.decoder
        self.scaling = float(vae.config.scaling_factor)
        self.paths = [name for name, layer in self.decoder.named_modules() if _remembers(layer)]
        states = () if first else (f"state_{index:03d}" for index in range(len(self.paths)))
        self.forward = WithNamedArguments(self.decode, ("latents", *states))

    def decode(self, latents: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """What `forward` does."""
        pixels, *new = self.pixels(latents, *state)
        frames, means = frames_from_pixels(_frames_first(pixels))
        return frames, *([] if self.only else new), means

    def pixels(self, latents: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """The frames before they are rounded, (3, G, H, W) about -1 … 1 in the VAE's dtype, and the new state."""
        chunk = _Chunk(self._unscaled(latents), state)
        return chunk.decode(self.decoder)[0], *chunk.new_state

    def reference(self, latents: Tensor, **state: Tensor) -> tuple[Tensor, ...]:
        """The same by the original decoder's own forward."""
        cache: dict[str, Any] = {}
        for name, frames in zip(self.paths if state else (), state.values(), strict=True):
            *branches, leaf = _cache_keys(name)
            branch = cache
            for key in branches:
                branch = branch.setdefault(key, {})
            branch[leaf] = frames.flatten(4, 5).flatten(2, 3)[None]
        pixels, cache = self.decoder(self._unscaled(latents), conv_cache=cache)
        new = []
        for name in self.paths:
            kept: Any = functools.reduce(operator.getitem, _cache_keys(name), cache)
            new.append(kept[0].unflatten(2, (latents.shape[2], -1)).unflatten(4, (latents.shape[3], -1)))
        frames, means = frames_from_pixels(_frames_first(pixels[0]))
        return frames, *([] if self.only else new), means

    @torch.no_grad()
    def state_sizes(self) -> list[tuple[int, int]]:
        """Channels and s of every tensor of the state, in order."""
        weight = self.decoder.conv_in.conv.weight
        smallest = torch.zeros(CHUNK, weight.shape[1], 1, 1, device=weight.device)
        return [(frames.shape[0], frames.shape[3]) for frames in self.pixels(smallest)[1:]]

    def _unscaled(self, latents: Tensor) -> Tensor:
        return (latents.transpose(0, 1)[None] / self.scaling).to(self.decoder.conv_in.conv.weight.dtype)


def _remembers(layer: nn.Module) -> bool:
    return isinstance(layer, CogVideoXCausalConv3d) and layer.time_kernel_size > 1


def _cache_keys(name: str) -> list[str]:
    """Where the original decoder keeps a layer's state: up_blocks.0.resnets.1.conv1 -> up_block_0, resnet_1, conv1."""
    return re.sub(r"(\w+)s\.(\d+)", r"\1_\2", name).split(".")


class _Chunk:
    """One chunk on its way through the decoder, (1, channels, frames, height, width) all along."""

    def __init__(self, latents: Tensor, state: Sequence[Tensor]) -> None:
        self.latents = latents  # as long, high and wide as what is being decoded
        self.state = state
        self.new_state: list[Tensor] = []
        self.height, self.width = latents.shape[3:]
        self.scale = 1

    def decode(self, decoder: CogVideoXDecoder3D) -> Tensor:
        hidden = self._convolve(decoder.conv_in, self.latents)
        for resnet in decoder.mid_block.resnets:
            hidden = self._resnet(resnet, hidden)
        for block in decoder.up_blocks:
            for resnet in block.resnets:
                hidden = self._resnet(resnet, hidden)
            for upsampler in block.upsamplers or ():
                hidden = self._upsample(upsampler, hidden)
        hidden = decoder.conv_act(self._norm(decoder.norm_out, hidden))
        return self._convolve(decoder.conv_out, hidden)

    def _resnet(self, resnet: CogVideoXResnetBlock3D, hidden: Tensor) -> Tensor:
        change = self._convolve(resnet.conv1, resnet.nonlinearity(self._norm(resnet.norm1, hidden)))
        change = self._convolve(resnet.conv2, resnet.nonlinearity(self._norm(resnet.norm2, change)))
        if resnet.in_channels != resnet.out_channels:
            hidden = _convolve(resnet.conv_shortcut, hidden)
        return hidden + change

    def _norm(self, norm: CogVideoXSpatialNorm3D, hidden: Tensor) -> Tensor:
        scale, shift = (_convolve(layer.conv, self.latents) for layer in (norm.conv_y, norm.conv_b))
        normed: Tensor = norm.norm_layer(hidden) * scale + shift
        return normed

    def _convolve(self, layer: CogVideoXCausalConv3d, hidden: Tensor) -> Tensor:
        channels, frames, height, width = hidden.shape[1:]
        if self.state:
            before = [self.state[len(self.new_state)].reshape(1, channels, REMEMBERED, height, width)]
        else:
            before = [hidden[:, :, :1]] * REMEMBERED
        seen = torch.cat([*before, hidden], 2)
        by_latent = (channels, REMEMBERED, self.height, self.scale, self.width, self.scale)
        self.new_state.append(seen[:, :, frames:].reshape(by_latent))
        return _convolve(layer.conv, seen)

    def _upsample(self, upsampler: CogVideoXUpsample3D, hidden: Tensor) -> Tensor:
        self.scale *= 2
        self.latents = double(self.latents, upsampler.compress_time)
        frames = double(hidden, upsampler.compress_time)[0].transpose(0, 1)
        convolved: Tensor = upsampler.conv(frames).transpose(0, 1)[None]
        return convolved


def _convolve(layer: nn.Conv3d, hidden: Tensor) -> Tensor:
    return nn.Conv3d.forward(layer, hidden)  # past CogVideoXSafeConv3d's, which splits by size


def double(hidden: Tensor, time: bool) -> Tensor:
    """Every pixel of (1, channels, frames, height, width) as 2 x 2, and if `time`, every frame as two.

    But the first of an odd number of frames stays one: only the first chunk has such, and the video begins with it.
    """
    _, channels, frames, height, width = hidden.shape
    hidden = hidden[..., None, :, None].expand(-1, -1, -1, -1, 2, -1, 2)
    hidden = hidden.reshape(1, channels, frames, height * 2, width * 2)
    if not time or frames == 1:
        return hidden
    first = frames % 2
    rest = hidden[:, :, first:, None].expand(-1, -1, -1, 2, -1, -1).flatten(2, 3)
    return torch.cat([hidden[:, :, :1], rest], 2) if first else rest


def _frames_first(pixels: Tensor) -> Tensor:
    """(3, G, H, W) -> (G, H, W, 3) fp32."""
    return pixels.float().permute(1, 2, 3, 0)


def decoder_stage(vae: AutoencoderKLCogVideoX, shape: Shape, dtype: Dtype) -> StagePlan:
    """The decoder of videos of that shape: the first chunk, and all later ones, which are given a state."""
    chunks, ratio = chunk_lengths(shape.latents[0]), vae.config.temporal_compression_ratio
    return causal_stage(
        lambda first, only: ChunkDecoder(vae, first, only),
        shape,
        dtype,
        axis=0,
        chunks=chunks,
        frames=(chunk_frames(chunks[0], ratio), chunk_frames(CHUNK, ratio)),
    )


def chunk_lengths(latent_frames: int) -> tuple[int, ...]:
    """How many latent frames each chunk has: two, but the first takes the odd one as well."""
    chunks = max(latent_frames // CHUNK, 1)
    return (latent_frames - CHUNK * (chunks - 1), *[CHUNK] * (chunks - 1))


def chunk_frames(length: int, ratio: int) -> int:
    """The frames that a chunk of `length` latent frames is decoded to; `ratio` is the VAE's temporal compression."""
    return length * ratio if length % 2 == 0 else (length - 1) * ratio + 1


def count_latent_frames(frames: int, ratio: int) -> int:
    """The latent frames for a video of `frames`, as CogVideoXPipeline counts them.

    Raises InvalidRequest where these are decoded to more or fewer frames than were asked for.
    """
    latent_frames = (frames - 1) // ratio + 1
    decoded = sum(chunk_frames(length, ratio) for length in chunk_lengths(latent_frames))
    if decoded != frames:
        unit = CHUNK * ratio
        below = frames // unit * unit
        raise InvalidRequest(
            f"frames: got {frames}, which the VAE decodes to {decoded}, expected a multiple of {unit} or one more; "
            f"choose {below + 1} or {below + unit}"
        )
    return latent_frames


def check_vae(checkpoint: Checkpoint, vae: AutoencoderKLCogVideoX) -> None:
    """Refuse configurations in which diffusers does not compute what they say. Raises CheckpointError."""
    ratio, upsamplers = vae.config.temporal_compression_ratio, len(vae.config.block_out_channels) - 1
    possible = [2**doubled for doubled in range(upsamplers + 1)]
    if ratio not in possible:
        raise CheckpointError(
            f"checkpoint {checkpoint.name}: vae temporal_compression_ratio is {ratio}, expected one of "
            f"{', '.join(map(str, possible))}, as it has {upsamplers + 1} blocks; correct its config.json"
        )
    if vae.config.use_post_quant_conv:
        raise CheckpointError(
            f"checkpoint {checkpoint.name}: vae use_post_quant_conv is True, expected False, as every published "
            "CogVideoX has"
        )
