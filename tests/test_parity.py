"""The whole path against diffusers' LattePipeline with the same weights, latents and prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import LattePipeline

from foresight.engines.bundle import open_bundle
from foresight.runtime.pipeline import VideoPipeline
from foresight.runtime.policies import NoReuse
from foresight.runtime.video import Video
from tests.support import load_pipeline

LATENTS_TOLERANCE = 1e-3  # of the reference's range
FRAMES_PSNR_DB = 50.0
REPOSITORY = Path(__file__).parents[1]


def reference_pipeline(checkpoint: Path) -> LattePipeline:
    pipeline = LattePipeline.from_pretrained(checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> LattePipeline:
    return reference_pipeline(checkpoint)


def run_reference(pipeline: LattePipeline, noise: Any, prompt: str, **settings: Any) -> tuple[Any, Any]:
    """Final latents (C, F, h, w), and frames (F, H, W, 3) uint8, by diffusers."""
    _, frames, height, width = noise.shape
    scale = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
    with torch.no_grad():
        latents = pipeline(
            prompt,
            latents=torch.from_numpy(noise)[None].clone(),
            video_length=frames,
            height=height * scale,
            width=width * scale,
            output_type="latent",
            clean_caption=False,
            **settings,
        ).frames
        pixels = pipeline.decode_latents(latents, frames)  # (1, 3, F, H, W)
    images = (pixels[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 3, 0).numpy()
    return latents[0].numpy(), (images * 255).round().astype(np.uint8)


def assert_same(video: Video, latents: Any, frames: Any) -> None:
    error = float(np.abs(video.latents - latents).max())
    assert error <= LATENTS_TOLERANCE * float(np.ptp(latents)), f"latents differ by {error}"
    mse = float(np.mean((video.frames.astype(np.float64) - frames) ** 2))
    psnr = 10 * np.log10(255**2 / mse) if mse else np.inf
    assert psnr >= FRAMES_PSNR_DB, f"PSNR {psnr:.1f} dB"


def draw(shape: tuple[int, ...], seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


CASES: dict[str, dict[str, Any]] = {
    "no guidance": {"guidance_scale": 1.0},
    "guidance": {"guidance_scale": 4.0},
    "a negative prompt": {"guidance_scale": 4.0, "negative_prompt": "blue square"},
    "a negative prompt longer than the prompt": {
        "guidance_scale": 4.0,
        "negative_prompt": "a blue square moving left in the snow a dog a dog a dog",
    },
    "one step": {"guidance_scale": 2.0, "num_inference_steps": 1},
    "many steps": {"guidance_scale": 2.0, "num_inference_steps": 40},
}


def ours(pipeline: VideoPipeline, noise: Any, prompt: str, settings: dict[str, Any]) -> Video:
    return pipeline(
        prompt,
        negative_prompt=settings.get("negative_prompt", ""),
        steps=settings.get("num_inference_steps", 8),
        guidance=settings["guidance_scale"],
        latents=noise,
        policy=NoReuse(),
    )


@pytest.mark.parametrize("case", CASES)
def test_a_video_is_the_one_diffusers_makes(reference: LattePipeline, pipeline: VideoPipeline, case: str) -> None:
    settings = {"num_inference_steps": 8} | CASES[case]
    noise, prompt = draw(pipeline.manifest.shape.latents), "a red circle moving right"
    assert_same(ours(pipeline, noise, prompt, settings), *run_reference(reference, noise, prompt, **settings))


@pytest.mark.parametrize("prompt", ["a", "A Red  CIRCLE\n", "a dog über ça 猫", " ".join(["dog in the snow"] * 60)])
def test_any_prompt_is_read_as_diffusers_reads_it(
    reference: LattePipeline, pipeline: VideoPipeline, prompt: str
) -> None:
    settings: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 3.0}
    noise = draw(pipeline.manifest.shape.latents)
    assert_same(ours(pipeline, noise, prompt, settings), *run_reference(reference, noise, prompt, **settings))


def test_the_prompt_matters(pipeline: VideoPipeline) -> None:
    noise, settings = draw(pipeline.manifest.shape.latents), {"guidance_scale": 1.0}
    one, other = (ours(pipeline, noise, prompt, settings) for prompt in ("a red circle", "a dog"))
    assert np.abs(one.latents - other.latents).max() > 10 * LATENTS_TOLERANCE * np.ptp(one.latents)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_frames_need_not_be_square(wide_checkpoint: Path, wide_bundle: Path, guidance: float) -> None:
    pipeline = load_pipeline(wide_bundle)
    settings: dict[str, Any] = {"num_inference_steps": 8, "guidance_scale": guidance}
    noise, prompt = draw(pipeline.manifest.shape.latents), "a red circle moving right"
    assert noise.shape == (4, 3, 8, 16)
    expected = run_reference(reference_pipeline(wide_checkpoint), noise, prompt, **settings)
    assert_same(ours(pipeline, noise, prompt, settings), *expected)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_video_may_be_a_single_frame(single_checkpoint: Path, single_bundle: Path, guidance: float) -> None:
    pipeline = load_pipeline(single_bundle)
    settings: dict[str, Any] = {"num_inference_steps": 8, "guidance_scale": guidance}
    noise, prompt = draw(pipeline.manifest.shape.latents), "a dog in the snow"
    expected = run_reference(reference_pipeline(single_checkpoint), noise, prompt, **settings)
    assert_same(ours(pipeline, noise, prompt, settings), *expected)


PROMPTS = ["a", "a red circle moving right in the snow", "dog in the snow"]


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_batch_gives_every_prompt_what_it_gets_alone(pipeline: VideoPipeline, guidance: float) -> None:
    noise = draw((3, *pipeline.manifest.shape.latents))
    settings: dict[str, Any] = {"steps": 8, "guidance": guidance, "negative_prompt": "blue", "policy": NoReuse()}
    together = pipeline(PROMPTS, latents=noise, **settings)
    for video, prompt, own in zip(together, PROMPTS, noise, strict=True):
        alone = pipeline(prompt, latents=own, **settings)
        assert np.abs(video.latents - alone.latents).max() <= 1e-5 * np.ptp(alone.latents)


def test_half_precision_is_close_to_single(bundle: Path, half_bundle: Path) -> None:
    """One call of the model, so that nothing but the graphs differs.

    fp16 has 11 bits: each operation errs by up to 5e-4 of its result. Four blocks and the epilogue are some thirty
    operations in a row, whose errors add like noise: 5e-4 * sqrt(30) = 2.7e-3 of the range; 5e-3 leaves some room,
    and is a hundred times less than what a wrong weight makes.
    """
    single, half = load_pipeline(bundle), load_pipeline(half_bundle)
    noise = draw(single.manifest.shape.latents)
    settings: dict[str, Any] = {"steps": 1, "guidance": 1, "latents": noise, "policy": NoReuse()}
    expected, got = (pipeline("a red circle", **settings).latents for pipeline in (single, half))
    assert np.abs(got - expected).max() <= 5e-3 * np.ptp(expected)


def test_half_precision_measures_reuse_in_single(half_bundle: Path) -> None:
    assert all(block.output("distance").dtype == "fp32" for block in open_bundle(half_bundle).manifest.blocks)


def test_half_precision_caches_half_the_bytes(bundle: Path, half_bundle: Path) -> None:
    single, half = (open_bundle(folder).manifest.cache_bytes(2) for folder in (bundle, half_bundle))
    assert single == 2 * half


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_shipped_checkpoint_makes_the_video_that_diffusers_makes(demo_bundle: Path, guidance: float) -> None:
    pipeline = load_pipeline(demo_bundle)
    prompt = pipeline.manifest.defaults.prompt
    settings: dict[str, Any] = {"num_inference_steps": 10, "guidance_scale": guidance}
    noise = draw(pipeline.manifest.shape.latents)
    expected = run_reference(reference_pipeline(REPOSITORY / "demo" / "latte"), noise, prompt, **settings)
    assert_same(ours(pipeline, noise, prompt, settings), *expected)
