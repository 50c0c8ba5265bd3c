"""What is particular to the ONNX Runtime backend: its threads, and never a silent fallback."""

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


def test_other_sessions_in_the_process_are_left_alone(bundle: Path) -> None:
    """Those of a library that knows nothing of this one: it makes sessions as everybody does, before and after."""
    program = (
        "import sys, pathlib, onnxruntime as ort, foresight; graph = str(pathlib.Path(sys.argv[1]) / 'prologue.onnx');"
        "make = lambda: ort.InferenceSession(graph, providers=['CPUExecutionProvider']);"
        "before = make(); foresight.load(sys.argv[1]); make(); print('both')"
    )
    command = [sys.executable, "-c", program, str(bundle)]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "both\n"


def test_backends_of_one_process_may_differ_in_threads() -> None:
    assert [OnnxRuntimeBackend(threads=threads).threads for threads in (1, 3)] == [1, 3]


@pytest.mark.parametrize("threads", [0, -1])
def test_at_least_one_thread_is_needed(threads: int) -> None:
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


OTHERS = {
    "a pool for all sessions, made before": ("ort.set_global_thread_pool_sizes(2, 1)", ""),
    "a pool for all sessions, made later": ("", "ort.set_global_thread_pool_sizes(2, 1)"),
    "an arena for all sessions, made before": ("arena()", ""),
    "an arena for all sessions, made later": ("", "arena()"),
    "both, made before": ("arena(); ort.set_global_thread_pool_sizes(2, 1)", ""),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_others_share_in_the_process_is_shared(single_bundle: Path, kind: str) -> None:
    before, later = OTHERS[kind]
    program = f"""
import sys, onnxruntime as ort, foresight
from onnxruntime.capi import onnxruntime_pybind11_state as native

def arena():
    kind = native.OrtAllocatorType.ORT_ARENA_ALLOCATOR
    native.create_and_register_allocator(native.OrtMemoryInfo("Cpu", kind, 0, native.OrtMemType.DEFAULT), None)

{before}
first = foresight.load(sys.argv[1], threads=1)
video = first("a dog", steps=2)
{later}
again, second = first("a dog", steps=2), foresight.load(sys.argv[1], threads=1)("a dog", steps=2)
print(len({{one.latents.tobytes() for one in (video, again, second)}}), second.trace.backend["threads"])
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(single_bundle)], check=True, capture_output=True, text=True
    )
    assert done.stdout == ("1 the process's pool\n" if "pool" in kind + before else "1 1\n")
    assert done.stderr == ""
