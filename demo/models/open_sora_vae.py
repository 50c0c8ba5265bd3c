"""The autoencoder of the Open-Sora demo: `demo/latte`'s image autoencoder over frames, then a causal one over time.

The original, too, starts from a finished image autoencoder. Here it stays as it is, but for a constant: the original
multiplies its latents by a fixed factor, which the 1x1 convolutions around them take back, so that what the temporal
autoencoder sees has variance 1. Only the temporal one is trained.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

from demo import shapes
from demo.autoencoder import Autoencoder, Loss
from demo.model import ROOT
from demo.training import Settings, foreground, pixels_from_videos, reconstruction_error
from foresight.exporter.models.open_sora.config import VideoVAEConfig
from foresight.exporter.models.open_sora.vae import SPATIAL_FACTOR, ResBlock, VideoVAE

FRAMES = 17
LATENT_FRAMES = 5
LATENT_CHANNELS = 4
START = ROOT / "latte" / "vae"
LATENT_STD = 0.25
"""Standard deviation that the latents end up with. The original moves times towards noise by the size of the video, and
for 32x32 pixels that means away from noise: its second step is at a time of 0.8, where latents of deviation 1 have long
shown what they are. Smaller latents are hidden there."""
START_LOGVAR = -4.0
FRAMES_SHOWN = 6
"""Frames of a video whose pixels are compared in a step; their image latents are compared in all frames."""
STATES_SHARE = 0.3
"""Weight of the image latents' error beside the pixels'."""


def vae_config() -> dict[str, Any]:
    """The content of `config.json`, in the original's words: 17 frames of 32x32 to 5 latents of 4 channels, 16x16."""
    spatial = json.loads((START / "config.json").read_text())
    return {
        "model_type": "VideoAutoencoderPipeline",
        "micro_frame_size": FRAMES,
        "vae_2d": {
            "type": "VideoAutoencoderKL",
            "config": {key: value for key, value in spatial.items() if not key.startswith("_")},
        },
        "vae_temporal": {
            "type": "VAE_Temporal",
            "filters": 16,
            "num_res_blocks": 1,
            "channel_multipliers": [1, 2, 2, 2],
            "temporal_downsample": [False, True, True],
            "num_groups": 8,
        },
    }


def make_vae() -> VideoVAE:
    """Untrained over time; the image autoencoder has its trained weights, which ask for no gradient."""
    vae = VideoVAE(VideoVAEConfig.from_json(vae_config()))
    vae.spatial_vae.module.load_state_dict(AutoencoderKL.from_pretrained(START).state_dict())
    vae.spatial_vae.requires_grad_(False)
    take_back_factor(vae.spatial_vae.module)
    with torch.no_grad():
        for block in vae.temporal_vae.modules():
            if isinstance(block, ResBlock):
                block.conv2.conv.weight.zero_()  # every block starts as its skip connection
        bias = vae.temporal_vae.quant_conv.conv.bias
        assert bias is not None
        bias[LATENT_CHANNELS:] = START_LOGVAR
        vae.scale.fill_(1.0)
        vae.shift.fill_(0.0)
    return vae


@torch.no_grad()
def take_back_factor(image_vae: AutoencoderKL) -> None:
    """Makes encoding followed by `SPATIAL_FACTOR` give the latents that encoding gave before, and decoding alike."""
    into, out_of = image_vae.quant_conv, image_vae.post_quant_conv
    into.weight[:LATENT_CHANNELS] /= SPATIAL_FACTOR
    into.bias[:LATENT_CHANNELS] /= SPATIAL_FACTOR
    into.bias[LATENT_CHANNELS:] -= 2 * math.log(SPATIAL_FACTOR)
    out_of.weight.mul_(SPATIAL_FACTOR)


def vae_loss(vae: VideoVAE, pixels: Tensor, states: Tensor, generator: torch.Generator) -> Tensor:
    """Error of the image latents and of some frames' pixels, with the shape counting five times, + 3e-4 KL divergence.

    Args:
        vae: gradients flow to its temporal part.
        pixels: (batch, 3, 17, 32, 32) in [-1, 1].
        states: the same videos as the image autoencoder codes them, (batch, 4, 17, 16, 16).
        generator: draws the latents' noise and the frames.
    """
    mean, logvar = vae.temporal_vae.encode(states)
    latents = mean + (logvar / 2).exp() * torch.randn(mean.shape, generator=generator)
    decoded = vae.temporal_vae.decode(latents, FRAMES)
    shown = foreground(pixels)
    shown_states = F.max_pool3d(shown, kernel_size=(1, 4, 4), stride=(1, 2, 2), padding=(0, 1, 1))
    some = torch.randperm(FRAMES, generator=generator)[:FRAMES_SHOWN]
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return (
        STATES_SHARE * reconstruction_error(decoded, states, shown_states)
        + reconstruction_error(vae.spatial_vae.decode(decoded[:, :, some]), pixels[:, :, some], shown[:, :, some])
        + 3e-4 * kl
    )


def losses(vae: VideoVAE, videos: shapes.Video, settings: Settings) -> Loss:
    """Of videos, whose image latents are computed once."""
    with torch.no_grad():
        pieces = [vae.spatial_vae.encode(pixels_from_videos(piece), sample=False) for piece in _pieces(videos)]
    states = torch.cat(pieces)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(videos), (settings.vae_batch // settings.processes,), generator=generator)
        return vae_loss(vae, pixels_from_videos(videos[chosen.numpy()]), states[chosen], generator)

    return loss


def _pieces(videos: shapes.Video) -> list[shapes.Video]:
    return [videos[start : start + 16] for start in range(0, len(videos), 16)]


@torch.no_grad()
def standardise_latents(vae: VideoVAE, videos: shapes.Video) -> None:
    """Sets `scale` and `shift`, so that every channel has mean 0 and deviation LATENT_STD over `videos`."""
    latents = torch.cat([vae.encode(pixels_from_videos(piece), sample=False) for piece in _pieces(videos)])
    latents = latents * vae.scale + vae.shift
    vae.scale.copy_(latents.std((0, 2, 3, 4)).view_as(vae.scale) / LATENT_STD)
    vae.shift.copy_(latents.mean((0, 2, 3, 4)).view_as(vae.shift))


def save_vae(folder: Path, vae: VideoVAE) -> None:
    """`config.json` and `model.safetensors`, with the original's names."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(vae_config(), indent=2, sort_keys=True) + "\n")
    weights = {name: weight.detach().contiguous() for name, weight in vae.state_dict().items()}
    save_file(weights, folder / "model.safetensors")


def load_vae(folder: Path) -> VideoVAE:
    """What `save_vae` wrote, float32 and frozen."""
    vae = VideoVAE(VideoVAEConfig.from_json(json.loads((folder / "config.json").read_text())))
    vae.load_state_dict(load_file(folder / "model.safetensors"))
    return vae.eval().requires_grad_(False)


AUTOENCODER = Autoencoder(
    frames=FRAMES,
    make=make_vae,
    losses=losses,
    finish=standardise_latents,
    trained=lambda vae: vae.temporal_vae,
    reconstruct=lambda vae, pixels: vae.decode(vae.encode(pixels, sample=False), FRAMES),
    save=save_vae,
)
