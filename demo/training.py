"""What the training of every demo model shares: settings, the loop, noise levels, targets, latents, records.

Training is data-parallel over single-threaded processes, which on CPUs is faster than one process with many threads.
The work folder holds what is needed to go on after an interruption at any moment. The result depends on the seed, the
number of processes and the versions of the libraries, not on interruptions.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from demo import shapes
from demo.optimiser import FlatAdamW

logger = logging.getLogger("demo.train")
CONTRAST_WEIGHT = 10.0


@dataclass(frozen=True)
class Settings:
    """Everything that decides the result, and how often to save it.

    Attributes are explained in HELP. `mean_targets_after` is 0 where such targets help from the start.
    """

    work: Path
    output: Path
    records: Path
    seed: int = 0
    processes: int = 1
    videos: int = 10_240
    vae_steps: int = 5_000
    vae_batch: int = 16
    vae_learning_rate: float = 3e-3
    samples: int = 150_000
    mean_targets_after: int = 0
    batch: int = 24
    learning_rate: float = 2e-3
    caption_dropout: float = 0.1
    save_every_s: float = 30.0
    export_every_s: float = 300.0
    stop_after_s: float = math.inf

    def __post_init__(self) -> None:
        fewest = self.processes * len(shapes.trained())
        if self.videos < fewest:
            raise ValueError(f"videos is {self.videos}; every process needs each combination, so at least {fewest}")
        for name in ("videos", "vae_batch", "batch"):
            if getattr(self, name) % self.processes:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; it must be a multiple of processes, {self.processes}"
                )

    @property
    def denoiser_steps(self) -> int:
        """Optimiser steps of the transformer's training."""
        return self.samples // self.batch

    def vae_rate(self, step: int) -> float:
        """Learning rate of the autoencoder: a short warm-up, then a cosine over the whole training."""
        return self.vae_learning_rate * min(1.0, (step + 1) / 100) * cosine(step / self.vae_steps)

    def denoiser_rate(self, step: int) -> float:
        """Learning rate of the transformer: a short warm-up, constant, then a cosine over the second half."""
        return self.learning_rate * min(1.0, (step + 1) / 100) * cosine(2 * step / self.denoiser_steps - 1)


HELP = {
    "work": "folder for what an interrupted run needs to go on",
    "output": "folder of the checkpoint, replaced as training proceeds",
    "records": "folder of training.json",
    "seed": "of data, starting weights and noise",
    "processes": "single-threaded training processes",
    "videos": "size of the training set",
    "vae_steps": "length of the autoencoder's training",
    "vae_batch": "frames (latte) or videos in a step of the autoencoder's training, over all processes",
    "vae_learning_rate": "peak learning rate of the autoencoder",
    "samples": "videos that the transformer sees in all; the learning rate falls to zero over the second half",
    "mean_targets_after": "samples after which the noisiest latents have the mean of their caption's videos as target",
    "batch": "videos in a step of the transformer's training, over all processes",
    "learning_rate": "peak learning rate of the transformer",
    "caption_dropout": "share of videos shown without caption, for classifier-free guidance",
    "save_every_s": "seconds between writes of the state in the work folder",
    "export_every_s": "seconds between replacements of the checkpoint",
    "stop_after_s": "stop this run after so many seconds, to be continued by the next",
}


def cosine(progress: float) -> float:
    """Falls from 1 to 0 as progress goes from 0 to 1."""
    return 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))


def generator_for(*key: int) -> torch.Generator:
    """Random numbers that depend on the key only, so that a continued run draws what an unbroken one would."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed))


@contextmanager
def moved_weights(module: nn.Module) -> Iterator[torch.Generator]:
    """Every trained weight of it is moved away from its starting value meanwhile; yields what draws the inputs."""
    generator = generator_for(3)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    original = [parameter.detach().clone() for parameter in trained]
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        try:
            yield generator
        finally:
            for parameter, value in zip(trained, original, strict=True):
                parameter.copy_(value)


# ---------------------------------------------------------------------------------------------------------------
# The loop


@dataclass
class Clock:
    """Seconds since the run began, and its time budget."""

    began: float
    budget_s: float

    def spent(self) -> bool:
        """Whether any process is out of time; all processes get the same answer."""
        flag = torch.tensor(float(time.time() - self.began > self.budget_s))
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)


@dataclass
class Stage:
    """One network to train: its name, its loss for a step, its learning rate for a step, and what to do now and then.

    `export` is called in process 0 only, with the seconds trained so far and the running mean of the loss.
    """

    name: str
    steps: int
    loss: Callable[[int], Tensor]
    learning_rate: Callable[[int], float]
    export: Callable[[float, float], None]


def run_stage(stage: Stage, optimiser: FlatAdamW, settings: Settings, clock: Clock) -> bool:
    """Trains to the end of the stage or of the time budget; returns whether the stage is complete."""
    state_file = settings.work / f"{stage.name}.pt"
    seconds, mean_loss = 0.0, math.nan
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        optimiser.load_state_dict(state["optimiser"])
        seconds, mean_loss = state["seconds"], state["mean_loss"]
    dist.barrier()
    saved = exported = last = time.time()
    chief = dist.get_rank() == 0
    complete = optimiser.steps >= stage.steps
    while not complete and not (optimiser.steps % 10 == 0 and clock.spent()):
        loss = stage.loss(optimiser.steps)
        torch.autograd.backward(loss)
        optimiser.step(stage.learning_rate(optimiser.steps))
        now = time.time()
        seconds, last = seconds + now - last, now
        value = loss.item()
        mean_loss = value if math.isnan(mean_loss) else mean_loss + 0.02 * (value - mean_loss)
        complete = optimiser.steps >= stage.steps
        if chief and (complete or now - saved > settings.save_every_s):
            save_state(state_file, {"optimiser": optimiser.state_dict(), "seconds": seconds, "mean_loss": mean_loss})
            logger.info(
                "%s: step %d/%d, loss %.4f, %.0f s", stage.name, optimiser.steps, stage.steps, mean_loss, seconds
            )
            saved = now
        if chief and not complete and now - exported > settings.export_every_s:
            stage.export(seconds, mean_loss)
            exported = last = time.time()
    if chief:
        save_state(state_file, {"optimiser": optimiser.state_dict(), "seconds": seconds, "mean_loss": mean_loss})
        stage.export(seconds, mean_loss)
    dist.barrier()
    return complete


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Replaces a file in one step, so that an interruption leaves either the old or the new one."""
    fresh = path.with_suffix(".fresh")
    torch.save(state, fresh)
    os.replace(fresh, path)


def write_record(settings: Settings, part: str, record: dict[str, Any]) -> None:
    """Notes the outcome of a stage in `training.json`."""
    settings.records.mkdir(parents=True, exist_ok=True)
    file = settings.records / "training.json"
    records = json.loads(file.read_text()) if file.exists() else {}
    chosen = {field.name: getattr(settings, field.name) for field in fields(settings)}
    kept = {key: value for key, value in chosen.items() if isinstance(value, int | float) and not key.endswith("_s")}
    records["settings"] = kept
    records[part] = record
    file.write_text(json.dumps(records, indent=1) + "\n")


def train_denoiser_by(
    loss: Callable[[int], Tensor], save: Callable[[], None], optimiser: FlatAdamW, settings: Settings, clock: Clock
) -> bool:
    """Trains a transformer by the loss of a step; `save` replaces the checkpoint by the average. See `run_stage`."""

    def export(seconds: float, mean_loss: float) -> None:
        save()
        write_record(settings, "denoiser", _denoiser_record(settings, optimiser.steps, seconds, mean_loss))

    stage = Stage("denoiser-state", settings.denoiser_steps, loss, settings.denoiser_rate, export)
    return run_stage(stage, optimiser, settings, clock)


def _denoiser_record(settings: Settings, steps: int, seconds: float, mean_loss: float) -> dict[str, Any]:
    samples = steps * settings.batch
    record = {"samples": samples, "steps": steps, "seconds": round(seconds), "loss": round(mean_loss, 5)}
    record["samples_per_second"] = round(samples / max(seconds, 1e-9), 1)
    logger.info("checkpoint after %d samples (%.1f a second)", samples, record["samples_per_second"])
    return record


# ---------------------------------------------------------------------------------------------------------------
# Data


def pixels_from_videos(videos: shapes.Video) -> Tensor:
    """uint8 (videos, frames, height, width, 3) to float32 (videos, 3, frames, height, width) in [-1, 1]."""
    return torch.from_numpy(videos).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def foreground(pixels: Tensor) -> Tensor:
    """1 where a pixel, channels in dimension 1, is of the shape or its edge, else 0; one channel."""
    return (pixels.amax(1, keepdim=True) > -0.9).float()


def reconstruction_error(actual: Tensor, expected: Tensor, shown: Tensor) -> Tensor:
    """L1 + 2 MSE, where what `shown` marks counts five times."""
    error = actual - expected
    return ((1 + 4 * shown) * (error.abs() + 2 * error.square())).mean()


def decibels(actual: Tensor, expected: Tensor) -> float:
    """Peak signal-to-noise ratio of pixels in [-1, 1]."""
    return float(10 * torch.log10(4 / (actual.clamp(-1, 1) - expected).square().mean()))


@torch.no_grad()
def training_latents(
    settings: Settings, frames: int, patches_from_videos: Callable[[shapes.Video], Tensor]
) -> tuple[Tensor, Tensor]:
    """This process's share of the training set, computed once.

    Returns:
        Latents in patch space, float32 (videos, …), and combinations, int64 (videos,).
    """
    rank, share = dist.get_rank(), settings.videos // settings.processes
    file = settings.work / f"latents-{rank}-of-{settings.processes}.pt"
    if not file.exists():
        videos, labels = shapes.make_dataset(share, settings.seed, first=rank * share, frames=frames)
        chunks = np.array_split(videos, math.ceil(share / 32))
        patches = torch.cat([patches_from_videos(chunk) for chunk in chunks])
        save_state(file, {"patches": patches, "labels": torch.from_numpy(labels)})
    state = torch.load(file, weights_only=True)
    return state["patches"], state["labels"]


def caption_means(clean: Tensor, labels: Tensor) -> Tensor:
    """Mean latents of the videos of every caption, and of all for the empty one: (37, …)."""
    means = [clean[labels == label].mean(0) for label in range(len(shapes.trained()))]
    stacked = torch.stack([*means, clean.mean(0)])
    dist.all_reduce(stacked)
    return stacked / dist.get_world_size()


# ---------------------------------------------------------------------------------------------------------------
# Noise levels and targets


@dataclass(frozen=True)
class NoiseLevels:
    """Which noise levels, from 0 (clean) to 1 (noise), training draws.

    Most are sigmoid(N(centre, spread)), which favours the levels where structure and motion are decided; 15 % are
    uniform, so that none is left out. Levels of at least `mean_from` show next to nothing of the latents: their
    signal-to-noise ratio is about 1e-4 or less. The best prediction is then the mean of all videos of the caption, so
    that mean is the target. The expected gradient is nearly the same and its variance far smaller: with single videos
    as targets, a network finds colours soon but takes very long to see which way a caption says to move, because
    direction explains few per cent of the latents' variance. A share of `mean_share` is drawn from there on purpose.
    """

    centre: float
    spread: float
    mean_from: float
    mean_share: float
    uniform_share: float = 0.15

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """float32 (count,)."""
        levels = torch.sigmoid(self.centre + self.spread * torch.randn(count, generator=generator))
        uniform, kind = torch.rand(count, generator=generator), torch.rand(count, generator=generator)
        levels = torch.where(kind < self.uniform_share + self.mean_share, uniform, levels)
        return torch.where(kind < self.mean_share, self.mean_from + (1 - self.mean_from) * uniform, levels)


class Batch(NamedTuple):
    """What a step of a transformer's training needs, beside the noise schedule.

    Attributes:
        clean: latents in patch space, float32 (batch, …).
        target: like `clean`: the same, or the caption's mean where the noise level is high enough.
        noise: like `clean`.
        levels: noise levels in [0, 1], float32 (batch,).
        averaged: whether the target is a mean, bool (batch,).
        captions: indices into the captions, the last of which is the empty one, int64 (batch,).
    """

    clean: Tensor
    target: Tensor
    noise: Tensor
    levels: Tensor
    averaged: Tensor
    captions: Tensor


class TrainingSet:
    """This process's latents and captions, and the caption means over all processes."""

    def __init__(self, clean: Tensor, labels: Tensor) -> None:
        self.clean = clean
        self.labels = labels
        self.means = caption_means(clean, labels)
        self.contrasts = direction_contrasts(self.means)

    def draw(self, settings: Settings, levels: NoiseLevels, generator: torch.Generator) -> Batch:
        """This process's share of a batch."""
        count = settings.batch // settings.processes
        chosen = torch.randint(len(self.clean), (count,), generator=generator)
        drawn = levels.draw(count, generator)
        clean = self.clean[chosen]
        noise = torch.randn(clean.shape, generator=generator)
        dropped = torch.rand(count, generator=generator) < settings.caption_dropout
        captions = self.labels[chosen].masked_fill(dropped, len(self.means) - 1)
        averaged = drawn >= levels.mean_from
        target = torch.where(over_batch(averaged, clean), self.means[captions], clean)
        return Batch(clean, target, noise, drawn, averaged, captions)

    def errors(self, difference: Tensor, batch: Batch) -> Tensor:
        """Mean square of the difference from what was to be predicted, (batch,).

        Where means are targets, what tells directions apart counts CONTRAST_WEIGHT times more. Those targets are
        exact, so the best prediction stays the same; but direction, which is little beside colour, is learnt sooner.
        """
        contrast = (difference.flatten(1) @ self.contrasts.T).square().sum(1) / difference[0].numel()
        return difference.flatten(1).square().mean(1) + CONTRAST_WEIGHT * batch.averaged * contrast


def direction_contrasts(means: Tensor) -> Tensor:
    """Orthonormal basis of the differences between the four directions' mean latents, (3, latent numbers)."""
    names = [combination.direction for combination in shapes.trained()]
    rows = [[i for i, name in enumerate(names) if name == direction] for direction in shapes.DIRECTIONS]
    directions = torch.stack([means[row].mean(0) for row in rows]).flatten(1)
    basis: Tensor = torch.linalg.svd(directions - directions.mean(0), full_matrices=False)[2]
    return basis[:3]


def over_batch(values: Tensor, like: Tensor) -> Tensor:
    """(batch,) as (batch, 1, …), to be broadcast against `like`."""
    return values.view(-1, *[1] * (like.ndim - 1))
