"""The whole path against Open-Sora run eagerly: its modules, T5 of transformers, and a loop that is as plain as can be.

Diffusers has no pipeline of it. The loop here shares no code with the exporter's scheduler or the runtime.
"""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel, T5Tokenizer

from foresight.engines.errors import CheckpointError, InvalidRequest
from foresight.exporter.export import Export, ExportRequest
from foresight.exporter.models.open_sora.config import STDiT3Config, VideoVAEConfig
from foresight.exporter.models.open_sora.stdit3 import STDiT3
from foresight.exporter.models.open_sora.vae import VideoVAE
from foresight.runtime.pipeline import VideoPipeline
from foresight.runtime.policies import NoReuse
from tests.support import load_pipeline
from tests.test_parity import REPOSITORY, assert_same, draw
from zoo import latte, open_sora

PROMPT = "a red circle moving right"
LIGHT: dict[str, Any] = {"text": {"num_layers": 1}}
MODELS: dict[str, dict[str, Any]] = {
    "its own size": {"checkpoint": {}, "request": {"max_batch": 2}},
    # sides that fill neither latents nor patches
    "odd sides": {
        "checkpoint": {"seed": 1, **LIGHT},
        "request": {"height": 11, "width": 15, "frames": 34, "max_batch": 1},
    },
    "an image": {"checkpoint": {"seed": 2, "patch": 4, **LIGHT}, "request": {"frames": 1, "max_batch": 1}},
}


class EagerOpenSora:
    """The models of a checkpoint, loaded into torch as they are."""

    def __init__(self, folder: Path) -> None:
        configs = {name: json.loads((folder / name / "config.json").read_text()) for name in ("transformer", "vae")}
        self.transformer = STDiT3(STDiT3Config.from_json(configs["transformer"])).eval()
        self.vae = VideoVAE(VideoVAEConfig.from_json(configs["vae"])).eval()
        for name, module in (("transformer", self.transformer), ("vae", self.vae)):
            module.load_state_dict(load_file(folder / name / "model.safetensors"))
        self.encoder = T5EncoderModel.from_pretrained(folder / "text_encoder").eval()
        self.tokenizer = T5Tokenizer.from_pretrained(folder / "tokenizer")
        self.length = configs["transformer"]["model_max_length"]

    @torch.no_grad()
    def __call__(self, prompt: str, noise: Any, size: tuple[int, int, int], steps: int, guidance: float) -> Any:
        """Final latents (C, T, h, w) and frames (F, H, W, 3) uint8 of one prompt, which has been cleaned."""
        height, width, frames = size
        tokens = self.tokenizer(
            prompt, max_length=self.length, padding="max_length", truncation=True, return_tensors="pt"
        )
        states = self.encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        mask = tokens.attention_mask.repeat(2, 1)
        null = self.transformer.y_embedder.y_embedding[None]
        latent_frames = frames // 17 * 5 if frames >= 17 else 1
        ratio = math.sqrt(height * width / 512**2) * math.sqrt(latent_frames)
        even = [1 - step / steps for step in range(steps)] + [0.0]
        times = [ratio * time / (1 + (ratio - 1) * time) for time in even]
        latents = torch.from_numpy(noise)[None]
        for now, later in itertools.pairwise(times):
            velocity = self.transformer(
                latents.repeat(2, 1, 1, 1, 1),
                torch.full((2,), 1000 * now),
                torch.cat([states, null]),
                mask,
                fps=120 if frames == 1 else 24,
                height=height,
                width=width,
            )[:, :4]
            conditional, unconditional = velocity.chunk(2)
            latents = latents + (now - later) * (unconditional + guidance * (conditional - unconditional))
        video = self.vae.decode(latents, frames)[0].permute(1, 2, 3, 0)
        pixels = (255 * (video.clamp(-1, 1) + 1) / 2 + 0.5).floor()
        return latents[0].numpy(), pixels.numpy().astype(np.uint8)


@pytest.fixture(scope="module", params=MODELS)
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, bundles: Path
) -> tuple[EagerOpenSora, VideoPipeline, tuple[int, int, int]]:
    """The same checkpoint run eagerly, and exported and loaded by us; and the size that is asked for."""
    settings = MODELS[request.param]
    folder = open_sora.write_random(tmp_path_factory.mktemp("checkpoints") / "open_sora", **settings["checkpoint"])
    wanted = ExportRequest(**settings["request"])
    bundle = Export("open-sora", wanted, str(folder), bundles / f"open-sora-{request.param}".replace(" ", "-")).run()
    size = (wanted.height or 8, wanted.width or 12, wanted.frames or 17)
    return EagerOpenSora(folder), load_pipeline(bundle.path), size


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_video_is_the_one_the_eager_model_makes(
    model: tuple[EagerOpenSora, VideoPipeline, tuple[int, int, int]], guidance: float
) -> None:
    eager, ours, size = model
    noise = draw(ours.manifest.shape.latents)
    video = ours(PROMPT, steps=6, guidance=guidance, latents=noise, policy=NoReuse())
    assert_same(video, *eager(f"{PROMPT} aesthetic score: 6.5.", noise, size, 6, guidance))


def test_a_score_in_the_prompt_is_not_added_again(
    model: tuple[EagerOpenSora, VideoPipeline, tuple[int, int, int]],
) -> None:
    eager, ours, size = model
    noise, prompt = draw(ours.manifest.shape.latents), "a dog aesthetic score: 5.5."
    video = ours(prompt, steps=2, guidance=2, latents=noise, policy=NoReuse())
    assert_same(video, *eager(prompt, noise, size, 2, 2.0))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return open_sora.write_random(tmp_path_factory.mktemp("checkpoints") / "tiny", **LIGHT)


@pytest.fixture(scope="module")
def pipeline(tiny: Path, bundles: Path) -> VideoPipeline:
    return load_pipeline(Export("open-sora", ExportRequest(), str(tiny), bundles / "open-sora-tiny").run().path)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_prompts_of_different_length_share_a_batch(pipeline: VideoPipeline, guidance: float) -> None:
    prompts = ["a", "a red circle moving right in the snow", "dog in the snow"]
    noise = draw((3, *pipeline.manifest.shape.latents))
    settings: dict[str, Any] = {"steps": 4, "guidance": guidance, "policy": NoReuse()}
    together = pipeline(prompts, latents=noise, **settings)
    for video, prompt, own in zip(together, prompts, noise, strict=True):
        alone = pipeline(prompt, latents=own, **settings)
        assert np.abs(video.latents - alone.latents).max() <= 1e-5 * np.ptp(alone.latents)


def test_a_negative_prompt_is_refused(pipeline: VideoPipeline) -> None:
    with pytest.raises(InvalidRequest, match=r"negative_prompt: got 'ugly', expected none.*leave it out"):
        pipeline(PROMPT, negative_prompt="ugly", steps=1)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"resolution": "1080p"}, "resolution: got '1080p', expected one of 144p, 240p"),
        ({"resolution": "144p", "height": 144}, "resolution and aspect: got height and width as well"),
        ({"duration": "3s"}, "duration: got '3s', expected one of 2s, 4s"),
        ({"frames": 40}, "frames: got 40, expected 1 to 17, or a multiple of 17"),
        ({"aspect": "5:4"}, "aspect: got '5:4', expected one of"),
    ],
)
def test_sizes_that_the_model_was_not_made_for_are_refused(tiny: Path, size: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        Export("open-sora", ExportRequest(**size), str(tiny))


def test_another_models_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = latte.write_random(tmp_path / "latte", **LIGHT)
    with pytest.raises(CheckpointError, match=r"transformer is a None, expected an STDiT3; choose the model"):
        Export("open-sora", ExportRequest(), str(folder))


@pytest.mark.parametrize("component", ["transformer", "vae"])
@pytest.mark.parametrize("damage", ["missing", "unknown"])
def test_loading_is_strict(tiny: Path, tmp_path: Path, component: str, damage: str) -> None:
    file = tiny / component / "model.safetensors"
    weights = load_file(file)
    original = dict(weights)
    name = next(iter(sorted(weights)))
    if damage == "missing":
        del weights[name]
    else:
        weights["mystery.weight"] = weights[name].clone()
    try:
        save_file(weights, file)
        with pytest.raises(CheckpointError, match=f"{component}: weights 1 {damage}"):
            Export("open-sora", ExportRequest(), str(tiny), tmp_path / "bundle").run()
    finally:
        save_file(original, file)


@pytest.mark.parametrize("name", ["rope.freqs", "y_embedder.y_proj.fc1.bias"])
def test_a_weight_of_another_shape_is_refused(tmp_path: Path, name: str) -> None:
    folder = open_sora.write_random(tmp_path / "checkpoint", **LIGHT)
    file = folder / "transformer" / "model.safetensors"
    weights = load_file(file)
    save_file(weights | {name: torch.zeros(3)}, file)
    with pytest.raises(CheckpointError, match=name):
        Export("open-sora", ExportRequest(), str(folder), tmp_path / "bundle").run()


def test_the_shipped_checkpoint_makes_the_video_that_the_eager_model_makes(bundles: Path) -> None:
    ours = load_pipeline(Export("open-sora-demo", ExportRequest(), output=bundles / "open-sora-demo").run().path)
    eager = EagerOpenSora(REPOSITORY / "demo" / "open_sora")
    shape, noise = ours.manifest.shape, draw(ours.manifest.shape.latents)
    video = ours(PROMPT, steps=10, guidance=2.0, latents=noise, policy=NoReuse())
    size = (shape.height, shape.width, shape.frames)
    assert_same(video, *eager(f"{PROMPT} aesthetic score: 6.5.", noise, size, 10, 2.0))
