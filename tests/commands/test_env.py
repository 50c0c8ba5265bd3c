"""env: what this machine can run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.commands.support import Cli, document


def test_env_tells_machine_and_libraries(foresight_cli: Cli) -> None:
    found = document(foresight_cli("env", "--json"))
    assert found["machine"]["cores"] >= 1 and "cpu" in found["can"]["run on"]
    assert found["libraries"]["onnxruntime"]


def test_env_asks_tensorrt_what_it_can_do_here(foresight_cli: Cli) -> None:
    pytest.importorskip("tensorrt_rtx_bindings")
    told = document(foresight_cli("env", "--json"))["can"]["tensorrt-rtx"]
    assert re.fullmatch(r"\d+\.\d+\S*; builds engines: yes; runs engines: (yes|no, .+)", told)


def test_env_survives_a_library_that_crashes(
    foresight_cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As TensorRT does where the driver is broken."""
    (tmp_path / "tensorrt.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    told = document(foresight_cli("env", "--json"))["can"]["tensorrt"]
    assert told == "crashes (signal 11); check the driver"
