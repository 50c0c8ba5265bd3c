"""`foresight serve`: what keeps a server from beginning is one line, whatever its libraries say."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from foresight.engines.files import sole_writer
from tests.commands.support import Cli, assert_refused, process


def test_one_server_at_a_time_has_a_folder_of_jobs(foresight_cli: Cli, bundle: Path, tmp_path: Path) -> None:
    with sole_writer(tmp_path / "data"):
        outcome = foresight_cli("serve", bundle, "--data", tmp_path / "data", "--port", 0)
    assert_refused(outcome, 1, "data: another process is writing to it; wait for that, or choose another folder")
    assert not list((tmp_path / "data").iterdir())


def test_a_folder_that_cannot_be_made_is_one_line(foresight_cli: Cli, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    outcome = foresight_cli("serve", bundle, "--data", tmp_path / "file" / "data", "--port", 0)
    assert_refused(outcome, 1, "Not a directory; choose a folder that is writable")


def test_a_port_that_another_has_is_said_in_one_line(bundle: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        outcome = process("serve", bundle, "--data", tmp_path / "data", "--port", port, cwd=tmp_path)
    lines = [line for line in outcome.err.splitlines() if not line.startswith("{")]
    assert (outcome.code, lines) == (1, [f"error: serve: cannot listen on 127.0.0.1:{port}; choose another port"])


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (("batch", "rows.jsonl", "--output"), "output"),
        (("evaluate", "--output"), "output"),
        (("export", "--model", "latte-demo", "--output"), "output"),
        (("package", "--triton"), "triton"),
        (("serve", "--data"), "data"),
        (("tune", "--psnr", 40, "--output"), "output"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_no_folder_is_called_as_stdout_is(
    foresight_cli: Cli, tmp_path: Path, command: tuple[object, ...], name: str
) -> None:
    assert_refused(foresight_cli(*command, "-"), 2, f"{name}: got '-', expected a folder; give it a name")
    assert not list(tmp_path.iterdir())
