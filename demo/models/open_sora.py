"""Open-Sora 1.2: a two-stage video autoencoder and STDiT3, trained as a rectified flow.

diffusers has none of it, so the parts are the exporter's modules, whose weights have the original's names, and videos
are made by the plain loop below. Times here are the original's divided by 1000: 1 is noise, 0 is clean. The text
encoder is Latte's, frozen.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import T5EncoderModel, T5Tokenizer

from demo import shapes
from demo.checkpoint import replace_folder
from demo.model import ROOT, Model, Sampling
from demo.models.open_sora_forward import FPS, latents_from_patches, patches_from_latents, predict, rotations
from demo.models.open_sora_vae import (
    AUTOENCODER,
    FRAMES,
    LATENT_CHANNELS,
    LATENT_FRAMES,
    LATENT_STD,
    load_vae,
    save_vae,
)
from demo.optimiser import FlatAdamW
from demo.text import WIDTH as TEXT_WIDTH
from demo.text import load_text_encoder, load_tokenizer
from demo.training import (
    Batch,
    Clock,
    NoiseLevels,
    Settings,
    TrainingSet,
    generator_for,
    moved_weights,
    over_batch,
    pixels_from_videos,
    train_denoiser_by,
    training_latents,
)
from foresight.exporter.models.open_sora.config import STDiT3Config
from foresight.exporter.models.open_sora.stdit3 import STDiT3
from foresight.exporter.models.open_sora.vae import VideoVAE

LATENT_SIZE = 16
PATCH = 4
WIDTH = 128
SUFFIX = " aesthetic score: 6.5."
"""What the original appends to every prompt."""
SETTINGS = Settings(
    work=ROOT / "work" / "open_sora",
    output=ROOT / "open_sora",
    records=ROOT / "records" / "open_sora",
    videos=5_120,
    vae_steps=1_600,
    vae_batch=2,
    vae_learning_rate=2e-3,
)
LEVELS = NoiseLevels(centre=1.5, spread=1.25, mean_from=0.988, mean_share=0.15)


def transformer_config() -> dict[str, Any]:
    """The content of `config.json`, in the original's words."""
    config = STDiT3Config(
        hidden_size=WIDTH,
        depth=6,
        num_heads=4,
        in_channels=LATENT_CHANNELS,
        patch_size=(1, PATCH, PATCH),
        caption_channels=TEXT_WIDTH,
        model_max_length=16,
        input_sq_size=shapes.SIZE,
    )
    size = [LATENT_FRAMES, LATENT_SIZE, LATENT_SIZE]  # of the videos it is for: published models, for many, have null
    return {"model_type": "STDiT3", "input_size": size, "qk_norm": True, "skip_y_embedder": False, **asdict(config)}


def make_transformer() -> STDiT3:
    """STDiT3 of 6 spatial and 6 temporal blocks with the starting values of `initialise_transformer`."""
    transformer = STDiT3(STDiT3Config.from_json(transformer_config()))
    initialise_transformer(transformer)
    return transformer


@torch.no_grad()
def initialise_transformer(transformer: STDiT3) -> None:
    """Opens all gates, so that every block is in the signal path from the first step; overwrites linear layers.

    The empty prompt's embedding is drawn from a seed of its own and never trained, as in the original.
    """
    null = transformer.y_embedder.y_embedding
    null.copy_(torch.randn(null.shape, generator=generator_for(4)) / TEXT_WIDTH**0.5)
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    blocks = [*transformer.spatial_blocks, *transformer.temporal_blocks]
    for block in blocks:
        for linear in (block.attn.proj, block.cross_attn.proj, block.mlp.fc2):
            linear.weight.mul_(len(blocks) ** -0.5)
        block.scale_shift_table.view(2, 3, -1).copy_(torch.tensor([0.0, 0.0, 1.0])[:, None])  # the gates are last
    patches = transformer.x_embedder.proj
    nn.init.xavier_uniform_(patches.weight.view(patches.weight.shape[0], -1))
    for zero in (patches.bias, transformer.t_block[1].weight):
        nn.init.zeros_(cast("Tensor", zero))
    nn.init.zeros_(transformer.final_layer.scale_shift_table)
    nn.init.zeros_(transformer.final_layer.linear.weight)


# ---------------------------------------------------------------------------------------------------------------
# Training


@torch.no_grad()
def encode_prompts(tokenizer: T5Tokenizer, text_encoder: T5EncoderModel, prompts: list[str]) -> Tensor:
    """Embeddings of prompts of equal length, with what is appended to them: (prompts, tokens, 64)."""
    tokens = tokenizer([prompt + SUFFIX for prompt in prompts], return_tensors="pt")
    embeddings: Tensor = text_encoder(input_ids=tokens.input_ids).last_hidden_state
    return embeddings


def caption_embeddings(transformer: STDiT3) -> Tensor:
    """Embeddings of the captions of `shapes.trained()` and of the empty one, which is cut to their length."""
    captions = [combination.caption for combination in shapes.trained()]
    text = encode_prompts(load_tokenizer(), load_text_encoder(), captions)
    null = transformer.y_embedder.y_embedding.detach()[: text.shape[1]]
    return torch.cat([text, null.unsqueeze(0)])


def times_from_levels(levels: Tensor) -> Tensor:
    """Times of the flow at which its latents are as noisy as latents of variance 1 are at those times."""
    return LATENT_STD * levels / (1 - levels + LATENT_STD * levels)


def noisy_latents(batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mixes clean latents with noise.

    The loss weight of the velocity is such that the clean latents it implies have, as multiples of LATENT_STD, the
    weight min(1 / (1 - alpha), 2) of `demo.models.latte`, where alpha is their share in the variance.

    Returns:
        Noisy latents and velocities like `batch.clean`; times in [0, 1] and loss weights, float32 (batch,) each.
    """
    times = times_from_levels(batch.levels)
    share = over_batch(times, batch.clean)
    noisy = (1 - share) * batch.clean + share * batch.noise
    signal, noise = (1 - batch.levels).square(), batch.levels.square()
    weight = ((signal + noise) / noise.clamp(min=1e-6)).clamp(max=2)
    return noisy, batch.target - batch.noise, times, (times / LATENT_STD).square() * weight


def train_denoiser(settings: Settings, clock: Clock) -> bool:
    """Trains the transformer, replacing the checkpoint now and then."""
    rank = dist.get_rank()
    vae = load_vae(settings.work / "vae")

    def patches_from_videos(videos: shapes.Video) -> Tensor:
        return patches_from_latents(vae.encode(pixels_from_videos(videos), sample=False), PATCH)

    examples = TrainingSet(*training_latents(settings, FRAMES, patches_from_videos))
    torch.manual_seed(settings.seed)
    transformer = make_transformer()
    check_forward(transformer)
    text, turns = caption_embeddings(transformer), rotations(transformer, LATENT_FRAMES)
    optimiser = FlatAdamW([transformer], torch.float32)

    def loss(step: int) -> Tensor:
        batch = examples.draw(settings, LEVELS, generator_for(settings.seed, 2, step, rank))
        noisy, velocity, times, weight = noisy_latents(batch)
        predicted = predict(transformer, noisy, 1000 * times, text[batch.captions], turns)
        return (weight * examples.errors(predicted - velocity, batch)).mean()

    def save() -> None:
        averaged = make_transformer()
        optimiser.copy_average_to([averaged])
        save_checkpoint(settings.output, vae, averaged)

    return train_denoiser_by(loss, save, optimiser, settings, clock)


@torch.no_grad()
def check_forward(transformer: STDiT3) -> None:
    """Raises if `open_sora_forward` and the module disagree, with every weight moved away from its starting value."""
    with moved_weights(transformer) as generator:
        latents = torch.randn(2, LATENT_CHANNELS, LATENT_FRAMES, LATENT_SIZE, LATENT_SIZE, generator=generator)
        timesteps, text = torch.tensor([20.0, 1000.0]), torch.randn(2, 12, TEXT_WIDTH, generator=generator)
        expected = velocity(transformer, latents, timesteps, text)
        turns = rotations(transformer, LATENT_FRAMES)
        actual = predict(transformer, patches_from_latents(latents, PATCH), timesteps, text, turns)
    torch.testing.assert_close(latents_from_patches(actual, PATCH), expected, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------------
# Checkpoint


@dataclass(frozen=True)
class OpenSora:
    """The parts of a checkpoint, float32 on the CPU."""

    tokenizer: T5Tokenizer
    text_encoder: T5EncoderModel
    transformer: STDiT3
    vae: VideoVAE


def save_checkpoint(folder: Path, vae: VideoVAE, transformer: STDiT3) -> None:
    """Writes `transformer`, `vae`, `text_encoder` and `tokenizer`, float32, replacing what was there."""

    def write(fresh: Path) -> None:
        (fresh / "transformer").mkdir(parents=True)
        config = json.dumps(transformer_config(), indent=2, sort_keys=True) + "\n"
        (fresh / "transformer" / "config.json").write_text(config)
        weights = {name: weight.detach().contiguous() for name, weight in transformer.state_dict().items()}
        save_file(weights, fresh / "transformer" / "model.safetensors")
        save_vae(fresh / "vae", vae)
        load_text_encoder().save_pretrained(fresh / "text_encoder")
        load_tokenizer().save_pretrained(fresh / "tokenizer")

    replace_folder(folder, write)


def load_checkpoint(folder: Path) -> OpenSora:
    """All parts of a checkpoint folder."""
    config = STDiT3Config.from_json(json.loads((folder / "transformer" / "config.json").read_text()))
    transformer = STDiT3(config)
    transformer.load_state_dict(load_file(folder / "transformer" / "model.safetensors"))
    return OpenSora(
        tokenizer=T5Tokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder=T5EncoderModel.from_pretrained(folder / "text_encoder"),
        transformer=transformer.eval().requires_grad_(False),
        vae=load_vae(folder / "vae"),
    )


# ---------------------------------------------------------------------------------------------------------------
# Sampling


def flow_times(steps: int) -> list[float]:
    """Times of the steps, from 1 downwards, after the original's correction for the size of the video.

    The larger the video, the more noise it takes to hide it. For these, which are tiny, most steps go to low noise.
    """
    ratio = (shapes.SIZE * shapes.SIZE / 512**2) ** 0.5 * LATENT_FRAMES**0.5
    evenly = [1 - step / steps for step in range(steps)]
    return [ratio * time / (1 + (ratio - 1) * time) for time in evenly]


def intervals(times: list[float]) -> Iterator[tuple[float, float]]:
    """Each time with the way to the next one, and from the last one to 0."""
    for time, following in zip(times, [*times[1:], 0.0], strict=True):
        yield time, time - following


def velocity(transformer: STDiT3, latents: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
    """The transformer's first `in_channels` output channels; all of `text` is attended to."""
    mask = torch.ones(text.shape[:2], dtype=torch.int64)
    size = {"height": float(shapes.SIZE), "width": float(shapes.SIZE)}
    output: Tensor = transformer(latents, timesteps, text, mask, fps=FPS, **size)
    return output[:, :LATENT_CHANNELS]


@torch.no_grad()
def generate(model: OpenSora, prompt: str, seed: int, sampling: Sampling) -> shapes.Video:
    """Euler steps along the guided velocity, with prompt and empty prompt in one batch; uint8 (17, 32, 32, 3)."""
    text = encode_prompts(model.tokenizer, model.text_encoder, [prompt])
    text = torch.cat([text, model.transformer.y_embedder.y_embedding[None, : text.shape[1]]])
    shape = (1, LATENT_CHANNELS, LATENT_FRAMES, LATENT_SIZE, LATENT_SIZE)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    for time, way in intervals(flow_times(sampling.steps)):
        timesteps = torch.full((2,), 1000 * time)
        prompted, unprompted = velocity(model.transformer, latents.repeat(2, 1, 1, 1, 1), timesteps, text).chunk(2)
        latents = latents + way * (unprompted + sampling.guidance * (prompted - unprompted))
    frames = model.vae.decode(latents, FRAMES)[0].permute(1, 2, 3, 0)
    video: shapes.Video = np.rint(frames.clamp(-1, 1).add(1).mul(127.5).numpy()).astype(np.uint8)
    return video


MODEL = Model(
    name="open_sora",
    frames=FRAMES,
    settings=SETTINGS,
    stages=(AUTOENCODER.train, train_denoiser),
    sampling=Sampling(steps=30, guidance=2.0),
    load=load_checkpoint,
    generate=generate,
)
