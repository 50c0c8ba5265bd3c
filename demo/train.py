"""Makes the demo checkpoint from nothing: `python -m demo.train`.

Three stages, each seeded: an autoencoder for single frames; the latents of all training videos, computed once; then
text encoder and transformer together, on those latents. The work folder holds what is needed to go on after an
interruption at any moment: run the same command again. The checkpoint is replaced while training goes on.

Training is data-parallel over single-threaded processes, which on CPUs is faster than one process with many threads.
The result depends on the seed, the number of processes and the versions of the libraries, not on interruptions.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from diffusers import AutoencoderKL, LatteTransformer3DModel
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from demo import shapes
from demo.checkpoint import (
    PATCH,
    make_scheduler,
    make_text_encoder,
    make_tokenizer,
    make_transformer,
    make_vae,
    save_checkpoint,
)
from demo.forward import latents_from_patches, patches_from_latents, predict
from demo.optimiser import FlatAdamW

logger = logging.getLogger("demo.train")
HERE = Path(__file__).parent
MEAN_FROM = 940
"""Timesteps from here on show next to nothing of the latents: their signal-to-noise ratio is about 1e-4 or less. The
best prediction is then the mean of all videos of the caption, so that mean is the target. The expected gradient is
nearly the same and its variance far smaller: with single videos as targets, the network finds colours soon but takes
very long to see which way a caption says to move, because direction explains few per cent of the latents' variance."""
MEAN_SHARE = 0.2
"""Share of the batch that is drawn from those timesteps on purpose, once means are the targets."""


@dataclass(frozen=True)
class Settings:
    """Everything that decides the result, and how often to save it."""

    work: Path = HERE / "work"
    output: Path = HERE / "latte"
    seed: int = 0
    processes: int = 2
    videos: int = 10_240
    vae_steps: int = 5_000
    vae_batch: int = 16
    vae_learning_rate: float = 3e-3
    samples: int = 150_000
    mean_targets_after: int = 71_112
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


HELP = {
    "work": "folder for what an interrupted run needs to go on",
    "output": "folder of the checkpoint, replaced as training proceeds",
    "seed": "of data, starting weights and noise",
    "processes": "single-threaded training processes",
    "videos": "size of the training set",
    "vae_steps": "length of the autoencoder's training",
    "vae_batch": "frames in a step of the autoencoder's training, over all processes",
    "vae_learning_rate": "peak learning rate of the autoencoder",
    "samples": "videos that the transformer sees in all; the learning rate falls to zero over the second half",
    "mean_targets_after": "samples after which the noisiest latents have the mean of their caption's videos as target",
    "batch": "videos in a step of the transformer's training, over all processes",
    "learning_rate": "peak learning rate of text encoder and transformer",
    "caption_dropout": "share of videos shown without caption, for classifier-free guidance",
    "save_every_s": "seconds between writes of the state in the work folder",
    "export_every_s": "seconds between replacements of the checkpoint",
    "stop_after_s": "stop this run after so many seconds, to be continued by the next",
}


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


# ---------------------------------------------------------------------------------------------------------------
# The training loop, shared by both networks


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


def cosine(progress: float) -> float:
    """Falls from 1 to 0 as progress goes from 0 to 1."""
    return 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))


def generator_for(*key: int) -> torch.Generator:
    """Random numbers that depend on the key only, so that a continued run draws what an unbroken one would."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed))


# ---------------------------------------------------------------------------------------------------------------
# Autoencoder


def pixels_from_videos(videos: shapes.Video) -> Tensor:
    """uint8 (videos, frames, height, width, 3) to float32 (videos * frames, 3, height, width) in [-1, 1]."""
    return torch.from_numpy(videos).flatten(0, 1).permute(0, 3, 1, 2).float() / 127.5 - 1


def vae_loss(vae: AutoencoderKL, pixels: Tensor, generator: torch.Generator) -> Tensor:
    """L1 + 2 MSE, with pixels of the shape counting five times, + 3e-4 KL divergence per latent number."""
    posterior = vae.encode(pixels).latent_dist
    error = vae.decode(posterior.sample(generator)).sample - pixels
    weight = 1 + 4 * (pixels.amax(1, keepdim=True) > -0.9).float()
    kl = posterior.kl().mean() / posterior.mean[0].numel()
    loss: Tensor = (weight * (error.abs() + 2 * error.square())).mean() + 3e-4 * kl
    return loss


def train_vae(settings: Settings, clock: Clock) -> bool:
    """Trains the autoencoder, whitens its latents and leaves it in the work folder."""
    finished = settings.work / "vae"
    if finished.exists():
        return True
    rank, batch = dist.get_rank(), settings.vae_batch // settings.processes
    torch.manual_seed(settings.seed)
    vae = make_vae()
    optimiser = FlatAdamW([vae], torch.float32)
    videos, _ = shapes.make_dataset(min(settings.videos, 2048), settings.seed)
    frames = torch.from_numpy(videos).flatten(0, 1)

    def loss(step: int) -> Tensor:
        generator = generator_for(settings.seed, 1, step, rank)
        chosen = torch.randint(len(frames), (batch,), generator=generator)
        return vae_loss(vae, pixels_from_videos(frames[chosen].unsqueeze(1).numpy()), generator)

    def learning_rate(step: int) -> float:
        return settings.vae_learning_rate * min(1.0, (step + 1) / 100) * cosine(step / settings.vae_steps)

    def export(seconds: float, mean_loss: float) -> None:
        averaged = make_vae()
        optimiser.copy_average_to([averaged])
        psnr = measure_psnr(averaged, videos[:32])
        logger.info("autoencoder: %.1f dB", psnr)
        record = {"steps": optimiser.steps, "seconds": round(seconds), "psnr_db": round(psnr, 2)}
        if optimiser.steps >= settings.vae_steps:
            whiten_latents(averaged, videos[:256])
            averaged.save_pretrained(settings.work / "vae.fresh")
            write_record(settings, "vae", record)
            os.rename(settings.work / "vae.fresh", finished)

    return run_stage(Stage("vae-state", settings.vae_steps, loss, learning_rate, export), optimiser, settings, clock)


@torch.no_grad()
def measure_psnr(vae: AutoencoderKL, videos: shapes.Video) -> float:
    """Peak signal-to-noise ratio in dB of frames after encoding and decoding."""
    pixels = pixels_from_videos(videos)
    decoded = vae.decode(vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
    return float(10 * torch.log10(4 / (decoded - pixels).square().mean()))


@torch.no_grad()
def whiten_latents(vae: AutoencoderKL, videos: shapes.Video) -> None:
    """Changes the 1x1 convolutions around the latents so that these have mean 0 and covariance 1 over `videos`.

    Decoding an encoded frame gives the same picture as before. The posterior's variance is not per channel any more
    after the channels are mixed, and nothing downstream samples from it, so its average is stored as a constant.
    """
    posterior = vae.encode(pixels_from_videos(videos)).latent_dist
    means = posterior.mean.transpose(0, 1).flatten(1).double()
    centre, (values, vectors) = means.mean(1), torch.linalg.eigh(torch.cov(means))
    whiten = (vectors * values.rsqrt()) @ vectors.T
    restore = (vectors * values.sqrt()) @ vectors.T
    channels = len(centre)
    into, out_of = vae.quant_conv, vae.post_quant_conv
    weight, bias = into.weight[:channels, :, 0, 0].double(), into.bias[:channels].double()
    into.weight[:channels] = (whiten @ weight).float()[:, :, None, None]
    into.bias[:channels] = (whiten @ (bias - centre)).float()
    into.weight[channels:] = 0
    into.bias[channels:] = (whiten.square() @ posterior.var.mean((0, 2, 3)).double()).log().float()
    weight = out_of.weight[:, :, 0, 0].double()
    out_of.bias.add_((weight @ centre).float())
    out_of.weight.copy_((weight @ restore).float()[:, :, None, None])


# ---------------------------------------------------------------------------------------------------------------
# Latents


@torch.no_grad()
def training_latents(settings: Settings, vae: AutoencoderKL) -> tuple[Tensor, Tensor]:
    """This process's share of the training set.

    Returns:
        Posterior means in patch space, float32 (videos, frames, tokens, features), and combinations, int64 (videos,).
    """
    rank, share = dist.get_rank(), settings.videos // settings.processes
    file = settings.work / f"latents-{rank}-of-{settings.processes}.pt"
    if not file.exists():
        videos, labels = shapes.make_dataset(share, settings.seed, first=rank * share)
        patches = []
        for chunk in np.array_split(videos, math.ceil(share / 64)):
            means = vae.encode(pixels_from_videos(chunk)).latent_dist.mean
            latents = means.unflatten(0, (len(chunk), shapes.FRAMES)).transpose(1, 2)
            patches.append(patches_from_latents(latents, PATCH))
        save_state(file, {"patches": torch.cat(patches), "labels": torch.from_numpy(labels)})
    state = torch.load(file, weights_only=True)
    return state["patches"], state["labels"]


# ---------------------------------------------------------------------------------------------------------------
# Text encoder and transformer


def caption_tokens() -> tuple[Tensor, Tensor]:
    """Token ids and attention masks, int64 (37, 6): the captions of `shapes.trained()`, then the empty caption.

    The pipeline pads to 120 tokens, encodes, and cuts prompt and empty prompt to the length of the prompt. Padding is
    masked in the encoder and relative positions do not depend on length, so cutting first gives the same embeddings.
    """
    tokenizer = make_tokenizer()
    captions = [combination.caption for combination in shapes.trained()] + [""]
    tokens = tokenizer(captions, padding="longest", return_tensors="pt")
    return tokens.input_ids, tokens.attention_mask


def noisy_batch(
    clean: Tensor, alphas: Tensor, generator: torch.Generator, mean_share: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws timesteps and noise.

    Timesteps are 1000 sigmoid(N(0.4, 1)), which favours the noise levels where structure and motion are decided; 15 %
    are uniform, so that none is left out, and a share of `mean_share` is at least MEAN_FROM. Clean latents are
    weighted by min(1 / (1 - alpha), 2).

    Returns:
        Noisy latents like `clean`, timesteps int64 (batch,) and loss weights float32 (batch,).
    """
    count = len(clean)
    timesteps = 1000 * torch.sigmoid(0.4 + torch.randn(count, generator=generator))
    uniform, kind = torch.rand(count, generator=generator), torch.rand(count, generator=generator)
    timesteps = torch.where(kind < 0.15 + mean_share, 1000 * uniform, timesteps)
    timesteps = torch.where(kind < mean_share, MEAN_FROM + (1000 - MEAN_FROM) * uniform, timesteps).long().clamp(0, 999)
    alpha = alphas[timesteps]
    noise = torch.randn(clean.shape, generator=generator)
    scale = alpha.view(-1, 1, 1, 1)
    return scale.sqrt() * clean + (1 - scale).sqrt() * noise, timesteps, (1 / (1 - alpha)).clamp(max=2)


def caption_means(clean: Tensor, labels: Tensor) -> Tensor:
    """Mean latents of the videos of every caption, and of all for the empty one: (37, frames, tokens, features)."""
    means = [clean[labels == label].mean(0) for label in range(len(shapes.trained()))]
    stacked = torch.stack([*means, clean.mean(0)])
    dist.all_reduce(stacked)
    return stacked / dist.get_world_size()


def train_denoiser(settings: Settings, clock: Clock) -> bool:
    """Trains text encoder and transformer together, replacing the checkpoint now and then."""
    rank, batch = dist.get_rank(), settings.batch // settings.processes
    vae = AutoencoderKL.from_pretrained(settings.work / "vae")
    clean, labels = training_latents(settings, vae)
    means = caption_means(clean, labels)
    ids, mask = caption_tokens()
    torch.manual_seed(settings.seed)
    text_encoder, transformer = make_text_encoder(len(make_tokenizer())), make_transformer()
    check_forward(transformer)
    optimiser = FlatAdamW([text_encoder, transformer], torch.bfloat16)
    alphas = make_scheduler().alphas_cumprod

    def loss(step: int) -> Tensor:
        generator = generator_for(settings.seed, 2, step, rank)
        chosen = torch.randint(len(clean), (batch,), generator=generator)
        use_means = step * settings.batch >= settings.mean_targets_after
        noisy, timesteps, weight = noisy_batch(clean[chosen], alphas, generator, MEAN_SHARE if use_means else 0.0)
        dropped = torch.rand(batch, generator=generator) < settings.caption_dropout
        captions = labels[chosen].masked_fill(dropped, len(ids) - 1)
        text = text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state[captions]
        predicted = predict(transformer, noisy.bfloat16(), timesteps, text).float()
        averaged = (timesteps >= MEAN_FROM) & use_means
        target = torch.where(averaged.view(-1, 1, 1, 1), means[captions], clean[chosen])
        return (weight * (predicted - target).square().mean((1, 2, 3))).mean()

    steps = settings.samples // settings.batch

    def learning_rate(step: int) -> float:
        return settings.learning_rate * min(1.0, (step + 1) / 100) * cosine(2 * step / steps - 1)

    def export(seconds: float, mean_loss: float) -> None:
        averaged = make_text_encoder(len(make_tokenizer())), make_transformer()
        optimiser.copy_average_to(averaged)
        save_checkpoint(settings.output, vae, *averaged)
        samples = optimiser.steps * settings.batch
        record = {"samples": samples, "steps": optimiser.steps, "seconds": round(seconds), "loss": round(mean_loss, 5)}
        record["samples_per_second"] = round(samples / max(seconds, 1e-9), 1)
        write_record(settings, "denoiser", record)
        logger.info("checkpoint after %d samples (%.1f a second)", samples, record["samples_per_second"])

    return run_stage(Stage("denoiser-state", steps, loss, learning_rate, export), optimiser, settings, clock)


@torch.no_grad()
def check_forward(transformer: LatteTransformer3DModel) -> None:
    """Raises if `demo.forward` and diffusers disagree, with every weight moved away from zero for the comparison."""
    generator = generator_for(3)
    original = [parameter.clone() for parameter in transformer.parameters()]
    for parameter in transformer.parameters():
        parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    latents = torch.randn(2, 4, shapes.FRAMES, 16, 16, generator=generator)
    timesteps, text = torch.tensor([20, 900]), torch.randn(2, 6, 64, generator=generator)
    expected = transformer(latents, timesteps, text).sample[:, :4]
    actual = latents_from_patches(predict(transformer, patches_from_latents(latents, PATCH), timesteps, text), PATCH)
    for parameter, value in zip(transformer.parameters(), original, strict=True):
        parameter.copy_(value)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------------
# Processes and command line


def write_record(settings: Settings, part: str, record: dict[str, Any]) -> None:
    """Notes the outcome of a stage beside the checkpoint, in `training.json`."""
    file = settings.output.parent / "training.json"
    records = json.loads(file.read_text()) if file.exists() else {}
    chosen = {key: value for key, value in asdict(settings).items() if isinstance(value, int | float)}
    records["settings"] = {key: value for key, value in chosen.items() if not key.endswith("_s")}
    records[part] = record
    file.write_text(json.dumps(records, indent=1) + "\n")


def worker(rank: int, settings: Settings) -> None:
    """One training process."""
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(asctime)s %(message)s")
    dist.init_process_group("gloo", f"file://{settings.work}/rendezvous", rank=rank, world_size=settings.processes)
    clock = Clock(time.time(), settings.stop_after_s)
    if train_vae(settings, clock):
        train_denoiser(settings, clock)
    dist.destroy_process_group()


def parse_settings(arguments: list[str] | None = None) -> Settings:
    """Settings from the command line; defaults are those of `Settings`."""
    parser = argparse.ArgumentParser(
        prog="python -m demo.train",
        description="Makes the demo checkpoint; run it again to continue after an interruption.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for field in fields(Settings):
        option = "--" + field.name.replace("_", "-")
        parser.add_argument(option, type=type(field.default), default=field.default, help=HELP[field.name])
    return Settings(**vars(parser.parse_args(arguments)))


def main() -> None:
    """Runs all stages that are not complete yet."""
    settings = parse_settings()
    settings.work.mkdir(parents=True, exist_ok=True)
    (settings.work / "rendezvous").unlink(missing_ok=True)
    spawn(worker, args=(settings,), nprocs=settings.processes)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
