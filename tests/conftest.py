"""Bundles of tiny random checkpoints, exported once per session.

While working on the tests, `FORESIGHT_TEST_BUNDLES=folder` keeps them between sessions; an export finds for itself
whether one is still up to date, but it does not know of changes to the exporter's code.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before any library reads it: tests never touch the network

import pytest
import torch
from diffusers import CogVideoXDPMScheduler

from benchmarks.checkpoints import random_cogvideox, random_open_sora
from foresight.exporter.export import Export, Request
from foresight.runtime.pipeline import VideoPipeline
from tests.support import Outcome, load_pipeline, tiny_latte

torch.set_num_threads(1)  # for models this small more threads only wait for each other


LIGHT: dict[str, Any] = {"text": {"num_layers": 1}, "vae": {"block_out_channels": (8,)}}  # quick to export


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that exported bundles go to."""
    kept = os.environ.get("FORESIGHT_TEST_BUNDLES")
    return Path(kept) if kept else tmp_path_factory.mktemp("bundles")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five heads, two pairs of blocks, three frames of 16 x 16; the model predicts the sample, so nothing explodes."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    return tiny_latte(folder, heads=5, pairs=2, frames=3, sample_size=8, scheduler={"prediction_type": "sample"})


@pytest.fixture(scope="session")
def bundle(checkpoint: Path, bundles: Path) -> Path:
    """The main bundle, fp32; tests that damage it copy it first."""
    return Export("latte", Request(), str(checkpoint), bundles / "tiny").run().path


@pytest.fixture(scope="session")
def wide_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two heads, one pair, three frames of 8 x 8, whose VAE leaves the size as it is."""
    folder = tmp_path_factory.mktemp("checkpoints") / "wide"
    return tiny_latte(folder, pairs=1, seed=2, scheduler={"prediction_type": "sample"}, **LIGHT)


@pytest.fixture(scope="session")
def wide_bundle(wide_checkpoint: Path, bundles: Path) -> Path:
    """The bundle of `wide_checkpoint`, for frames of 8 x 16 pixels."""
    return Export("latte", Request(width=16, max_batch=1), str(wide_checkpoint), bundles / "wide").run().path


@pytest.fixture(scope="session")
def half_bundle(checkpoint: Path, bundles: Path) -> Path:
    """The same checkpoint in fp16."""
    return Export("latte", Request(dtype="fp16"), str(checkpoint), bundles / "half").run().path


@pytest.fixture(scope="session")
def demo_bundle(bundles: Path) -> Path:
    """The trained demo checkpoint, fp32."""
    return Export("latte-demo", Request(), output=bundles / "demo").run().path


@pytest.fixture(scope="session")
def demo_half_bundle(bundles: Path) -> Path:
    """The trained demo checkpoint in fp16."""
    return Export("latte-demo", Request(dtype="fp16"), output=bundles / "demo-half").run().path


@pytest.fixture(scope="session")
def demo_bf16_bundle(bundles: Path) -> Path:
    """The trained demo checkpoint in bf16, which runs on GPUs only."""
    return Export("latte-demo", Request(dtype="bf16"), output=bundles / "demo-bf16").run().path


@pytest.fixture(scope="session")
def single_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One frame, one head, one pair; the model predicts the noise."""
    folder = tmp_path_factory.mktemp("checkpoints") / "single"
    return tiny_latte(folder, heads=1, head_dim=16, pairs=1, frames=1, seed=1, **LIGHT)


@pytest.fixture(scope="session")
def single_bundle(single_checkpoint: Path, bundles: Path) -> Path:
    """The bundle of `single_checkpoint`."""
    return Export("latte", Request(max_batch=1), str(single_checkpoint), bundles / "single").run().path


@pytest.fixture(scope="session")
def cogvideox_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two streams, rotary positions, a sampler that adds noise, and 17 frames that are decoded in two chunks."""
    folder = tmp_path_factory.mktemp("checkpoints") / "cogvideox"
    return random_cogvideox(folder, rotary=True, layers=3, frames=17, scheduler=CogVideoXDPMScheduler)


@pytest.fixture(scope="session")
def cogvideox_bundle(cogvideox_checkpoint: Path, bundles: Path) -> Path:
    """The bundle of `cogvideox_checkpoint`."""
    return Export("cogvideox-5b", Request(), str(cogvideox_checkpoint), bundles / "cogvideox").run().path


@pytest.fixture(scope="session")
def open_sora_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pairs of blocks, and a trained empty prompt."""
    return random_open_sora(tmp_path_factory.mktemp("checkpoints") / "open-sora")


@pytest.fixture(scope="session")
def open_sora_bundle(open_sora_checkpoint: Path, bundles: Path) -> Path:
    """The bundle of `open_sora_checkpoint`, for 34 frames, which two stages of the decoder make."""
    return Export("open-sora", Request(frames=34), str(open_sora_checkpoint), bundles / "open-sora").run().path


@pytest.fixture(scope="session")
def pipeline(bundle: Path) -> VideoPipeline:
    """The main bundle, loaded; it keeps nothing of a request, so all tests may share it."""
    return load_pipeline(bundle)


@pytest.fixture
def foresight_cli(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., Outcome]:
    """Runs a command line inside this process, in an empty folder."""
    from foresight.cli import main

    monkeypatch.chdir(tmp_path)

    def run(*arguments: Any) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exited:
            main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return Outcome(int(exited.value.code or 0), printed.out, printed.err)

    return run
