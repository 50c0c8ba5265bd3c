"""What is particular to the ONNX Runtime backend: its one pool of threads, and never a silent fallback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from foresight.engines.bundle import open_bundle
from foresight.engines.errors import EngineError, InvalidRequest
from foresight.engines.onnxruntime import OnnxRuntimeBackend


@pytest.mark.filterwarnings("ignore:Specified provider:UserWarning")
def test_a_session_that_fell_back_to_the_cpu_is_refused(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, opened = OnnxRuntimeBackend(), open_bundle(bundle)
    monkeypatch.setattr(backend, "_provider", "CUDAExecutionProvider")
    with pytest.raises(EngineError, match="epilogue: got CPUExecutionProvider, expected CUDAExecutionProvider"):
        backend.load(opened, opened.manifest.epilogue)


def test_the_pool_keeps_its_size_for_the_life_of_the_process() -> None:
    first = OnnxRuntimeBackend()
    with pytest.raises(InvalidRequest, match="threads: got"):
        OnnxRuntimeBackend(threads=first.threads + 1)


def test_the_pool_may_be_asked_for_again_in_the_size_it_has() -> None:
    assert OnnxRuntimeBackend(threads=OnnxRuntimeBackend().threads).threads == OnnxRuntimeBackend().threads


@pytest.mark.parametrize("threads", [0, -1])
def test_a_pool_needs_a_thread(threads: int) -> None:
    with pytest.raises(InvalidRequest, match="threads"):
        OnnxRuntimeBackend(threads=threads)


def test_the_number_of_threads_does_not_change_the_frames(bundle: Path) -> None:
    program = (
        "import sys, hashlib, foresight; p = foresight.load(sys.argv[1], threads=int(sys.argv[2]));"
        "v = p('a red circle', steps=3); print(hashlib.sha256(v.latents.tobytes()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", program, str(bundle), threads], check=True, capture_output=True, text=True
        ).stdout
        for threads in ("1", "2")
    }
    assert len(digests) == 1
