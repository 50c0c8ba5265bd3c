"""Training computes what the shipped classes compute: forward passes, captions, optimiser and pictures are the same."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.distributed as dist
from diffusers import AutoencoderKL, CogVideoXPipeline, LattePipeline, WanPipeline
from torch import Tensor, nn

from demo import shapes, text, train, training
from demo.model import ROOT
from demo.models import MODELS, cogvideox, cogvideox_vae, latte, open_sora, open_sora_vae, wan, wan_vae
from demo.models import cogvideox_forward as cogvideox_patches
from demo.models import latte_forward as latte_patches
from demo.models import wan_forward as wan_patches
from demo.optimiser import FlatAdamW

RECIPES = [latte, cogvideox, open_sora, wan]


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A group of one process, as training has it."""
    dist.init_process_group("gloo", f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_compact_forward_is_the_forward_of_the_module(recipe: ModuleType) -> None:
    recipe.check_forward(recipe.make_transformer())


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_check_of_the_forward_notices_a_difference(recipe: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = recipe.predict
    monkeypatch.setattr(recipe, "predict", lambda *arguments: plain(*arguments) * 1.01)
    with pytest.raises(AssertionError):
        recipe.check_forward(recipe.make_transformer())


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_check_of_the_forward_leaves_the_weights_alone(recipe: ModuleType) -> None:
    transformer = recipe.make_transformer()
    before = copy.deepcopy(transformer.state_dict())
    recipe.check_forward(transformer)
    assert all(torch.equal(value, before[name]) for name, value in transformer.state_dict().items())


def test_patch_space_is_a_rearrangement() -> None:
    latents = torch.randn(2, 4, 8, 16, 16)
    patches = latte_patches.patches_from_latents(latents, patch=4)
    assert patches.shape == (2, 8, 16, 64)
    assert torch.equal(latte_patches.latents_from_patches(patches, patch=4), latents)


def test_the_patch_space_of_cogvideox_is_a_rearrangement() -> None:
    latents = torch.randn(2, 5, 4, 16, 16)
    patches = cogvideox_patches.patches_from_latents(latents, patch=4)
    assert patches.shape == (2, 80, 64)
    assert torch.equal(cogvideox_patches.latents_from_patches(patches, patch=4, frames=5), latents)


def test_the_patch_space_of_wan_is_a_rearrangement() -> None:
    latents = torch.randn(2, 4, 5, 16, 16)
    patches = wan_patches.patches_from_latents(latents, patch=4)
    assert patches.shape == (2, 80, 64)
    assert torch.equal(wan_patches.latents_from_patches(patches, patch=4, frames=5), latents)


def test_training_sees_the_embeddings_that_the_latte_pipeline_uses() -> None:
    tokenizer = text.make_tokenizer()
    text_encoder = text.make_text_encoder(len(tokenizer)).eval()
    pipeline = LattePipeline(tokenizer, text_encoder, latte.make_vae(), latte.make_transformer(), None)
    ids, mask = latte.caption_tokens()
    with torch.no_grad():
        seen = text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        for i, combination in enumerate(shapes.trained()):
            prompt, negative = pipeline.encode_prompt(combination.caption, clean_caption=False)
            torch.testing.assert_close(seen[i], prompt[0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(seen[-1], negative[0], atol=1e-5, rtol=1e-5)


def test_training_sees_the_embeddings_that_the_cogvideox_pipeline_uses() -> None:
    encoder = text.load_text_encoder()
    pipeline = CogVideoXPipeline(text.load_tokenizer(), encoder, cogvideox_vae.make_vae(), None, None)
    seen = cogvideox.caption_embeddings()
    for i, combination in enumerate(shapes.trained()):
        prompt, negative = pipeline.encode_prompt(combination.caption, max_sequence_length=cogvideox.TEXT_LENGTH)
        torch.testing.assert_close(seen[i], prompt[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(seen[-1], negative[0], atol=1e-5, rtol=1e-5)


def test_training_sees_the_embeddings_that_the_wan_pipeline_uses() -> None:
    encoder = wan.umt5_from_t5(text.load_text_encoder())
    pipeline = WanPipeline(wan.make_tokenizer(), encoder, wan_vae.make_vae(), wan.make_scheduler())
    seen = wan.caption_embeddings()
    for i, combination in enumerate(shapes.trained()):
        prompt, negative = pipeline.encode_prompt(combination.caption, max_sequence_length=wan.TEXT_LENGTH)
        torch.testing.assert_close(seen[i], prompt[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(seen[-1], negative[0], atol=1e-5, rtol=1e-5)


def test_the_text_encoder_of_wan_computes_what_that_of_latte_does() -> None:
    encoder = text.load_text_encoder()
    ids = torch.randint(17, (2, 9), generator=training.generator_for(1))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    with torch.no_grad():
        expected = encoder(ids, mask).last_hidden_state
        assert torch.equal(wan.umt5_from_t5(encoder)(ids, mask).last_hidden_state, expected)


def test_the_rotary_positions_are_those_of_the_cogvideox_pipeline() -> None:
    transformer = cogvideox.make_transformer()
    pipeline = CogVideoXPipeline(None, None, cogvideox_vae.make_vae(), transformer, cogvideox.make_scheduler())
    expected = pipeline._prepare_rotary_positional_embeddings(shapes.SIZE, shapes.SIZE, 5, torch.device("cpu"))
    for actual, wanted in zip(cogvideox_patches.rotary_embedding(transformer, 5), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_the_empty_open_sora_prompt_is_cut_to_the_length_of_the_others() -> None:
    transformer = open_sora.make_transformer()
    seen = open_sora.caption_embeddings(transformer)
    assert torch.equal(seen[-1], transformer.y_embedder.y_embedding[: seen.shape[1]])


def test_whitening_changes_latents_and_not_pictures() -> None:
    torch.manual_seed(0)
    vae, videos = latte.make_vae(), shapes.make_dataset(8, seed=0)[0]
    pixels = latte.frames_from_videos(videos)
    with torch.no_grad():
        before = vae.decode(vae.encode(pixels).latent_dist.mean).sample
        latte.whiten_latents(vae, videos)
        latents = vae.encode(pixels).latent_dist.mean
        torch.testing.assert_close(vae.decode(latents).sample, before, atol=1e-4, rtol=1e-4)
    assert_white(latents)
    assert latents.mean((0, 2, 3)).abs().max() < 1e-2


def test_whitening_changes_video_latents_and_not_videos() -> None:
    torch.manual_seed(0)
    vae, videos = cogvideox_vae.make_vae(), shapes.make_dataset(4, seed=0, frames=9)[0]
    pixels = training.pixels_from_videos(videos)
    with torch.no_grad():
        before = vae.decode(vae.encode(pixels).latent_dist.mean).sample
        cogvideox_vae.whiten_latents(vae, videos)
        latents = vae.encode(pixels).latent_dist.mean
        torch.testing.assert_close(vae.decode(latents).sample, before, atol=1e-4, rtol=1e-4)
    assert_white(latents)


def test_turning_the_latents_of_wan_changes_no_video() -> None:
    torch.manual_seed(0)
    vae, videos = wan_vae.make_vae(), shapes.make_dataset(4, seed=0, frames=9)[0]
    pixels = training.pixels_from_videos(videos)
    with torch.no_grad():
        before = vae.decode(vae.encode(pixels).latent_dist.mean).sample
        wan_vae.find_axes(vae, videos)
        latents = vae.encode(pixels).latent_dist.mean
        torch.testing.assert_close(vae.decode(latents).sample, before, atol=1e-4, rtol=1e-4)
    mean, std = wan_vae.statistics(vae)
    standardised = (latents - mean) / std
    assert_white(standardised)
    assert standardised.mean((0, 2, 3, 4)).abs().max() < 1e-2


def test_the_autoencoder_of_wan_is_coded_all_at_once_as_one_latent_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    vae = wan_vae.make_vae()
    before = copy.deepcopy(vae.state_dict())
    wan_vae.check_coding(vae)
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())
    plain = wan_vae._double
    monkeypatch.setattr(wan_vae, "_double", lambda layer, hidden: plain(layer, hidden) * 1.01)
    with pytest.raises(AssertionError):
        wan_vae.check_coding(vae)


def test_a_still_video_of_wan_starts_out_coded_as_its_frame() -> None:
    vae = wan_vae.make_vae()
    frame = training.pixels_from_videos(shapes.make_dataset(1, seed=0)[0][:, :1])
    with torch.no_grad():
        alone = vae.encode(frame).latent_dist.mean
        still = vae.encode(frame.expand(-1, -1, 9, -1, -1)).latent_dist.mean
        torch.testing.assert_close(still, alone.expand_as(still), atol=1e-5, rtol=1e-5)
        decoded = vae.decode(still).sample
        torch.testing.assert_close(decoded, vae.decode(alone).sample.expand_as(decoded), atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", MODELS)
def test_an_autoencoder_is_left_in_the_work_folder_when_it_is_trained(name: str, tmp_path: Path) -> None:
    settings = replace(
        MODELS[name].settings, work=tmp_path, records=tmp_path / "records", processes=1, videos=36, vae_batch=1,
        vae_steps=2,
    )  # fmt: skip
    stage, clock = MODELS[name].stages[0], training.Clock(time.time(), 0)
    assert not stage(settings, clock) and not (tmp_path / "vae").exists()
    assert stage(settings, training.Clock(time.time(), math.inf))
    assert (tmp_path / "vae" / "config.json").is_file() and not (tmp_path / "vae.fresh").exists()
    record = json.loads((tmp_path / "records" / "training.json").read_text())
    assert record["vae"]["steps"] == 2 and math.isfinite(record["vae"]["psnr_db"])
    before = (tmp_path / "vae-state.pt").stat().st_mtime_ns
    assert stage(settings, clock), "complete, so nothing is left to train"
    assert (tmp_path / "vae-state.pt").stat().st_mtime_ns == before


def assert_white(latents: Tensor) -> None:
    covariance = torch.cov(latents.transpose(0, 1).flatten(1))
    torch.testing.assert_close(covariance, torch.eye(4), atol=1e-2, rtol=0)


def test_a_still_video_starts_out_coded_as_its_frame() -> None:
    image_vae, vae = AutoencoderKL.from_pretrained(cogvideox_vae.START), cogvideox_vae.make_vae()
    cogvideox_vae.start_from_images(vae, image_vae)
    frame = shapes.make_dataset(1, seed=0)[0][:, :1]
    with torch.no_grad():
        expected = image_vae.encode(latte.frames_from_videos(frame)).latent_dist.mean
        actual = vae.encode(training.pixels_from_videos(frame.repeat(9, axis=1))).latent_dist.mean
    torch.testing.assert_close(actual, expected.unsqueeze(2).expand_as(actual), atol=1e-3, rtol=1e-3)


def test_the_factor_of_open_sora_is_taken_back() -> None:
    image_vae, vae = AutoencoderKL.from_pretrained(open_sora_vae.START), open_sora_vae.make_vae()
    frames = shapes.make_dataset(2, seed=0)[0][:, :1]
    pixels = training.pixels_from_videos(frames)
    with torch.no_grad():
        expected = image_vae.encode(latte.frames_from_videos(frames)).latent_dist.mean
        states = vae.spatial_vae.encode(pixels, sample=False)
        torch.testing.assert_close(states[:, :, 0], expected, atol=1e-4, rtol=1e-4)
        decoded = image_vae.decode(expected).sample
        torch.testing.assert_close(vae.spatial_vae.decode(states)[:, :, 0], decoded, atol=1e-4, rtol=1e-4)


def test_standardised_open_sora_latents_have_mean_0_and_the_deviation_asked_for() -> None:
    torch.manual_seed(0)
    vae, videos = open_sora_vae.make_vae(), shapes.make_dataset(4, seed=0, frames=17)[0]
    open_sora_vae.standardise_latents(vae, videos)
    with torch.no_grad():
        latents = vae.encode(training.pixels_from_videos(videos), sample=False)
    torch.testing.assert_close(latents.mean((0, 2, 3, 4)), torch.zeros(4), atol=1e-3, rtol=0)
    deviation = torch.full((4,), open_sora_vae.LATENT_STD)
    torch.testing.assert_close(latents.std((0, 2, 3, 4)), deviation, atol=1e-3, rtol=0)


def test_an_open_sora_checkpoint_is_read_as_it_was_written(tmp_path: Path) -> None:
    vae, transformer = open_sora_vae.make_vae(), open_sora.make_transformer()
    open_sora.save_checkpoint(tmp_path / "checkpoint", vae, transformer)
    loaded = open_sora.load_checkpoint(tmp_path / "checkpoint")
    for module, other in ((vae, loaded.vae), (transformer, loaded.transformer)):
        weights = other.state_dict()
        assert all(torch.equal(weight, weights[name]) for name, weight in module.state_dict().items())


def test_the_flat_optimiser_is_adamw() -> None:
    torch.manual_seed(0)
    flat, plain = (nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)) for _ in range(2))
    plain.load_state_dict(flat.state_dict())
    optimiser = FlatAdamW([flat], torch.float32)
    reference = torch.optim.AdamW(plain.parameters(), lr=0.01, betas=(0.9, 0.99), weight_decay=0.01)
    for _ in range(5):
        inputs = torch.randn(4, 3)
        for model in (flat, plain):
            torch.autograd.backward(model(inputs).square().mean())
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimiser.step(0.01)
        reference.step()
        reference.zero_grad()
    for actual, expected in zip(flat.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(actual, expected)


def test_a_continued_optimiser_takes_the_steps_of_an_unbroken_one() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    unbroken = FlatAdamW([model], torch.bfloat16)
    inputs = torch.randn(4, 3, dtype=torch.bfloat16)

    def step(module: nn.Module, optimiser: FlatAdamW) -> None:
        torch.autograd.backward(module(inputs).square().mean())
        optimiser.step(0.01)

    step(model, unbroken)
    other = nn.Linear(3, 2)
    continued = FlatAdamW([other], torch.bfloat16)
    continued.load_state_dict(copy.deepcopy(unbroken.state_dict()))
    step(model, unbroken)
    step(other, continued)
    assert torch.equal(model.weight, other.weight)
    assert continued.steps == unbroken.steps == 2


def test_frozen_parameters_are_neither_trained_nor_averaged() -> None:
    transformer = open_sora.make_transformer()
    before = transformer.y_embedder.y_embedding.clone()
    optimiser = FlatAdamW([transformer], torch.float32)
    optimiser.step(0.1)
    averaged = open_sora.make_transformer()
    optimiser.copy_average_to([averaged])
    for module in (transformer, averaged):
        assert torch.equal(module.y_embedder.y_embedding, before)


def batch_of_zeros(levels: training.NoiseLevels, count: int = 4000) -> training.Batch:
    generator = training.generator_for(1)
    drawn, clean = levels.draw(count, generator), torch.zeros(count, 1, 1)
    noise = torch.randn(clean.shape, generator=generator)
    nothing = torch.zeros(count, dtype=torch.int64)
    return training.Batch(clean, clean, noise, drawn, drawn >= levels.mean_from, nothing)


def test_the_noise_of_latte_follows_its_scheduler() -> None:
    alphas = latte.make_scheduler().alphas_cumprod
    noisy, timesteps, weight = latte.noisy_latents(batch_of_zeros(latte.LEVELS), alphas)
    spread = (noisy.flatten() / (1 - alphas[timesteps]).sqrt()).std().item()
    assert spread == pytest.approx(1, abs=0.05)
    assert timesteps.min() >= 0 and timesteps.max() <= 999
    assert weight.max() <= 2


def test_latents_and_velocities_of_cogvideox_are_those_of_its_scheduler() -> None:
    scheduler, batch = cogvideox.make_scheduler(), batch_of_zeros(cogvideox.LEVELS)
    clean = torch.randn(batch.clean.shape, generator=training.generator_for(2))
    batch = batch._replace(clean=clean, target=clean)
    noisy, velocity, timesteps, weight = cogvideox.noisy_latents(batch, scheduler.alphas_cumprod.float())
    expected = scheduler.add_noise(batch.clean, batch.noise, timesteps)
    torch.testing.assert_close(noisy, expected, atol=1e-5, rtol=1e-5)
    expected = scheduler.get_velocity(batch.clean, batch.noise, timesteps)
    torch.testing.assert_close(velocity, expected, atol=1e-5, rtol=1e-5)
    assert weight.min() > 0 and weight.max() <= 1


def test_the_velocity_of_open_sora_leads_from_noise_to_clean_latents() -> None:
    batch = batch_of_zeros(open_sora.LEVELS)
    batch = batch._replace(clean=torch.ones_like(batch.clean), target=torch.ones_like(batch.clean))
    noisy, velocity, times, _ = open_sora.noisy_latents(batch)
    torch.testing.assert_close(noisy + times.view(-1, 1, 1) * velocity, batch.clean, atol=1e-5, rtol=1e-5)


def test_the_latents_of_open_sora_are_as_noisy_as_the_level_says_of_latents_of_variance_1() -> None:
    batch = batch_of_zeros(open_sora.LEVELS)
    _, _, times, weight = open_sora.noisy_latents(batch)
    hidden, wanted = times / (1 - times) / open_sora_vae.LATENT_STD, batch.levels / (1 - batch.levels)
    torch.testing.assert_close(hidden, wanted, atol=1e-5, rtol=1e-3)
    implied = weight * (open_sora_vae.LATENT_STD / times).square()
    assert (implied.min().item(), implied.max().item()) == pytest.approx((1, 2), abs=1e-3)


def test_latents_and_velocities_of_wan_are_those_of_its_scheduler() -> None:
    scheduler, batch = wan.make_scheduler(), batch_of_zeros(wan.LEVELS)
    clean = torch.randn(batch.clean.shape, generator=training.generator_for(2))
    batch = batch._replace(clean=clean, target=clean)
    noisy, velocity, timesteps, weight = wan.noisy_latents(batch)
    torch.testing.assert_close(noisy - batch.levels.view(-1, 1, 1) * velocity, clean, atol=1e-5, rtol=1e-5)
    assert ((1000 * batch.levels - timesteps) < 1.001).all() and torch.equal(timesteps, timesteps.round())
    implied = weight / batch.levels.square()
    assert (implied.min().item(), implied.max().item()) == pytest.approx((1, 2), abs=1e-2)
    scheduler.set_timesteps(1)
    level = scheduler.sigmas[0]
    only = (1 - level) * clean + level * batch.noise
    cleaned = scheduler.step(batch.noise - clean, scheduler.timesteps[0], only).prev_sample
    torch.testing.assert_close(cleaned, clean, atol=1e-5, rtol=1e-5)


def test_open_sora_samples_from_noise_down_to_nothing() -> None:
    times = open_sora.flow_times(30)
    assert times[0] == 1
    assert times == sorted(times, reverse=True)
    assert sum(way for _, way in open_sora.intervals(times)) == pytest.approx(1)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_share_of_the_levels_is_drawn_where_means_are_targets(recipe: ModuleType) -> None:
    shares = []
    for mean_share in (0.0, 0.2):
        levels = replace(recipe.LEVELS, mean_share=mean_share)
        drawn = levels.draw(4000, training.generator_for(1))
        assert drawn.min() >= 0 and drawn.max() <= 1
        shares.append((drawn >= levels.mean_from).float().mean().item())
    assert shares[1] - shares[0] == pytest.approx(0.2, abs=0.03)


def test_latte_has_means_as_targets_only_after_the_time_set() -> None:
    settings = replace(latte.SETTINGS, mean_targets_after=240, batch=24)
    drawn = [latte.levels_after(settings, step).draw(4000, training.generator_for(1)) for step in (9, 10)]
    shares = [(levels >= latte.LEVELS.mean_from).float().mean().item() for levels in drawn]
    assert shares[1] - shares[0] == pytest.approx(latte.MEAN_SHARE, abs=0.03)
    assert latte.levels_after(settings, 9).mean_from == float("inf")


@pytest.mark.usefixtures("alone")
def test_what_tells_directions_apart_counts_more_where_means_are_targets() -> None:
    labels = torch.arange(72) % 36
    examples = training.TrainingSet(torch.randn(72, 5, 16), labels)
    levels = training.NoiseLevels(centre=0.0, spread=1.0, mean_from=0.9, mean_share=0.5)
    batch = examples.draw(replace(cogvideox.SETTINGS, batch=40), levels, training.generator_for(2))
    along = examples.contrasts[0].view(1, 5, 16).expand(40, -1, -1)
    errors = examples.errors(along, batch) * along[0].numel()
    torch.testing.assert_close(errors, 1 + training.CONTRAST_WEIGHT * batch.averaged.float())


@pytest.mark.usefixtures("alone")
def test_targets_are_the_latents_or_the_means_of_their_captions() -> None:
    clean, labels = torch.randn(72, 5), torch.arange(72) % 36
    examples = training.TrainingSet(clean, labels)
    settings = replace(cogvideox.SETTINGS, batch=200, caption_dropout=0.3)
    batch = examples.draw(settings, training.NoiseLevels(0.0, 1.0, 0.8, 0.3), training.generator_for(2))
    means = torch.stack([*((clean[:36] + clean[36:]) / 2), clean.mean(0)])
    torch.testing.assert_close(batch.target[batch.averaged], means[batch.captions[batch.averaged]])
    assert torch.equal(batch.target[~batch.averaged], batch.clean[~batch.averaged])
    assert 0 < batch.averaged.sum() < 200
    assert (batch.captions == 36).float().mean().item() == pytest.approx(0.3, abs=0.1)


def test_random_numbers_depend_on_the_key_only() -> None:
    draws = [
        torch.rand(3, generator=training.generator_for(*key)) for key in [(0, 2, 5, 1), (0, 2, 5, 1), (0, 2, 6, 1)]
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_shares_must_be_equal() -> None:
    with pytest.raises(ValueError, match="multiple of processes"):
        replace(latte.SETTINGS, batch=25, processes=2)


def test_every_process_must_see_every_combination() -> None:
    with pytest.raises(ValueError, match="at least 72"):
        replace(latte.SETTINGS, videos=70, processes=2)


@pytest.mark.parametrize("name", MODELS)
def test_the_command_line_has_the_defaults_of_the_model(name: str) -> None:
    assert train.parse_arguments(["--model", name]) == (MODELS[name], MODELS[name].settings)


@pytest.mark.parametrize("name", MODELS)
def test_models_keep_apart_what_they_write(name: str) -> None:
    model = MODELS[name]
    assert model.settings.output == model.checkpoint == ROOT / name
    assert model.settings.records == model.records
    assert model.settings.work.name == name


def test_the_cosine_falls_from_one_to_zero() -> None:
    values = [training.cosine(progress) for progress in np.linspace(-1, 1, 9)]
    assert values[0] == values[4] == 1
    assert values == sorted(values, reverse=True)
    assert values[-1] == pytest.approx(0)
