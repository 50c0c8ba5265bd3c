"""What the training of the demos' autoencoders shares: the data, the steps, the average that is kept and its score."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from demo import shapes
from demo.optimiser import FlatAdamW
from demo.training import (
    Clock,
    Settings,
    Stage,
    decibels,
    foreground,
    generator_for,
    pixels_from_videos,
    reconstruction_error,
    run_stage,
    write_record,
)

logger = logging.getLogger("demo.train")

V = TypeVar("V", bound=nn.Module)
Loss = Callable[[int, torch.Generator], Tensor]


def reconstruct(vae: Any, pixels: Tensor) -> Tensor:
    """Pixels after encoding and decoding by one of diffusers' autoencoders."""
    decoded: Tensor = vae.decode(vae.encode(pixels).latent_dist.mean).sample
    return decoded


def save_vae(folder: Path, vae: Any) -> None:
    """Writes a folder that one of diffusers' autoencoders is loaded from."""
    vae.save_pretrained(folder)


def coding_loss(posterior: DiagonalGaussianDistribution, decoded: Tensor, pixels: Tensor) -> Tensor:
    """Error of the pixels, those of the shape counting five times, + 3e-4 KL divergence per latent number."""
    kl = posterior.kl().mean() / posterior.mean[0].numel()
    loss: Tensor = reconstruction_error(decoded, pixels, foreground(pixels)) + 3e-4 * kl
    return loss


def vae_loss(vae: Any, pixels: Tensor, generator: torch.Generator) -> Tensor:
    """The `coding_loss` of one of diffusers' autoencoders, decoded from a sample of the posterior."""
    posterior = vae.encode(pixels).latent_dist
    return coding_loss(posterior, vae.decode(posterior.sample(generator)).sample, pixels)


@dataclass(frozen=True)
class Autoencoder(Generic[V]):
    """How the autoencoder of a model is trained.

    Attributes:
        frames: of the videos it is trained on.
        make: one with starting values.
        losses: the loss of a step, drawn by the generator of that step and process; for an autoencoder, all videos and
            the settings.
        finish: what is done to its latents, from what they are over the videos, when it is trained.
        prepare: what is done to it before it is trained.
        trained: which part of it is.
        pixels: what it codes of videos.
        reconstruct: pixels after encoding and decoding.
        save: writes a folder.
    """

    frames: int
    make: Callable[[], V]
    losses: Callable[[V, shapes.Video, Settings], Loss]
    finish: Callable[[V, shapes.Video], None]
    prepare: Callable[[V], object] = lambda vae: None
    trained: Callable[[V], nn.Module] = lambda vae: vae
    pixels: Callable[[shapes.Video], Tensor] = pixels_from_videos
    reconstruct: Callable[[V, Tensor], Tensor] = reconstruct
    save: Callable[[Path, V], None] = save_vae

    def train(self, settings: Settings, clock: Clock) -> bool:
        """Trains one and leaves it in the work folder; returns whether it is complete."""
        finished, fresh = settings.work / "vae", settings.work / "vae.fresh"
        if finished.exists():
            return True
        rank = dist.get_rank()
        torch.manual_seed(settings.seed)
        vae = self.make()
        self.prepare(vae)
        optimiser = FlatAdamW([self.trained(vae)], torch.float32)
        videos, _ = shapes.make_dataset(min(settings.videos, 2048), settings.seed, frames=self.frames)
        losses = self.losses(vae, videos, settings)

        def export(seconds: float, mean_loss: float) -> None:
            averaged = self.make()
            optimiser.copy_average_to([self.trained(averaged)])
            psnr = self.measure_psnr(averaged, videos[:32])
            logger.info("autoencoder: %.1f dB", psnr)
            record = {"steps": optimiser.steps, "seconds": round(seconds), "psnr_db": round(psnr, 2)}
            if optimiser.steps >= settings.vae_steps:
                self.finish(averaged, videos)
                self.save(fresh, averaged)
                write_record(settings, "vae", record)
                os.rename(fresh, finished)

        def loss(step: int) -> Tensor:
            return losses(step, generator_for(settings.seed, 1, step, rank))

        stage = Stage("vae-state", settings.vae_steps, loss, settings.vae_rate, export)
        return run_stage(stage, optimiser, settings, clock)

    @torch.no_grad()
    def measure_psnr(self, vae: V, videos: shapes.Video) -> float:
        """Peak signal-to-noise ratio in dB of videos after encoding and decoding."""
        pixels = self.pixels(videos)
        return decibels(self.reconstruct(vae, pixels), pixels)
