"""build: engines compiled for a bundle."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from foresight.engines.bundle import open_bundle
from tests.commands.support import Cli, assert_refused, document
from tests.support import Outcome, copy_bundle


def test_build_compiles_and_inspect_and_verify_know_of_it(foresight_cli: Cli, single_bundle: Path) -> None:
    pytest.importorskip("tensorrt_rtx_bindings")
    bundle = copy_bundle(single_bundle, Path("bundle"))
    parts = len(open_bundle(bundle).manifest.parts)
    built = document(foresight_cli("build", bundle, "--backend", "tensorrt-rtx", "--level", 0, "--json"))
    assert len(built["parts"]) == parts and built["scratch_bytes"] > 0 and built["settings"]["level"] == "0"
    assert document(foresight_cli("inspect", bundle, "--json"))["engines"] == [built]
    assert document(foresight_cli("verify", bundle, "--json"))["engines"] == [built["folder"]]
    plan = Path(built["folder"]) / "prologue.plan"
    plan.write_bytes(plan.read_bytes()[:-1])
    assert_refused(foresight_cli("verify", bundle), 4, "prologue.plan was altered")


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--backend", "onnxruntime"], 2, "got 'onnxruntime', expected one that compiles"),
        (["--backend", "tensorrt-rtx", "--level", 9], 2, "level: got 9, expected 0 to 5"),
        (["--backend", "tensorrt-rtx", "--workspace", 0], 2, "workspace: got 0 bytes"),
        (["--backend", "tensorrt-rtx", "--jobs", 0], 2, "jobs: got 0, expected 1 or more"),
        ([], 2, "Missing option '--backend'"),
    ],
)
def test_build_refuses_odd_flags(
    foresight_cli: Cli, single_bundle: Path, flags: list[Any], code: int, message: str
) -> None:
    assert_refused(foresight_cli("build", single_bundle, *flags), code, message)
    assert not (single_bundle / "engines").exists()


def test_build_without_the_library_says_how_to_install_it(foresight_cli: Cli, single_bundle: Path) -> None:
    code = "import sys; sys.modules['tensorrt'] = None; from foresight.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "build", str(single_bundle), "--backend", "tensorrt"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert_refused(Outcome(done.returncode, done.stdout, done.stderr), 1, "tensorrt: not installed .*pip install")
