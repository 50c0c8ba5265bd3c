"""What is served is what was verified: whatever happens to a bundle's files is an error, or changes nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foresight.engines import bundle as bundle_module
from foresight.engines.errors import IntegrityError, InvalidRequest
from foresight.runtime import pipeline as pipeline_module
from foresight.runtime.pipeline import VideoPipeline, load
from tests.support import copy_bundle

PROMPT = "a red circle moving right"
CHANGED = r"was changed or removed after it was verified; load the bundle again"


def truncate(folder: Path) -> None:
    for file in folder.iterdir():
        os.truncate(file, 0)


def overwrite(folder: Path) -> None:
    for file in folder.glob("*.data"):
        with file.open("r+b") as opened:
            opened.write(b"\xff" * file.stat().st_size)


def overwrite_unseen(folder: Path) -> None:
    for file in folder.glob("*.data"):
        before = file.stat()
        overwrite(folder)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace(folder: Path) -> None:
    for file in folder.glob("*.data"):
        other = file.with_suffix(".tmp")
        other.write_bytes(file.read_bytes())
        other.replace(file)


def delete(folder: Path) -> None:
    shutil.rmtree(folder)


def replace_by_folder(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").mkdir()


def replace_by_link(folder: Path) -> None:
    (folder / "epilogue.onnx").rename(folder.parent / "epilogue.onnx")
    (folder / "epilogue.onnx").symlink_to(folder.parent / "epilogue.onnx")


HARMS: list[Callable[[Path], None]] = [
    truncate,
    overwrite,
    overwrite_unseen,
    replace,
    delete,
    replace_by_folder,
    replace_by_link,
]


@pytest.fixture
def copied(single_bundle: Path, tmp_path: Path) -> Path:
    """A bundle to damage."""
    return copy_bundle(single_bundle, tmp_path / "copied")


def made(pipeline: VideoPipeline, **settings: Any) -> bytes:
    video = pipeline(PROMPT, steps=3, **settings)
    return bytes(video.frames.tobytes() + video.latents.tobytes())


def mapped(folder: Path) -> bool:
    return str(folder) in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("low_memory", [False, True], ids=["", "low_memory"])
@pytest.mark.parametrize("harm", HARMS)
def test_a_request_after_files_were_changed_is_refused(
    copied: Path, harm: Callable[[Path], None], low_memory: bool
) -> None:
    pipeline = load(copied, low_memory=low_memory, threads=1)
    harm(copied)
    with pytest.raises(IntegrityError, match=CHANGED):
        made(pipeline)


@pytest.mark.parametrize("harm", [truncate, overwrite, replace, delete])
def test_a_request_during_which_files_are_changed_is_as_if_they_were_not(
    copied: Path, harm: Callable[[Path], None]
) -> None:
    pipeline = load(copied, threads=1)
    expected = made(pipeline)
    assert not mapped(copied), "what is mapped cannot be truncated without SIGBUS"
    assert made(pipeline, on_step=lambda done, total, trace: harm(copied) if done == 1 else None) == expected


@pytest.mark.parametrize("harm", [truncate, overwrite, replace, delete])
def test_with_low_memory_a_phase_whose_files_were_changed_is_not_run(
    copied: Path, harm: Callable[[Path], None]
) -> None:
    pipeline = load(copied, low_memory=True, threads=1)
    with pytest.raises(IntegrityError, match=rf"vae_decoder\S+ {CHANGED}"):
        made(pipeline, on_step=lambda done, total, trace: harm(copied) if done == 1 else None)


@pytest.mark.parametrize("low_memory", [False, True], ids=["", "low_memory"])
@pytest.mark.parametrize("name", ["block.001.data", "epilogue.onnx", "tokenizer.json", "sampler.npz"])
def test_a_file_replaced_between_verifying_and_loading_is_not_loaded(
    copied: Path, monkeypatch: pytest.MonkeyPatch, name: str, low_memory: bool
) -> None:
    verify = bundle_module.verify_files

    def verify_and_replace(*arguments: Any, **settings: Any) -> None:
        verify(*arguments, **settings)
        other = copied.parent / name
        shutil.copy(copied / name, other)
        other.replace(copied / name)

    monkeypatch.setattr(pipeline_module, "verify_files", verify_and_replace)
    with pytest.raises(IntegrityError, match=f"{name} {CHANGED}"):
        made(load(copied, low_memory=low_memory, threads=1))


def test_weights_may_stay_mapped_for_processes_to_share(copied: Path) -> None:
    own, shared = load(copied, threads=1), load(copied, threads=1, shared_weights=True)
    assert mapped(copied)
    videos = [pipeline(PROMPT, steps=3) for pipeline in (own, shared)]
    np.testing.assert_allclose(videos[0].latents, videos[1].latents, atol=1e-4)
    overwrite(copied)
    with pytest.raises(IntegrityError, match=CHANGED):
        made(shared)


def test_only_onnx_runtime_on_cpus_shares_weights(single_bundle: Path) -> None:
    with pytest.raises(InvalidRequest, match="shared_weights: got reference, expected onnxruntime"):
        load(single_bundle, backend="reference", shared_weights=True)
