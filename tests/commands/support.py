"""What a command printed, and what it should have."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from tests.support import Outcome

Cli = Callable[..., Outcome]


def assert_refused(outcome: Outcome, code: int, message: str = "") -> None:
    """One line on stderr that begins with `error:`, nothing on stdout, and the exit code."""
    lines = outcome.err.splitlines()
    assert outcome.code == code, outcome
    assert len(lines) == 1 and lines[0].startswith("error: "), outcome.err
    assert re.search(message, lines[0]), lines[0]
    assert outcome.out == ""


def document(outcome: Outcome) -> Any:
    """The one JSON document on stdout."""
    assert outcome.code == 0, outcome
    return json.loads(outcome.out)


def process(*arguments: Any, cwd: Path, limit: int | None = None, stdout: int | IO[bytes] = subprocess.PIPE) -> Outcome:
    """A command line in a process of its own; no file of it may grow beyond `limit` bytes."""
    program = "import sys; from foresight.cli import main; main(sys.argv[1:])"
    if limit is not None:
        program = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); {program}"
    command = [sys.executable, "-c", program, *(str(argument) for argument in arguments)]
    done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, cwd=cwd, check=False)
    return Outcome(done.returncode, done.stdout or "", done.stderr)
