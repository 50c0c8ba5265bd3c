"""What shells complete, asked as bash asks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from foresight.commands.console import COMMANDS
from foresight.engines.registry import COMPILERS, REGISTRY
from foresight.exporter.registry import REGISTRY as MODELS
from foresight.runtime.policies import POLICIES
from tests.commands.support import Cli, assert_refused

PROGRAM = """
import sys; from foresight.cli import main
try: main([])
finally: print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)
"""
HERE = [name for name, model in MODELS.items() if model.can_be_had]


def ask(protocol: str, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    typed = {"COMP_WORDS": "\n".join(["foresight", *words]), "COMP_CWORD": str(len(words))}
    command = [sys.executable, "-c", PROGRAM]
    return subprocess.run(
        command, env=os.environ | typed | {"_FORESIGHT_COMPLETE": protocol}, cwd=folder, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


@pytest.fixture
def complete(monkeypatch: pytest.MonkeyPatch, foresight_cli: Cli) -> Any:
    """What is offered for the last of the words, as bash is told: `plain`, `dir` or `file`, and the word."""
    monkeypatch.setenv("_FORESIGHT_COMPLETE", "bash_complete")

    def offered(*words: str) -> list[str]:
        monkeypatch.setenv("COMP_WORDS", "\n".join(["foresight", *words]))
        monkeypatch.setenv("COMP_CWORD", str(len(words)))
        outcome = foresight_cli()
        assert (outcome.code, outcome.err) == (0, "")
        return outcome.out.split()

    return offered


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (("run", "--policy", ""), list(POLICIES)),
        (("run", "--policy", "st"), ["static"]),
        (("run", "--cache", ""), ["output", "residual"]),
        (("run", "--backend", ""), list(REGISTRY)),
        (("parity", "--backend", "ref"), ["reference"]),
        (("parity", "--against", ""), list(REGISTRY)),
        (("build", "--backend", ""), list(COMPILERS)),
        (("export", "--backend", ""), list(COMPILERS)),
        (("export", "--model", ""), HERE),
        (("export", "--model", "latte-"), ["latte-demo"]),
        (("export", "--dtype", ""), ["fp32", "fp16", "bf16"]),
        (("export", "--dtype", "int"), []),
        (("bench", "--only", "s"), ["sea-cache", "schedule", "static"]),
        (("run", "--steps", ""), []),
        (("par",), ["parity"]),
        (("com",), []),
        (("compare", ""), list(COMMANDS)),
    ],
    ids=str,
)
def test_names_are_those_of_the_registries(complete: Any, words: tuple[str, ...], names: list[str]) -> None:
    assert complete(*words) == [f"plain,{name}" for name in names]


@pytest.mark.parametrize("words", [("verify",), ("run", "--bundle")], ids=str)
def test_bundles_are_those_under_bundles_and_else_folders(complete: Any, tmp_path: Path, words: tuple[str]) -> None:
    for name in ("b", "a", "begun.partial"):
        (tmp_path / "bundles" / name).mkdir(parents=True)
        (tmp_path / "bundles" / name / "manifest.json").touch()
    (tmp_path / "bundles" / "none").mkdir()
    assert complete(*words, "") == complete(*words, "bun") == ["plain,bundles/a", "plain,bundles/b"]
    assert complete(*words, "bundles/b") == ["plain,bundles/b"]
    assert complete(*words, "elsewhere/") == ["dir,elsewhere/"]


def test_a_shell_is_told_at_once_and_loads_nothing_heavy(tmp_path: Path) -> None:
    done = ask("bash_complete", tmp_path, "export", "--model", "cog")
    assert (done.returncode, done.stdout.split()) == (0, [f"plain,{name}" for name in HERE if name.startswith("cog")])
    assert not {"diffusers", "numpy", "onnxruntime", "tokenizers", "torch"} & set(done.stderr.split())


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_takes_the_script_and_completes_with_it(tmp_path: Path) -> None:
    script = ask("bash_source", tmp_path).stdout
    program = tmp_path / "foresight"
    program.write_text(f"#!/bin/sh\nexec {sys.executable} -c 'from foresight.cli import main; main()' \"$@\"\n")
    program.chmod(0o755)
    typed = "COMP_WORDS=(foresight run --policy st); COMP_CWORD=3; _foresight_completion foresight"
    asked = f'{script}\n{typed}\necho "${{COMPREPLY[@]}}"'
    done = subprocess.run(
        ["bash", "-c", asked],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "static"


@pytest.mark.parametrize(("flag", "value"), [("--policy", "st"), ("--cache", "out"), ("--backend", "cuda")])
def test_what_is_no_name_is_refused_by_the_library(
    foresight_cli: Cli, bundle: Path, tmp_path: Path, flag: str, value: str
) -> None:
    outcome = foresight_cli("run", "--bundle", bundle, flag, value)
    assert_refused(outcome, 2, f"^error: {flag[2:]}: got '{value}', expected ")
