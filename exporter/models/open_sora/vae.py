"""The VAE of Open-Sora 1.2: an image VAE over each frame, then a causal VAE over time.

Names and shapes of the weights are the original's. Time is cut into chunks of 17 frames that know nothing of each
other, each of which becomes 5 latents: the front is filled up with zeros to 20 frames, which decoding drops again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from ....engines.errors import CheckpointError

CHANNELS = 4  # of the latents, between the two stages and at the end
SPATIAL_FACTOR = 0.18215  # what the image VAE's latents are multiplied by
FRAMES_AT_A_TIME = 4  # through the image VAE
LOGVAR_RANGE = (-30.0, 20.0)
# Published checkpoints name the image VAE's configuration by this repository instead of holding it.
SDXL_VAE: Mapping[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": CHANNELS,
    "norm_num_groups": 32,
}
SDXL_VAE_SOURCE = "PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers"

# Settings of training and of Hugging Face's bookkeeping. The weights hold scale and shift of their own.
IGNORED = frozenset(
    {
        "_name_or_path",
        "architectures",
        "auto_map",
        "cal_loss",
        "dtype",
        "freeze_vae_2d",
        "from_pretrained",
        "scale",
        "shift",
        "torch_dtype",
        "transformers_version",
    }
)
IGNORED_SPATIAL = frozenset({"cache_dir", "local_files_only", "micro_batch_size", "subfolder"})
FIXED_TEMPORAL: Mapping[str, object] = {
    "activation_fn": "swish",
    "embed_dim": CHANNELS,
    "from_pretrained": None,
    "in_out_channels": CHANNELS,
    "latent_embed_dim": CHANNELS,
}


@dataclass(frozen=True)
class VideoVAEConfig:
    """What shapes the VAE; defaults are those of VAE 1.2. `spatial` is the config of diffusers' AutoencoderKL."""

    spatial: Mapping[str, Any] = field(default_factory=lambda: SDXL_VAE)
    filters: int = 128
    num_res_blocks: int = 4
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 4)
    temporal_downsample: tuple[bool, ...] = (False, True, True)  # whether time is halved after a stage
    num_groups: int = 32  # of the temporal VAE's group normalisation
    micro_frame_size: int = 17  # frames in a chunk

    def __post_init__(self) -> None:
        sizes = (self.filters, self.num_res_blocks, self.num_groups, self.micro_frame_size, *self.channel_multipliers)
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            raise CheckpointError(
                f"VAE: got the sizes {list(sizes)}, expected whole numbers above 0; check config.json"
            )
        if len(self.temporal_downsample) != len(self.channel_multipliers) - 1:
            raise CheckpointError(
                f"VAE temporal_downsample: got {len(self.temporal_downsample)} values, expected "
                f"{len(self.channel_multipliers) - 1}, one between any two channel_multipliers; check config.json"
            )
        if self.spatial.get("latent_channels") != CHANNELS:
            raise CheckpointError(
                f"VAE latent_channels: got {self.spatial.get('latent_channels')}, expected {CHANNELS}; this kind is "
                "not supported"
            )

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> VideoVAEConfig:
        """Read the content of `config.json`. Raises CheckpointError for what is unknown or not implemented.

        `vae_2d` may hold a `config` of diffusers' AutoencoderKL, which is for small checkpoints; published ones leave
        it to the repository that the image VAE came from. `vae_temporal` has the sizes where its type is VAE_Temporal.
        """
        _refuse_unknown("", config, IGNORED | {"model_type", "micro_frame_size", "vae_2d", "vae_temporal"})
        spatial, temporal = config.get("vae_2d") or {}, config.get("vae_temporal") or {}
        _require_one_of("model_type", config.get("model_type"), "VideoAutoencoderPipeline")
        _require_one_of("vae_2d type", spatial.get("type"), "VideoAutoencoderKL")
        _require_one_of("vae_temporal type", temporal.get("type"), "VAE_Temporal_SD", "VAE_Temporal")
        _refuse_unknown("vae_2d ", spatial, IGNORED_SPATIAL | {"type", "from_pretrained", "config"})
        if "config" not in spatial:
            _require_one_of("vae_2d from_pretrained", spatial.get("from_pretrained"), SDXL_VAE_SOURCE)
        sizes = _temporal_sizes(temporal)
        if config.get("micro_frame_size") is not None:  # the original, too, takes 17 whatever is written there
            sizes["micro_frame_size"] = config["micro_frame_size"]
        return cls(spatial=spatial.get("config", SDXL_VAE), **sizes)

    @property
    def time_factor(self) -> int:
        """Frames to a latent."""
        return int(2 ** sum(self.temporal_downsample))

    @property
    def space_factor(self) -> int:
        """Pixels to a latent, along each side."""
        return int(2 ** (len(self.spatial["block_out_channels"]) - 1))

    @property
    def micro_latents(self) -> int:
        """Latents of a whole chunk."""
        return -(-self.micro_frame_size // self.time_factor)

    def latent_frames(self, frames: int) -> int:
        """Latents of a video of that many frames: whole chunks, then what remains, rounded up."""
        chunks, rest = divmod(frames, self.micro_frame_size)
        return chunks * self.micro_latents + -(-rest // self.time_factor)


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


def _refuse_unknown(where: str, config: Mapping[str, Any], known: frozenset[str]) -> None:
    for key in config.keys() - known:
        raise CheckpointError(f"VAE {where}{key}: got an unknown setting, expected those of Open-Sora 1.2; remove it")


def _require_one_of(what: str, got: object, *expected: str) -> None:
    if got not in expected:
        raise CheckpointError(f"VAE {what}: got {got!r}, expected {' or '.join(expected)}; this kind is not supported")


def _temporal_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    names = {"filters", "num_res_blocks", "channel_multipliers", "temporal_downsample", "num_groups"}
    if config["type"] == "VAE_Temporal_SD":
        names = {"num_groups"}  # the one size that type can be given
    elif "temporal_downsample" not in config:
        raise CheckpointError("VAE vae_temporal temporal_downsample: got none, expected true or false for each stage")
    _refuse_unknown("vae_temporal ", config, frozenset(names | {"type"} | FIXED_TEMPORAL.keys()))
    for key, expected in FIXED_TEMPORAL.items():
        if config.get(key, expected) != expected:
            raise CheckpointError(f"VAE vae_temporal {key}: got {config[key]!r}, expected {expected!r}; not supported")
    sizes = {key: value for key, value in config.items() if key in names}
    return {key: tuple(value) if isinstance(value, list) else value for key, value in sizes.items()}
