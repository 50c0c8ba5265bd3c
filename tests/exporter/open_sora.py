"""Small Open-Sora models with weights that are the same wherever they are made."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from foresight.exporter.models.open_sora import config, stdit3, vae

SPATIAL: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [8, 8],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
}
SMALL_VAE = config.VideoVAEConfig(spatial=SPATIAL, filters=8, num_res_blocks=1, num_groups=4)
LATENTS = (4, 5, 6, 7)  # neither side a multiple of either patch
TOLERANCE = 1e-5


def pattern(*shape: int, phase: float = 0.0) -> Tensor:
    """Numbers that look random and are the same wherever they are computed."""
    index = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.sin(1.3 * index + phase + 0.01 * (index % 17) ** 2).reshape(shape).float()


@torch.no_grad()
def fill(module: nn.Module) -> None:
    """Give a module weights that are the same wherever they are made; constants keep their values."""
    for phase, (name, tensor) in enumerate(sorted(module.state_dict().items())):
        if name not in ("rope.freqs", "scale", "shift"):
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            tensor.copy_(0.2 * pattern(*tensor.shape, phase=phase) + centre)


def small_transformer(**changes: Any) -> stdit3.STDiT3:
    sizes: dict[str, Any] = {
        "hidden_size": 48,
        "num_heads": 2,
        "depth": 2,
        "caption_channels": 12,
        "model_max_length": 6,
        "input_sq_size": 64,
    }
    model = stdit3.STDiT3(config.STDiT3Config(**sizes | changes)).eval()
    fill(model)
    return model


def small_vae() -> vae.VideoVAE:
    model = vae.VideoVAE(SMALL_VAE).eval()
    fill(model)
    return model
