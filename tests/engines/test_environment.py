"""What `env` says of a GPU, with and without one, and with libraries that are broken."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import onnxruntime
import pytest

from foresight.engines.environment import describe_environment
from foresight.engines.tensorrt.library import EDITIONS

ROOT = Path(__file__).parents[2]
SIMULATED = ROOT / "tests" / "simulation" / "modules"
CUDA = "CUDAExecutionProvider"
UNUSABLE = """
from tests.simulation.gpu import CUDARuntimeError, cuda

def fail():
    raise CUDARuntimeError("cudaErrorNoDevice")

cuda.runtime.memGetInfo = fail
"""


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose modules are found instead of those that are installed, here and in other processes."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", ""))))
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.fixture
def provider(monkeypatch: pytest.MonkeyPatch) -> None:
    """An ONNX Runtime with its CUDA provider compiled in."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, "CPUExecutionProvider"])


def simulate(modules: Path, *names: str) -> None:
    for name in names:
        (modules / f"{name}.py").symlink_to(SIMULATED / f"{name}.py")


@pytest.mark.usefixtures("provider")
def test_a_gpu_is_named(modules: Path) -> None:
    simulate(modules, "cupy")
    found = describe_environment()
    assert found["machine"]["gpu"] == "simulated GPU, compute capability 0.0, CUDA 13.0"
    assert found["can"]["run on"] == ["cpu", "cuda"]


@pytest.mark.usefixtures("provider")
def test_a_provider_alone_is_no_gpu(modules: Path) -> None:
    """As on a machine without one, where CuPy is installed and finds no driver."""
    (modules / "cupy.py").write_text("import os; os.abort()")
    found = describe_environment()
    assert found["machine"]["gpu"] == "none: crashes (signal 6); check the driver"
    assert found["can"]["run on"] == ["cpu"]


def test_a_gpu_that_cannot_be_used_says_why(modules: Path) -> None:
    (modules / "cupy.py").write_text(UNUSABLE)
    told = describe_environment()["machine"]["gpu"]
    assert told.startswith("none: fails (device cuda:0: not usable (cudaErrorNoDevice)")


def test_a_gpu_alone_runs_nothing(modules: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend has to know it: here neither TensorRT nor ONNX Runtime does."""
    simulate(modules, "cupy")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    absent = replace(EDITIONS["tensorrt"], modules=("tensorrt_that_is_not_installed",))
    monkeypatch.setattr("foresight.engines.environment.EDITIONS", {"tensorrt": absent})
    assert describe_environment()["can"]["run on"] == ["cpu"]


def test_tensorrt_alone_makes_a_gpu_usable(modules: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simulate(modules, "cupy", "tensorrt")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    found = describe_environment()["can"]
    assert found["tensorrt"] == "11.0.simulated; builds engines: yes; runs engines: yes"
    assert found["run on"] == ["cpu", "cuda"]
