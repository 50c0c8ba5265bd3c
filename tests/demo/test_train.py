"""Training computes what the shipped classes compute: forward pass, captions, optimiser and pictures are the same."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from diffusers import LattePipeline
from torch import nn

from demo import checkpoint, forward, shapes, train
from demo.optimiser import FlatAdamW


def test_the_compact_forward_is_the_forward_of_diffusers() -> None:
    train.check_forward(checkpoint.make_transformer())


def test_the_check_of_the_forward_notices_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = forward.predict
    monkeypatch.setattr(train, "predict", lambda *arguments: plain(*arguments) * 1.01)
    with pytest.raises(AssertionError):
        train.check_forward(checkpoint.make_transformer())


def test_the_check_of_the_forward_leaves_the_weights_alone() -> None:
    transformer = checkpoint.make_transformer()
    before = copy.deepcopy(transformer.state_dict())
    train.check_forward(transformer)
    assert all(torch.equal(value, before[name]) for name, value in transformer.state_dict().items())


def test_patch_space_is_a_rearrangement() -> None:
    latents = torch.randn(2, 4, 8, 16, 16)
    patches = forward.patches_from_latents(latents, patch=4)
    assert patches.shape == (2, 8, 16, 64)
    assert torch.equal(forward.latents_from_patches(patches, patch=4), latents)


def test_training_sees_the_embeddings_that_the_pipeline_uses() -> None:
    tokenizer = checkpoint.make_tokenizer()
    text_encoder = checkpoint.make_text_encoder(len(tokenizer)).eval()
    pipeline = LattePipeline(tokenizer, text_encoder, checkpoint.make_vae(), checkpoint.make_transformer(), None)
    ids, mask = train.caption_tokens()
    with torch.no_grad():
        seen = text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        for i, combination in enumerate(shapes.trained()):
            prompt, negative = pipeline.encode_prompt(combination.caption, clean_caption=False)
            torch.testing.assert_close(seen[i], prompt[0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(seen[-1], negative[0], atol=1e-5, rtol=1e-5)


def test_whitening_changes_latents_and_not_pictures() -> None:
    torch.manual_seed(0)
    vae, videos = checkpoint.make_vae(), shapes.make_dataset(8, seed=0)[0]
    pixels = train.pixels_from_videos(videos)
    with torch.no_grad():
        before = vae.decode(vae.encode(pixels).latent_dist.mean).sample
        train.whiten_latents(vae, videos)
        latents = vae.encode(pixels).latent_dist.mean
        torch.testing.assert_close(vae.decode(latents).sample, before, atol=1e-4, rtol=1e-4)
    covariance = torch.cov(latents.transpose(0, 1).flatten(1))
    torch.testing.assert_close(covariance, torch.eye(4), atol=1e-2, rtol=0)
    assert latents.mean((0, 2, 3)).abs().max() < 1e-2


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


@pytest.mark.parametrize("mean_share", [0.0, 0.2])
def test_noise_follows_the_scheduler(mean_share: float) -> None:
    alphas = checkpoint.make_scheduler().alphas_cumprod
    clean = torch.zeros(4000, 1, 1, 1)
    noisy, timesteps, weight = train.noisy_batch(clean, alphas, train.generator_for(1), mean_share)
    spread = (noisy.flatten() / (1 - alphas[timesteps]).sqrt()).std().item()
    assert spread == pytest.approx(1, abs=0.05)
    assert timesteps.min() >= 0 and timesteps.max() <= 999
    assert weight.max() <= 2


def test_a_share_of_the_timesteps_is_drawn_where_means_are_targets() -> None:
    alphas, clean = checkpoint.make_scheduler().alphas_cumprod, torch.zeros(4000, 1, 1, 1)
    shares = []
    for mean_share in (0.0, 0.2):
        _, timesteps, _ = train.noisy_batch(clean, alphas, train.generator_for(1), mean_share)
        shares.append((timesteps >= train.MEAN_FROM).float().mean().item())
    assert shares[1] - shares[0] == pytest.approx(0.2, abs=0.03)


def test_random_numbers_depend_on_the_key_only() -> None:
    draws = [torch.rand(3, generator=train.generator_for(*key)) for key in [(0, 2, 5, 1), (0, 2, 5, 1), (0, 2, 6, 1)]]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_shares_must_be_equal() -> None:
    with pytest.raises(ValueError, match="multiple of processes"):
        train.Settings(batch=25, processes=2)


def test_every_process_must_see_every_combination() -> None:
    with pytest.raises(ValueError, match="at least 72"):
        train.Settings(videos=70, processes=2)


def test_the_command_line_has_the_defaults_of_the_settings() -> None:
    assert train.parse_settings([]) == train.Settings()


def test_the_cosine_falls_from_one_to_zero() -> None:
    values = [train.cosine(progress) for progress in np.linspace(-1, 1, 9)]
    assert values[0] == values[4] == 1
    assert values == sorted(values, reverse=True)
    assert values[-1] == pytest.approx(0)
