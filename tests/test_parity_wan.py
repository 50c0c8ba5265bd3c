"""The whole path against diffusers' WanPipeline with the same weights, latents and prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline

from foresight.exporter.export import Export, ExportRequest
from foresight.exporter.registry import REPOSITORY
from foresight.runtime.pipeline import VideoPipeline
from foresight.runtime.policies import Forecast, Foresight, NoReuse
from foresight.runtime.request import VideoRequest
from tests.support import load_pipeline
from tests.test_parity import FRAMES_PSNR_DB, draw
from zoo import wan

PROMPT = "a red circle moving right"
TOLERANCES = {"fp32": 1e-4, "fp16": 5e-3}  # of the reference's range of latents
# Like Wan 2.1, upright and with an odd number of patches a side; like the 5B of Wan 2.2, with a stronger shift; one
# frame in fp16, with a shift at which rounded timesteps repeat in 100 steps. Sides are multiples of 16 in WanPipeline.
MODELS: dict[str, dict[str, Any]] = {
    "2.1": {"checkpoint": {"layers": 3}, "request": {"height": 48, "width": 16, "frames": 7, "max_batch": 2}},
    "TI2V": {
        "checkpoint": {"residual": True, "seed": 1, "scheduler_settings": {"flow_shift": 5.0}},
        "request": {"height": 16, "width": 48, "frames": 5, "max_batch": 2},
    },
    "fp16": {
        "checkpoint": {"seed": 2},
        "request": {"height": 16, "width": 32, "frames": 1, "max_batch": 2, "dtype": "fp16", "flow_shift": 12.0},
    },
}
CASES: dict[str, dict[str, Any]] = {
    "no guidance": {"guidance_scale": 1.0, "num_inference_steps": 6},
    "guidance and a negative prompt": {
        "guidance_scale": 5.0,
        "num_inference_steps": 8,
        "negative_prompt": "  blue&amp;nbsp;square\n in the\u3000 snow a dog moving left ",
    },
}


@pytest.fixture(scope="module", params=MODELS)
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, bundles: Path
) -> tuple[WanPipeline, VideoPipeline]:
    """The same checkpoint loaded by diffusers, and exported and loaded by us."""
    settings = MODELS[request.param]
    folder = wan.write_random(tmp_path_factory.mktemp("checkpoints") / "wan", **settings["checkpoint"])
    asked = ExportRequest(**settings["request"])
    bundle = Export("wan-1.3b", asked, str(folder), bundles / f"wan-{request.param}").run()
    reference = WanPipeline.from_pretrained(folder, dtype=torch.float16 if asked.dtype == "fp16" else torch.float32)
    if asked.flow_shift is not None:
        reference.scheduler = UniPCMultistepScheduler.from_config(
            reference.scheduler.config, flow_shift=asked.flow_shift
        )
    reference.set_progress_bar_config(disable=True)
    return reference, load_pipeline(bundle.path)


def run_reference(pipeline: WanPipeline, shape: Any, prompt: Any, latents: Any, **settings: Any) -> tuple[Any, Any]:
    """Final latents (N, C, T, h, w), and frames (N, F, H, W, 3) uint8, by diffusers."""
    sizes = {"num_frames": shape.frames, "height": shape.height, "width": shape.width}
    final = pipeline(prompt, latents=torch.from_numpy(latents), output_type="latent", **sizes, **settings).frames
    images = pipeline(prompt, latents=torch.from_numpy(latents), output_type="np", **sizes, **settings).frames
    return final.float().numpy(), (images * 255).round().astype(np.uint8)


def assert_same(video: Any, latents: Any, frames: Any, tolerance: float) -> None:
    error = float(np.abs(video.latents - latents).max())
    assert error <= tolerance * float(np.ptp(latents)), f"latents differ by {error}"
    mse = float(np.mean((video.frames.astype(np.float64) - frames) ** 2))
    psnr = 10 * np.log10(255**2 / mse) if mse else np.inf
    assert psnr >= FRAMES_PSNR_DB, f"PSNR {psnr:.1f} dB"


@pytest.mark.parametrize("case", CASES)
def test_a_video_is_the_one_diffusers_makes(model: tuple[WanPipeline, VideoPipeline], case: str) -> None:
    (reference, ours), settings = model, CASES[case]
    noise = draw(ours.manifest.shape.latents)
    (latents,), (frames,) = run_reference(reference, ours.manifest.shape, PROMPT, noise[None], **settings)
    video = ours(
        PROMPT,
        negative_prompt=settings.get("negative_prompt", ""),
        steps=settings["num_inference_steps"],
        guidance=settings["guidance_scale"],
        latents=noise,
        policy=NoReuse(),
    )
    assert np.ptp(frames) > 20  # there is something to see
    assert_same(video, latents, frames, TOLERANCES[ours.manifest.dtype])


def test_prompts_of_different_length_are_each_padded_with_zeros(model: tuple[WanPipeline, VideoPipeline]) -> None:
    reference, ours = model
    shape, prompts = ours.manifest.shape, ["a dog", f"{PROMPT} in the snow"]
    noise = draw((2, *shape.latents), seed=3)
    expected = run_reference(reference, shape, prompts, noise, guidance_scale=4.0, num_inference_steps=6)
    videos = ours(prompts, steps=6, guidance=4.0, latents=noise, policy=NoReuse())
    for video, latents, frames in zip(videos, *expected, strict=True):
        assert_same(video, latents, frames, TOLERANCES[ours.manifest.dtype])


def test_the_demo_makes_what_diffusers_makes_with_prompts_of_its_own_length(bundles: Path) -> None:
    ours = load_pipeline(Export("wan-demo", ExportRequest(), output=bundles / "wan-demo").run().path)
    reference = WanPipeline.from_pretrained(REPOSITORY / "demo" / "wan")
    reference.set_progress_bar_config(disable=True)
    manifest, settings = ours.manifest, {"guidance_scale": 2.0, "num_inference_steps": 20}
    noise = draw(manifest.shape.latents, seed=5)
    assert manifest.text.max_tokens == reference.tokenizer.model_max_length == 8
    (latents,), (frames,) = run_reference(
        reference, manifest.shape, PROMPT, noise[None], max_sequence_length=8, **settings
    )
    video = ours(PROMPT, steps=20, guidance=2.0, latents=noise, policy=NoReuse())
    assert_same(video, latents, frames, TOLERANCES["fp32"])


# Two transformers that take turns

BOUNDARY, STEPS = 0.875, 10


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory, bundles: Path) -> tuple[WanPipeline, VideoPipeline]:
    """Like the A14B of Wan 2.2; the flow shift has one step exactly at the boundary."""
    folder = wan.write_random(
        tmp_path_factory.mktemp("checkpoints") / "wan", boundary=BOUNDARY, scheduler_settings={"flow_shift": 3.0}
    )
    asked = ExportRequest(height=16, width=32, frames=5, max_batch=1)
    bundle = Export("wan-a14b", asked, str(folder), bundles / "wan-a14b").run()
    reference = WanPipeline.from_pretrained(folder, dtype=torch.float32)
    reference.set_progress_bar_config(disable=True)
    return reference, load_pipeline(bundle.path)


GUIDANCES: dict[str, dict[str, float]] = {
    "none": {"guidance_scale": 1.0},
    "one for both": {"guidance_scale": 4.0},
    "one for each": {"guidance_scale": 4.0, "guidance_scale_2": 2.0},
}


@pytest.mark.parametrize("case", GUIDANCES)
def test_two_transformers_make_the_video_that_diffusers_makes(
    experts: tuple[WanPipeline, VideoPipeline], case: str
) -> None:
    (reference, ours), guidances = experts, GUIDANCES[case]
    noise = draw(ours.manifest.shape.latents)
    settings = {"num_inference_steps": STEPS, "negative_prompt": "blue square", **guidances}
    (latents,), (frames,) = run_reference(reference, ours.manifest.shape, PROMPT, noise[None], **settings)
    (video,) = ours.generate(
        VideoRequest(
            PROMPT,
            "blue square",
            STEPS,
            guidances["guidance_scale"],
            latents=noise,
            policy=NoReuse(),
            guidance_2=guidances.get("guidance_scale_2"),
        )
    )
    assert_same(video, latents, frames, TOLERANCES["fp32"])
    steps = video.trace.steps
    assert [step.expert for step in steps] == [int(step.timestep < 1000 * BOUNDARY) for step in steps]
    assert 1000 * BOUNDARY in [step.timestep for step in steps]


def test_both_transformers_count_and_neither_is_the_other(experts: tuple[WanPipeline, VideoPipeline]) -> None:
    reference, ours = experts
    manifest = ours.manifest
    assert [expert.guidance for expert in manifest.experts] == [4.0, 3.0]
    assert ours.memory().cache == (len(manifest.blocks) + 2) * 2 * manifest.cache_bytes_per_row["block.000"]
    noise = draw(manifest.shape.latents)
    settings = {"num_inference_steps": STEPS, "guidance_scale": 4.0}
    whole, _ = run_reference(reference, manifest.shape, PROMPT, noise[None], **settings)
    second, reference.transformer_2 = reference.transformer_2, reference.transformer
    alone, _ = run_reference(reference, manifest.shape, PROMPT, noise[None], **settings)
    reference.transformer_2 = second
    assert np.abs(whole - alone).max() > 0.01 * np.ptp(whole)


@pytest.mark.parametrize("policy", [Foresight(gamma=2), Forecast(tolerance=0.5)])
def test_each_transformer_warms_up_anew(
    experts: tuple[WanPipeline, VideoPipeline], policy: Foresight | Forecast
) -> None:
    _, ours = experts
    steps = ours(PROMPT, steps=40, policy=policy).trace.steps
    switch = [step.expert for step in steps].index(1)
    assert all({*step.decisions} == {"computed"} for step in steps[switch : switch + 3])
    assert any({*step.decisions} != {"computed"} for step in steps[:switch])
    assert any({*step.decisions} != {"computed"} for step in steps[switch:])
