"""Bundles of tiny random checkpoints, exported once per session.

While working on the tests, `FORESIGHT_TEST_BUNDLES=folder` keeps them between sessions; an export finds for itself
whether one is still up to date, but it does not know of changes to the exporter's code.
"""

from __future__ import annotations

import fcntl
import functools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before any library reads it: tests never touch the network

import pytest
import torch

from foresight.exporter.export import Export, ExportRequest
from foresight.runtime.pipeline import VideoPipeline
from tests.support import Outcome, load_pipeline, tiny_latte
from zoo import FAMILIES

torch.set_num_threads(1)  # for models this small more threads only wait for each other
# Where a suite is run in the background, Ctrl-C is ignored, and so it would be by all that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


LIGHT: dict[str, Any] = {"text": {"num_layers": 1}, "vae": {"block_out_channels": (8,)}}  # quick to export


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that exported bundles go to."""
    kept = os.environ.get("FORESIGHT_TEST_BUNDLES")
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base  # by all processes that run this session
    folder = Path(kept) if kept else shared / "bundles"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _export(output: Path, model: str, request: ExportRequest, checkpoint: Path | None = None) -> Path:
    """The bundle `output`, exported by whoever comes first; others wait for it."""
    with output.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return Export(model, request, None if checkpoint is None else str(checkpoint), output).run().path


@pytest.fixture(scope="session")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The random checkpoint of every family in the zoo, written when it is first asked for."""

    @functools.cache
    def write(family: str) -> Path:
        entry = FAMILIES[family]
        return entry.write_random(tmp_path_factory.mktemp("checkpoints") / family, **entry.example.settings)

    return write


@pytest.fixture(scope="session")
def example_bundles(examples: Callable[[str], Path], bundles: Path) -> Callable[[str], Path]:
    """The bundle of every family's random checkpoint, fp32; tests that damage it copy it first."""

    @functools.cache
    def export(family: str) -> Path:
        example = FAMILIES[family].example
        return _export(bundles / family, example.model, ExportRequest(**example.sizes), examples(family))

    return export


@pytest.fixture(scope="session")
def checkpoint(examples: Callable[[str], Path]) -> Path:
    """The checkpoint of most tests: five heads, two pairs of blocks, three frames of 16 x 16."""
    return examples("latte")


@pytest.fixture(scope="session")
def bundle(example_bundles: Callable[[str], Path]) -> Path:
    """The main bundle, of `checkpoint`."""
    return example_bundles("latte")


@pytest.fixture(scope="session")
def wide_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two heads, one pair, three frames of 8 x 8, whose VAE leaves the size as it is."""
    folder = tmp_path_factory.mktemp("checkpoints") / "wide"
    return tiny_latte(folder, pairs=1, seed=2, scheduler={"prediction_type": "sample"}, **LIGHT)


@pytest.fixture(scope="session")
def wide_bundle(wide_checkpoint: Path, bundles: Path) -> Path:
    """The bundle of `wide_checkpoint`, for frames of 8 x 16 pixels."""
    return _export(bundles / "wide", "latte", ExportRequest(width=16, max_batch=1), wide_checkpoint)


@pytest.fixture(scope="session")
def half_bundle(checkpoint: Path, bundles: Path) -> Path:
    """The same checkpoint in fp16."""
    return _export(bundles / "half", "latte", ExportRequest(dtype="fp16"), checkpoint)


@pytest.fixture(scope="session")
def demo_bundle(bundles: Path) -> Path:
    """The trained demo checkpoint, fp32."""
    return _export(bundles / "demo", "latte-demo", ExportRequest())


@pytest.fixture(scope="session")
def demo_half_bundle(bundles: Path) -> Path:
    """The trained demo checkpoint in fp16."""
    return _export(bundles / "demo-half", "latte-demo", ExportRequest(dtype="fp16"))


@pytest.fixture(scope="session")
def demo_bf16_bundle(bundles: Path) -> Path:
    """The trained demo checkpoint in bf16."""
    return _export(bundles / "demo-bf16", "latte-demo", ExportRequest(dtype="bf16"))


@pytest.fixture(scope="session")
def single_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One frame, one head, one pair; the model predicts the noise."""
    folder = tmp_path_factory.mktemp("checkpoints") / "single"
    return tiny_latte(folder, heads=1, head_dim=16, pairs=1, frames=1, seed=1, **LIGHT)


@pytest.fixture(scope="session")
def single_bundle(single_checkpoint: Path, bundles: Path) -> Path:
    """The bundle of `single_checkpoint`."""
    return _export(bundles / "single", "latte", ExportRequest(max_batch=1), single_checkpoint)


@pytest.fixture(scope="session")
def cogvideox_checkpoint(examples: Callable[[str], Path]) -> Path:
    """Two streams, rotary positions, a sampler that adds noise, and 17 frames that are decoded in two chunks."""
    return examples("cogvideox")


@pytest.fixture(scope="session")
def cogvideox_bundle(example_bundles: Callable[[str], Path]) -> Path:
    """The bundle of `cogvideox_checkpoint`."""
    return example_bundles("cogvideox")


@pytest.fixture(scope="session")
def open_sora_checkpoint(examples: Callable[[str], Path]) -> Path:
    """Two pairs of blocks, and a trained empty prompt."""
    return examples("open_sora")


@pytest.fixture(scope="session")
def open_sora_bundle(example_bundles: Callable[[str], Path]) -> Path:
    """The bundle of `open_sora_checkpoint`, for 34 frames, which two stages of the decoder make."""
    return example_bundles("open_sora")


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
