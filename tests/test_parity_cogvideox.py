"""The whole path against diffusers' CogVideoXPipeline with the same weights, latents, noise and prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import CogVideoXDPMScheduler, CogVideoXPipeline
from diffusers.schedulers import scheduling_dpm_cogvideox

from foresight.engines.arrays import Arrays
from foresight.engines.errors import InvalidRequest
from foresight.exporter.export import Export, ExportRequest
from foresight.runtime.pipeline import VideoPipeline
from foresight.runtime.policies import NoReuse
from foresight.runtime.sampler import Noise
from tests.support import load_pipeline
from tests.test_parity import REPOSITORY, assert_same, draw
from zoo import cogvideox

PROMPT = "a red circle moving right"
# like the 2b; like the 5b, other sizes than the checkpoint was made for; the 5b's own scheduler, which adds noise
MODELS: dict[str, dict[str, Any]] = {
    "2b": {"checkpoint": {}, "request": {"max_batch": 2}},
    "2b, other sizes": {"checkpoint": {"seed": 1}, "request": {"height": 24, "width": 8, "frames": 17, "max_batch": 1}},
    "5b": {
        "checkpoint": {"rotary": True, "latents": (3, 6, 2), "seed": 2},
        "request": {"max_batch": 2},
    },
    "5b, other sizes": {
        "checkpoint": {
            "rotary": True,
            "heads": 3,
            "seed": 3,
            "vae": {"block_out_channels": (8, 16), "temporal_compression_ratio": 2},
        },
        "request": {"height": 8, "width": 16, "frames": 5, "max_batch": 1},
    },
    "DPM": {
        "checkpoint": {"rotary": True, "scheduler": "CogVideoXDPMScheduler", "seed": 4},
        "request": {"frames": 1, "max_batch": 1},
    },
}


@pytest.fixture(scope="module", params=MODELS)
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, bundles: Path
) -> tuple[CogVideoXPipeline, VideoPipeline]:
    """The same checkpoint loaded by diffusers, and exported and loaded by us."""
    settings = MODELS[request.param]
    folder = cogvideox.write_random(tmp_path_factory.mktemp("checkpoints") / "cogvideox", **settings["checkpoint"])
    name = f"cogvideox-{request.param}".replace(", ", "-").replace(" ", "-")
    bundle = Export("cogvideox-2b", ExportRequest(**settings["request"]), str(folder), bundles / name).run()
    reference = CogVideoXPipeline.from_pretrained(folder)
    reference.set_progress_bar_config(disable=True)
    return reference, load_pipeline(bundle.path)


def run_reference(
    pipeline: CogVideoXPipeline, shape: Any, latents: Any, prompt: str, noise: Noise | None = None, **settings: Any
) -> tuple[Any, Any]:
    """Final latents (T, C, h, w), and frames (F, H, W, 3) uint8, by diffusers."""
    with pytest.MonkeyPatch.context() as patch:
        if noise is not None:
            patch.setattr(scheduling_dpm_cogvideox, "randn_tensor", _Draws(noise).randn_tensor)
        final = pipeline(
            prompt,
            latents=torch.from_numpy(latents)[None].clone(),
            num_frames=shape.frames,
            height=shape.height,
            width=shape.width,
            max_sequence_length=pipeline.transformer.config.max_text_seq_length,
            output_type="latent",
            **settings,
        ).frames
    with torch.no_grad():
        pixels = pipeline.decode_latents(final)[0]
    images = (pixels / 2 + 0.5).clamp(0, 1).permute(1, 2, 3, 0).numpy()
    return final[0].numpy(), (images * 255).round().astype(np.uint8)


class _Draws:
    """Gives diffusers' scheduler the numbers that ours draws; it draws twice in most steps, and uses the second."""

    def __init__(self, noise: Noise) -> None:
        self._noise = noise
        self._step = 0

    def randn_tensor(self, shape: Any, **options: Any) -> torch.Tensor:
        self._step += 1
        used = self._step == 1 or self._step % 2 == 1
        return torch.from_numpy(self._noise.draw()) if used else torch.zeros(shape)


CASES: dict[str, dict[str, Any]] = {
    "no guidance": {"guidance_scale": 1.0, "num_inference_steps": 5},
    "guidance and a negative prompt": {
        "guidance_scale": 4.0,
        "num_inference_steps": 8,
        "negative_prompt": "blue square in the snow a dog moving left",
    },
}


@pytest.mark.parametrize("case", CASES)
def test_a_video_is_the_one_diffusers_makes(model: tuple[CogVideoXPipeline, VideoPipeline], case: str) -> None:
    (reference, ours), settings = model, CASES[case]
    shape = ours.manifest.shape
    latents = draw(shape.latents)
    noise = None
    if isinstance(reference.scheduler, CogVideoXDPMScheduler):
        noise = Noise((0,), shape.latents, Arrays())
        noise.draw()  # the first is what the runtime would begin with, had it not been given latents
    expected = run_reference(reference, shape, latents, PROMPT, noise, **settings)
    video = ours(
        PROMPT,
        negative_prompt=settings.get("negative_prompt", ""),
        steps=settings["num_inference_steps"],
        guidance=settings["guidance_scale"],
        latents=latents,
        policy=NoReuse(),
    )
    assert_same(video, *expected)


def test_the_shipped_checkpoint_makes_the_video_that_diffusers_makes(bundles: Path) -> None:
    ours = load_pipeline(Export("cogvideox-demo", ExportRequest(), output=bundles / "cogvideox-demo").run().path)
    reference = CogVideoXPipeline.from_pretrained(REPOSITORY / "demo" / "cogvideox")
    reference.set_progress_bar_config(disable=True)
    latents = draw(ours.manifest.shape.latents)
    settings: dict[str, Any] = {"guidance_scale": 2.0, "num_inference_steps": 10}
    expected = run_reference(reference, ours.manifest.shape, latents, PROMPT, **settings)
    assert_same(ours(PROMPT, steps=10, guidance=2.0, latents=latents, policy=NoReuse()), *expected)


def test_frames_that_the_vae_cannot_make_are_refused_with_those_it_can(tmp_path: Path) -> None:
    folder = cogvideox.write_random(tmp_path / "cogvideox")
    with pytest.raises(InvalidRequest, match=r"frames: got 13, which .*; choose 9 or 16"):
        Export("cogvideox-2b", ExportRequest(frames=13), str(folder))
