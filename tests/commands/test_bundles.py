"""Bundles that are not whole, or not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.commands.support import Cli, assert_refused
from tests.support import copy_bundle, edit_manifest, snapshot


def damaged(bundle: Path, target: Path, how: str) -> Path:
    if how == "missing":
        return target
    if how == "half-written":
        target = target.with_name("bundle.partial")
        target.mkdir()
        (target / "state.json").write_text("{}")
        return target
    copy_bundle(bundle, target)
    if how == "newer schema":
        edit_manifest(target, lambda manifest: manifest.update(schema=99))
    elif how == "no manifest":
        (target / "manifest.json").unlink()
    elif how == "a changed byte":
        content = bytearray((target / "block.001.data").read_bytes())
        content[1000] ^= 1
        (target / "block.001.data").write_bytes(content)
    elif how == "a lost file":
        (target / "sampler.npz").unlink()
    elif how == "a stray file":
        (target / "stray").write_text("")
    elif how == "a manifest that is none":
        (target / "manifest.json").write_text("{}")
    return target


DAMAGES = {
    "missing": 3,
    "half-written": 3,
    "no manifest": 3,
    "newer schema": 3,
    "a changed byte": 4,
    "a lost file": 4,
    "a stray file": 4,
    "a manifest that is none": 4,
}


@pytest.mark.parametrize(("how", "code"), DAMAGES.items())
@pytest.mark.parametrize("command", ["run", "verify"])
def test_a_bundle_that_is_not_whole_is_refused(
    foresight_cli: Cli, bundle: Path, tmp_path: Path, command: str, how: str, code: int
) -> None:
    folder = damaged(bundle, tmp_path / "bundle", how)
    before = snapshot(tmp_path)
    assert_refused(foresight_cli(command, *(["--bundle", folder] if command == "run" else [folder])), code)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("command", ["run", "verify", "inspect"])
def test_without_any_bundle_it_says_how_to_make_one(foresight_cli: Cli, command: str) -> None:
    assert_refused(foresight_cli(command), 3, "no bundle under bundles/: make one with: .*export --model NAME")
