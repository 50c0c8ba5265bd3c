"""verify: a bundle is as it was written."""

from __future__ import annotations

from pathlib import Path

from foresight.engines.bundle import open_bundle
from foresight.engines.profiles import write_profiles
from tests.commands.support import Cli, assert_refused, document
from tests.support import copy_bundle, profile_of


def test_verify_vouches_for_a_whole_bundle(foresight_cli: Cli, bundle: Path) -> None:
    opened = open_bundle(bundle)
    assert document(foresight_cli("verify", bundle, "--json")) == {
        "bundle": str(bundle),
        "id": opened.id,
        "files": len(opened.manifest.files),
        "engines": [],
        "intact": True,
        "signed": False,
    }


def test_verify_refuses_profiles_of_policies_that_there_are_not(
    foresight_cli: Cli, bundle: Path, tmp_path: Path
) -> None:
    copied = copy_bundle(bundle, tmp_path / "copied")
    write_profiles(open_bundle(copied), [profile_of("fast", policy="magic")])
    assert_refused(foresight_cli("verify", copied), 3, "profile fast for 4 steps is none of this version")
