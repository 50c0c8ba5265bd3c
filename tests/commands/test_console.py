"""What all commands share: errors, help, exit codes."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from foresight.commands.console import COMMANDS
from tests.commands.support import Cli, assert_refused
from tests.support import copy_bundle, edit_manifest

REPOSITORY = Path(__file__).parents[2]


def test_an_error_with_json_is_one_document_too(foresight_cli: Cli, tmp_path: Path) -> None:
    outcome = foresight_cli("verify", tmp_path / "nowhere", "--json")
    error = json.loads(outcome.out)["error"]
    assert outcome.code == error["exit_code"] == 3
    assert error["type"] == "BundleError" and error["message"] in outcome.err


def test_a_usage_error_with_json_is_one_document_too(foresight_cli: Cli) -> None:
    outcome = foresight_cli("run", "--steps", "many", "--json")
    assert outcome.code == json.loads(outcome.out)["error"]["exit_code"] == 2


def test_a_traceback_only_with_debug(foresight_cli: Cli, tmp_path: Path) -> None:
    assert "Traceback" not in foresight_cli("verify", tmp_path / "nowhere").err
    debugged = foresight_cli("verify", tmp_path / "nowhere", "--debug")
    assert "Traceback" in debugged.err and debugged.err.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=str)
def test_help_is_given_on_stdout(foresight_cli: Cli, command: list[str]) -> None:
    outcome = foresight_cli(*command, "--help")
    assert (outcome.code, outcome.err) == (0, "") and "Usage: foresight" in outcome.out


def test_version_is_told(foresight_cli: Cli) -> None:
    import foresight

    assert foresight.__version__ in foresight_cli("--version").out


@pytest.mark.parametrize("flags", [(), ("bundles/a b", "--steps", 1), ("--help",)], ids=str)
def test_a_command_by_its_former_name_is_told_its_name(foresight_cli: Cli, flags: tuple[Any, ...]) -> None:
    told = shlex.join(["parity", *map(str, flags)])
    assert_refused(foresight_cli("compare", *flags), 2, f"compare: this command is called parity; run: .* {told}$")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--interval", 1), r"interval: got 1, expected more than --reuse-steps \(1\)"),
        (("--cache-memory", 0), "--cache-memory: got 0"),
        (("--save-latents", "x.txt"), r"--save-latents: got 'x\.txt'"),
        (("--policy", "cache_memory"), "policy: got 'cache_memory'"),
        (("--prompts", "the_warmup/cache_memory.txt"), r"prompts the_warmup/cache_memory\.txt: "),
        (("--output", "v.npy", "--bundle", "low_memory"), "bundle low_memory: "),
    ],
    ids=str,
)
def test_errors_name_flags_where_the_library_names_arguments(
    foresight_cli: Cli, flags: tuple[Any, ...], message: str
) -> None:
    outcome = foresight_cli("run", *flags)
    assert outcome.code in (2, 3) and re.search(f"^error: {message}", outcome.err), outcome.err


def test_what_is_wrong_with_a_manifest_is_told_in_its_own_words(
    foresight_cli: Cli, single_bundle: Path, tmp_path: Path
) -> None:
    copy = copy_bundle(single_bundle, tmp_path / "bundle")
    edit_manifest(copy, lambda manifest: manifest["shape"].update(max_batch=0))
    assert_refused(foresight_cli("inspect", copy), 4, r"\bmax_batch\b")


HELP_LOADS = """
import sys; from foresight.cli import main
try: main(sys.argv[1:])
finally: print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)
"""


@pytest.mark.parametrize("command", [[], ["export"], ["run"]], ids=str)
def test_help_loads_nothing_heavy(command: list[str]) -> None:
    shown = [sys.executable, "-c", HELP_LOADS, *command, "--help"]
    done = subprocess.run(shown, capture_output=True, text=True, check=True)
    assert not {"av", "diffusers", "numpy", "onnxruntime", "tokenizers", "torch"} & set(done.stderr.split())


def test_an_unknown_command_is_a_usage_error(foresight_cli: Cli) -> None:
    assert_refused(foresight_cli("fly"), 2, "fly")


def test_no_command_at_all_shows_the_help(foresight_cli: Cli) -> None:
    outcome = foresight_cli()
    assert outcome.code in (0, 2)
    assert "\n" in (outcome.out + outcome.err).strip(), "the help is more than one line"


def test_the_script_runs_from_a_clone(bundle: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(REPOSITORY / "cli.py"), "verify", str(bundle), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert json.loads(done.stdout)["intact"] is True
