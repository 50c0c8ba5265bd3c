"""Profiles in a manifest: what they change of a bundle, and what they leave as it was."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from foresight.engines.bundle import MANIFEST, UNFINISHED, newest_bundle, open_bundle, verify_files
from foresight.engines.errors import BundleError, IntegrityError, OutputError
from foresight.engines.files import sole_writer
from foresight.engines.manifest import PolicyProfile
from foresight.engines.profiles import write_profiles
from tests.support import copy_bundle, edit_manifest, profile_of, snapshot


@pytest.fixture
def copied(bundle: Path, tmp_path: Path) -> Path:
    return copy_bundle(bundle, tmp_path / "copied")


def write(folder: Path, *profiles: PolicyProfile) -> None:
    write_profiles(open_bundle(folder), profiles)


def test_profiles_are_there_after_they_were_written(copied: Path) -> None:
    written = write_profiles(open_bundle(copied), [profile_of("fast", steps=6), profile_of("fast", steps=4)])
    assert written.manifest.profiles == (profile_of("fast", steps=4), profile_of("fast", steps=6))
    assert open_bundle(copied).manifest == written.manifest
    verify_files(written)


def test_a_profile_of_the_same_name_and_steps_is_replaced_and_others_stay(copied: Path) -> None:
    write(copied, profile_of("fast"), profile_of("quality"))
    write(copied, profile_of("fast", settings={"tolerance": 0.5}))
    kept = open_bundle(copied).manifest.profiles
    assert [(profile.name, profile.settings["tolerance"]) for profile in kept] == [("fast", 0.5), ("quality", 0.25)]


def test_the_id_stays_whatever_profiles_there_are(copied: Path) -> None:
    before = open_bundle(copied).id
    write(copied, profile_of("fast"))
    assert open_bundle(copied).id == before
    write(copied, profile_of("fast", steps=5), profile_of("quality"))
    assert open_bundle(copied).id == before


def test_the_id_changes_with_all_else_of_a_manifest_with_profiles(copied: Path) -> None:
    write(copied, profile_of("fast"))
    before = open_bundle(copied).id
    edit_manifest(copied, lambda manifest: manifest["defaults"].update(fps=9))
    assert open_bundle(copied).id != before


def test_a_manifest_without_profiles_says_nothing_of_them(bundle: Path) -> None:
    manifest = open_bundle(bundle).manifest
    assert manifest.profiles == () and "profiles" not in msgspec.to_builtins(manifest)


def test_all_other_files_and_what_is_newest_stay(copied: Path, bundle: Path) -> None:
    later = copy_bundle(bundle, copied.with_name("later"))
    for folder, time in ((copied, 10**9), (later, 10**9 + 1)):
        for place in (folder / MANIFEST, folder):
            os.utime(place, (time, time))
    before = {name: content for name, content in snapshot(copied).items() if name != MANIFEST}
    write(copied, profile_of("fast"))
    assert {name: content for name, content in snapshot(copied).items() if name != MANIFEST} == before
    assert newest_bundle(copied.parent) == later


def test_what_a_killed_writer_left_harms_nobody(copied: Path) -> None:
    (copied / UNFINISHED).write_text("half")
    verify_files(open_bundle(copied))
    write(copied, profile_of("fast"))
    assert not (copied / UNFINISHED).exists()


def test_nothing_is_written_through_a_link(copied: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (copied / UNFINISHED).symlink_to(victim)
    write(copied, profile_of("fast"))
    assert victim.read_text() == "mine" and not (copied / MANIFEST).is_symlink()


def test_a_full_disk_leaves_the_manifest_as_it_was(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = snapshot(copied)

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OutputError, match="profiles cannot be written .No space left on device."):
        write(copied, profile_of("fast"))
    assert snapshot(copied) == before


def test_two_writers_do_not_write_at_once(copied: Path) -> None:
    with sole_writer(copied), pytest.raises(OutputError, match="another process is writing to it"):
        write(copied, profile_of("fast"))


def test_another_bundle_in_its_place_gets_no_profiles(copied: Path, wide_bundle: Path) -> None:
    opened = open_bundle(copied)
    shutil.rmtree(copied)
    copy_bundle(wide_bundle, copied)
    with pytest.raises(BundleError, match="is not the one that was tuned"):
        write_profiles(opened, [profile_of("fast")])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "a/b"}, "profile 'a/b' has no plain name"),
        ({"steps": 101}, "profile fast for 101 steps is not in 1 to 100"),
        ({"steps": 0}, "profile fast for 0 steps is not in 1 to 100"),
        ({"settings": {"tolerance": 1e300}}, "tolerance is 1e.300"),
        ({"settings": {"tolerance": {}}}, "manifest.json is not valid"),
        ({"name": "fast\x07"}, "characters that cannot be printed"),
        ({"extra": 1}, "manifest.json is not valid"),
    ],
)
def test_profiles_that_cannot_be_are_refused(copied: Path, change: dict[str, Any], message: str) -> None:
    profile = msgspec.to_builtins(profile_of("fast")) | change
    edit_manifest(copied, lambda manifest: manifest.update(profiles=[profile]))
    with pytest.raises(IntegrityError, match=message):
        open_bundle(copied)


def test_a_profile_that_is_there_twice_is_refused(copied: Path) -> None:
    profiles = [msgspec.to_builtins(profile_of("fast"))] * 2
    edit_manifest(copied, lambda manifest: manifest.update(profiles=profiles))
    with pytest.raises(IntegrityError, match="it has profile fast for 4 steps twice"):
        open_bundle(copied)
