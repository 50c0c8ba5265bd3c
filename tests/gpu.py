"""Runs the tests that mean something on a GPU, once for every backend that this machine can use it with.

For each: the contract suite, the loop against a plain one, parity with diffusers, isolation, and what only a GPU can
show. Ends in one JSON line, and fails if no backend could be run, or any test failed.

    python -m tests.gpu

With tests/simulation/modules on PYTHONPATH, the GPU and TensorRT are simulated: see tests/simulation/gpu.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.common import machine
from foresight.engines.arrays import gpu_facts
from foresight.engines.errors import ForesightError

BACKENDS = ("tensorrt", "tensorrt-rtx", "onnxruntime")
SUITES = (
    "tests/engines/test_backend_contract.py",
    "tests/runtime/test_denoise.py",
    "tests/runtime/test_isolation.py",
    "tests/runtime/test_gpu.py",
    "tests/test_parity.py",
    "tests/test_parity_cogvideox.py",
    "tests/test_parity_open_sora.py",
)
TRY = "import sys; from benchmarks.gpu.preparation import check_backend; check_backend(sys.argv[1], 'cuda')"


def main() -> None:
    """Run all suites on all backends."""
    try:
        gpu = gpu_facts("cuda")
    except ForesightError as error:
        sys.exit(f"test-gpu: {error}")
    results = {backend: run_suites(backend, sys.argv[1:]) for backend in BACKENDS}
    sys.stdout.write(json.dumps({"tests": "gpu", "machine": machine() | gpu, "backends": results}) + "\n")
    ran = [result for result in results.values() if "not run" not in result]
    sys.exit(0 if ran and all(result["failed"] == 0 < result["passed"] for result in ran) else 1)


def run_suites(backend: str, arguments: list[str], suites: Sequence[str] = SUITES) -> dict[str, Any]:
    """How many tests passed, failed and were skipped on one backend, or why it was not run."""
    tried = subprocess.run([sys.executable, "-c", TRY, backend], capture_output=True, text=True, check=False)
    if tried.returncode:
        return {"not run": (tried.stderr.strip().splitlines() or [f"exit code {tried.returncode}"])[-1]}
    environment = os.environ | {"FORESIGHT_TEST_BACKEND": backend, "FORESIGHT_TEST_DEVICE": "cuda"}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "not slow or gpu", f"--junitxml={report}", *suites, *arguments]
        done = subprocess.run(command, env=environment, check=False)
        if not report.exists():
            return {"passed": 0, "failed": 1, "skipped": 0, "crashed": done.returncode}
        return count(report)


def count(report: Path) -> dict[str, Any]:
    """The numbers in pytest's XML report, and the names of what failed."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    return {
        "passed": len(cases) - len(failed) - len(skipped),
        "failed": len(failed),
        "skipped": len(skipped),
        "failures": [f"{case.get('classname')}.{case.get('name')}" for case in failed],
    }


if __name__ == "__main__":
    main()
