"""The autoencoder of the CogVideoX demo: causal over time, decoded in chunks as the pipeline decodes.

It starts from the finished image autoencoder of `demo/latte`: every 2D kernel becomes the last time step of a 3D one,
so that at first each frame is coded as that autoencoder would, and what is left to learn is to code two frames as one.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, AutoencoderKLCogVideoX
from torch import Tensor

from demo import shapes
from demo.autoencoder import Autoencoder, Loss, vae_loss
from demo.model import ROOT
from demo.training import Settings, pixels_from_videos

FRAMES = 9
LATENT_FRAMES = 5
LATENT_CHANNELS = 4
START = ROOT / "latte" / "vae"
START_LOGVAR = -4.0

Weights = dict[str, Tensor]


def make_vae() -> AutoencoderKLCogVideoX:
    """9 RGB frames of 32x32 to 5 latents of 4 channels and 16x16: the first frame's, then one for every two frames."""
    return AutoencoderKLCogVideoX(
        block_out_channels=(16, 32),
        down_block_types=("CogVideoXDownBlock3D",) * 2,
        up_block_types=("CogVideoXUpBlock3D",) * 2,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        temporal_compression_ratio=2,
        sample_height=shapes.SIZE,
        sample_width=shapes.SIZE,
        scaling_factor=1.0,
    )


# ---------------------------------------------------------------------------------------------------------------
# Starting values


@torch.no_grad()
def start_from_images(vae: AutoencoderKLCogVideoX, image_vae: AutoencoderKL) -> None:
    """Overwrites all weights, so that a still video is coded frame by frame as `image_vae` codes its frame.

    All is exact but two things: normalisation takes its statistics over several frames, and at the picture's edge the
    decoder's first convolution sees zeros in place of what `post_quant_conv` makes of zeros.
    """
    source, shapes_wanted = image_vae.state_dict(), vae.state_dict()
    weights: Weights = {}
    for name, wanted in shapes_wanted.items():
        if ".conv_y." in name or ".conv_b." in name:  # the decoder's normalisation: no influence of the latents yet
            norm, kind, _, part = name.rsplit(".", 3)
            old = _image_name(norm) + (".weight" if kind == "conv_y" else ".bias")
            weights[name] = source[old].clone() if part == "bias" else torch.zeros_like(wanted)
        elif ".norm_layer." in name:
            weights[name] = torch.full_like(wanted, float(name.endswith("weight")))
        else:
            old_name, part = _image_name(name).rsplit(".", 1)
            weights[name] = _inflated(source[f"{old_name}.{part}"], wanted)
    _absorb_quant_convs(weights, source)
    vae.load_state_dict(weights)


def _image_name(name: str) -> str:
    if "samplers." not in name:  # whose convolutions are two-dimensional in both, under the same name
        name = name.replace(".conv.weight", ".weight").replace(".conv.bias", ".bias")
    return name.replace(".norm_out", ".conv_norm_out")


def _inflated(old: Tensor, wanted: Tensor) -> Tensor:
    if old.ndim == 4 and wanted.ndim == 5:
        new = torch.zeros_like(wanted)
        new[:, :, -1] = old
        return new
    return old.clone()


def _absorb_quant_convs(weights: Weights, source: Weights) -> None:
    mix, bias = source["quant_conv.weight"][:, :, 0, 0], source["quant_conv.bias"]
    last = "encoder.conv_out.conv"
    weights[f"{last}.weight"] = torch.einsum("oc,cithw->oithw", mix, weights[f"{last}.weight"])
    weights[f"{last}.bias"] = mix @ weights[f"{last}.bias"] + bias
    weights[f"{last}.weight"][LATENT_CHANNELS:] = 0
    weights[f"{last}.bias"][LATENT_CHANNELS:] = START_LOGVAR
    mix, bias = source["post_quant_conv.weight"][:, :, 0, 0], source["post_quant_conv.bias"]
    first = "decoder.conv_in.conv"
    weights[f"{first}.bias"] = weights[f"{first}.bias"] + torch.einsum("oithw,i->o", weights[f"{first}.weight"], bias)
    weights[f"{first}.weight"] = torch.einsum("oithw,ic->octhw", weights[f"{first}.weight"], mix)


# ---------------------------------------------------------------------------------------------------------------
# Training


def losses(vae: AutoencoderKLCogVideoX, videos: shapes.Video, settings: Settings) -> Loss:
    """Of videos, decoded in chunks."""

    def loss(step: int, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(videos), (settings.vae_batch // settings.processes,), generator=generator)
        return vae_loss(vae, pixels_from_videos(videos[chosen.numpy()]), generator)

    return loss


@torch.no_grad()
def whiten_latents(vae: AutoencoderKLCogVideoX, videos: shapes.Video) -> None:
    """Mixes latent channels so that their covariance over `videos` is 1; videos decode as before.

    The mean stays what it is: at the edge of the picture the decoder's first convolution sees zeros, which stand for
    latents of 0, so moving the mean would change what is decoded there. See `demo.models.latte.whiten_latents` for the
    posterior's variance.
    """
    posterior = vae.encode(pixels_from_videos(videos)).latent_dist
    means = posterior.mean.transpose(0, 1).flatten(1).double()
    values, vectors = torch.linalg.eigh(torch.cov(means))
    whiten = (vectors * values.rsqrt()) @ vectors.T
    restore = (vectors * values.sqrt()) @ vectors.T
    channels, into = len(values), vae.encoder.conv_out.conv
    into.weight[:channels] = torch.einsum("ij,jcthw->icthw", whiten, into.weight[:channels].double()).float()
    into.bias[:channels] = (whiten @ into.bias[:channels].double()).float()
    into.weight[channels:] = 0
    into.bias[channels:] = (whiten.square() @ posterior.var.mean((0, 2, 3, 4)).double()).log().float()
    for name, convolution in vae.decoder.named_modules():
        if name == "conv_in.conv" or name.endswith(("conv_y.conv", "conv_b.conv")):
            weight = convolution.weight.double()
            convolution.weight.copy_(torch.einsum("octhw,ci->oithw", weight, restore).float())


AUTOENCODER = Autoencoder(
    frames=FRAMES,
    make=make_vae,
    losses=losses,
    finish=lambda vae, videos: whiten_latents(vae, videos[:256]),
    prepare=lambda vae: start_from_images(vae, AutoencoderKL.from_pretrained(START)),
)
