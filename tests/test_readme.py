"""The README holds: its commands and its Python run, and its tables are the recorded results."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.readme import PAGES, render

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for language, block in BLOCKS if language == "bash" for line in block.splitlines() if line]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder in which the README is followed from top to bottom."""
    return tmp_path_factory.mktemp("readme")


def follow(arguments: list[str], folder: Path) -> None:
    done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(arguments)}\n{done.stderr}"


def test_every_command_is_one_of_ours() -> None:
    assert COMMANDS
    assert all(command.startswith("python cli.py ") for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_runs(command: str, folder: Path) -> None:
    follow([str(REPOSITORY / "cli.py"), *shlex.split(command)[2:]], folder)


def test_files_named_in_the_commands_were_written(folder: Path) -> None:
    for name in ("blue.mp4", "latents.npy", "frames.npy", "page.html", "trace.json"):
        assert (folder / name).stat().st_size > 0, name


def test_embedding_example_runs(folder: Path) -> None:
    example = "\n".join(block for language, block in BLOCKS if language == "python")
    follow(["-c", example], folder)
    assert (folder / "circle.mp4").is_file()


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_the_recorded_results(page: str) -> None:
    assert render(page) == (REPOSITORY / page).read_text(encoding="utf-8"), "run: python -m benchmarks.readme"
