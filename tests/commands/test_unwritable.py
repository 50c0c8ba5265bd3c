"""Outputs that cannot be written: files, and stdout."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.commands.support import Cli, assert_refused, process


@pytest.mark.parametrize("flag", ["--output", "--save-frames", "--save-latents", "--trace", "--report"])
def test_a_place_that_cannot_be_written_is_refused_before_the_work(
    foresight_cli: Cli, bundle: Path, tmp_path: Path, flag: str
) -> None:
    (tmp_path / "file").write_text("")
    suffix = {"--output": ".mp4", "--trace": ".json", "--report": ".html"}.get(flag, ".npy")
    assert_refused(foresight_cli("run", "--bundle", bundle, flag, f"file/x{suffix}"), 1, "writable|check the path")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("flags", "module"),
    [
        ((), "av"),
        (("--output", "v.gif"), "PIL.Image"),
        (("--output", "folder"), "PIL.Image"),
        (("--output", "v.npy", "--report", "r.html"), "jinja2"),
    ],
    ids=str,
)
def test_a_library_that_an_output_needs_is_missed_before_the_work(
    foresight_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], module: str
) -> None:
    """Even before the bundle is looked for."""
    monkeypatch.setitem(sys.modules, module, None)
    assert_refused(foresight_cli("run", "--bundle", "nowhere", *flags), 1, 'is not installed .*pip install "foresight')
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["v.mp4", "v.gif", "v.npy", "folder"])
def test_a_full_disk_fails_in_one_line_and_leaves_no_half_file(bundle: Path, tmp_path: Path, name: str) -> None:
    arguments = ["run", "--bundle", bundle, "--steps", 1, "--output", name]
    assert_refused(process(*arguments, cwd=tmp_path, limit=100), 1, f"output {name}: File too large")
    assert not list(tmp_path.iterdir())


needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")


@needs_full
@pytest.mark.parametrize("flags", [(), ("--json",)], ids=str)
def test_a_stdout_that_takes_nothing_fails_in_one_line_after_the_work(
    bundle: Path, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    arguments = ["run", "--bundle", bundle, "--steps", 1, "--output", "v.npy", *flags]
    with Path("/dev/full").open("wb") as full:
        assert_refused(process(*arguments, cwd=tmp_path, stdout=full), 1, "error: stdout: No space left on device; ")
    assert (tmp_path / "v.npy").is_file()


@needs_full
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("run", "--help"), 1, "stdout"),
        (("--version",), 1, "stdout"),
        (("verify", "nowhere", "--json"), 3, "bundle nowhere"),
    ],
    ids=str,
)
def test_help_and_errors_that_stdout_does_not_take_end_in_one_line(
    tmp_path: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    with Path("/dev/full").open("wb") as full:
        assert_refused(process(*arguments, cwd=tmp_path, stdout=full), code, f"error: {message}")


@pytest.mark.parametrize("flags", [(), ("--json",)], ids=str)
def test_a_reader_that_has_seen_enough_ends_the_command_without_a_word(
    bundle: Path, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    outcome = process("inspect", bundle, *flags, cwd=tmp_path, stdout=writer)
    os.close(writer)
    assert (outcome.code, outcome.err) == (1, "")


def test_an_error_after_the_reader_has_left_is_still_one_line(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    assert_refused(process("verify", "nowhere", "--json", cwd=tmp_path, stdout=writer), 3, "bundle nowhere")
    os.close(writer)
