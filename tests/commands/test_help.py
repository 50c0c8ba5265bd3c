"""The help of every command, word by word, in terminals of two widths.

`python -m tests.commands.test_help` writes tests/commands/help.txt anew.
"""

from __future__ import annotations

import io
import os
from contextlib import redirect_stdout, suppress
from pathlib import Path

import pytest

from foresight.cli import main
from foresight.commands.console import COMMANDS

RECORD = Path(__file__).parent / "help.txt"
WIDTHS = (80, 110)


def _helps() -> str:
    """All of them, each after the command that was typed and the columns of its terminal."""
    told = io.StringIO()
    for arguments in ([], *([command] for command in COMMANDS)):
        for width in WIDTHS:
            os.environ["COLUMNS"] = str(width)
            print("$", *["foresight", *arguments, "--help"], f"  # {width} columns", file=told)
            with redirect_stdout(told), suppress(SystemExit):
                main([*arguments, "--help"])
            print(file=told)
    return told.getvalue()


def test_help_is_as_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "")  # so that it is as before in the end
    assert _helps() == RECORD.read_text(encoding="utf-8"), "run: python -m tests.commands.test_help"


if __name__ == "__main__":
    RECORD.write_text(_helps(), encoding="utf-8")
