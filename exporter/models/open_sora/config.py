"""What the `config.json` files of Open-Sora 1.2 say, of STDiT3 and of the VAE, as far as it changes what is computed.

A setting that is unknown, or that the modules do not implement, is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ....engines.errors import CheckpointError

CHANNELS = 4  # of the latents, between the VAE's two stages and at the end

# Settings of training, of the original's kernels and of Hugging Face's own bookkeeping.
TRANSFORMER_IGNORED = frozenset(
    {
        "_name_or_path",
        "architectures",
        "auto_map",
        "class_dropout_prob",
        "drop_path",
        "dtype",
        "enable_flash_attn",
        "enable_layernorm_kernel",
        "enable_sequence_parallelism",
        "force_huggingface",
        "freeze_y_embedder",
        "input_size",
        "only_train_temporal",
        "torch_dtype",
        "transformers_version",
    }
)
# Settings of which one value is implemented: the one that every published STDiT3 has.
TRANSFORMER_FIXED: Mapping[str, object] = {
    "model_type": "STDiT3",
    "qk_norm": True,
    "qk_norm_legacy": False,
    "skip_y_embedder": False,
}

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
VAE_IGNORED = frozenset(
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
SPATIAL_IGNORED = frozenset({"cache_dir", "local_files_only", "micro_batch_size", "subfolder"})
TEMPORAL_FIXED: Mapping[str, object] = {
    "activation_fn": "swish",
    "embed_dim": CHANNELS,
    "from_pretrained": None,
    "in_out_channels": CHANNELS,
    "latent_embed_dim": CHANNELS,
}


@dataclass(frozen=True)
class STDiT3Config:
    """The original's `config.json`, as far as it changes what is computed; defaults are those of STDiT3-XL/2."""

    hidden_size: int = 1152
    depth: int = 28  # pairs of blocks
    num_heads: int = 16
    mlp_ratio: float = 4.0
    in_channels: int = 4
    pred_sigma: bool = True  # twice as many channels out as in; sampling reads the first half
    patch_size: tuple[int, int, int] = (1, 2, 2)  # frames, rows, columns
    caption_channels: int = 4096
    model_max_length: int = 300  # tokens
    input_sq_size: int = 512  # pixels: side of the square at which positions are whole numbers

    def __post_init__(self) -> None:
        for setting in fields(self):
            value = getattr(self, setting.name)
            kinds = (int, float) if setting.name == "mlp_ratio" else int
            lowest = 0 if setting.name == "pred_sigma" else 1
            numbers = value if isinstance(value, tuple) else (value,)
            if not all(isinstance(number, kinds) and number >= lowest for number in numbers):
                raise CheckpointError(
                    f"STDiT3 {setting.name}: got {value!r}, expected {lowest} or more; check config.json"
                )
        if not isinstance(self.patch_size, tuple) or len(self.patch_size) != 3 or self.patch_size[0] != 1:
            raise CheckpointError(
                f"STDiT3 patch_size: got {self.patch_size!r}, expected [1, height, width], as in all published ones"
            )
        if self.hidden_size % self.num_heads or self.head_dim % 2 or self.hidden_size % 4:
            raise CheckpointError(
                f"STDiT3 hidden_size: got {self.hidden_size} for {self.num_heads} heads, expected a multiple of 4 and "
                "of twice the heads; check config.json"
            )

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> STDiT3Config:
        """Read the content of `config.json`. Raises CheckpointError for what is unknown or not implemented."""
        names = {setting.name for setting in fields(cls)}
        for key, value in config.items():
            if key in TRANSFORMER_FIXED and value != TRANSFORMER_FIXED[key]:
                raise CheckpointError(
                    f"STDiT3 {key}: got {value!r}, expected {TRANSFORMER_FIXED[key]!r}; this kind is not supported"
                )
            if key not in names | TRANSFORMER_IGNORED | TRANSFORMER_FIXED.keys():
                raise CheckpointError(
                    f"STDiT3 {key}: got an unknown setting, expected those of Open-Sora 1.2; remove it"
                )
        known = {key: value for key, value in config.items() if key in names}
        if isinstance(known.get("patch_size"), list):
            known["patch_size"] = tuple(known["patch_size"])
        return cls(**known)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.pred_sigma else 1)

    def patches(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches over latents of that size; the last ones may hang over the edge."""
        return -(-height // self.patch_size[1]), -(-width // self.patch_size[2])


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
        _refuse_unknown("", config, VAE_IGNORED | {"model_type", "micro_frame_size", "vae_2d", "vae_temporal"})
        spatial, temporal = config.get("vae_2d") or {}, config.get("vae_temporal") or {}
        _require_one_of("model_type", config.get("model_type"), "VideoAutoencoderPipeline")
        _require_one_of("vae_2d type", spatial.get("type"), "VideoAutoencoderKL")
        _require_one_of("vae_temporal type", temporal.get("type"), "VAE_Temporal_SD", "VAE_Temporal")
        _refuse_unknown("vae_2d ", spatial, SPATIAL_IGNORED | {"type", "from_pretrained", "config"})
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
    _refuse_unknown("vae_temporal ", config, frozenset(names | {"type"} | TEMPORAL_FIXED.keys()))
    for key, expected in TEMPORAL_FIXED.items():
        if config.get(key, expected) != expected:
            raise CheckpointError(f"VAE vae_temporal {key}: got {config[key]!r}, expected {expected!r}; not supported")
    sizes = {key: value for key, value in config.items() if key in names}
    return {key: tuple(value) if isinstance(value, list) else value for key, value in sizes.items()}
