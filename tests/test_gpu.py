"""What runs the suites for GPUs: which backends it takes for usable."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.gpu import run_suites

ROOT = Path(__file__).parents[1]
# There is no such suite: what is asked is whether it would be run.
NONE = ("tests/none.py",)
UNSUPPORTED = """
from tests.simulation import compiler
from tests.simulation.compiler import *

__version__ = "1.7.simulated"

class Runtime(compiler.Runtime):
    def deserialize_cuda_engine(self, plan):
        self._logger.log(ILogger.Severity.ERROR, "compute capability 9.0 is not supported")
"""


@pytest.fixture(autouse=True)
def _simulated_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Modules in the test's folder come before those of the simulation."""
    folders = (tmp_path, ROOT / "tests" / "simulation" / "modules", ROOT, *os.environ.get("PYTHONPATH", "").split(":"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, folders)))
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("backend", ["tensorrt", pytest.param("tensorrt-rtx", marks=pytest.mark.slow)])
def test_a_library_that_runs_engines_is_used(backend: str) -> None:
    assert "not run" not in run_suites(backend, ["--quiet"], NONE)


def test_a_library_that_does_not_know_the_gpu_is_not(tmp_path: Path) -> None:
    (tmp_path / "tensorrt_rtx.py").write_text(UNSUPPORTED, encoding="utf-8")
    reason = run_suites("tensorrt-rtx", [], NONE)["not run"]
    assert "tensorrt-rtx: runs no engines on this GPU (no, compute capability 9.0 is not supported)" in reason
