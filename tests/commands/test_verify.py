"""verify: a bundle is as it was written."""

from __future__ import annotations

from pathlib import Path

from foresight.engines.bundle import open_bundle
from tests.commands.support import Cli, document


def test_verify_vouches_for_a_whole_bundle(foresight_cli: Cli, bundle: Path) -> None:
    opened = open_bundle(bundle)
    assert document(foresight_cli("verify", bundle, "--json")) == {
        "bundle": str(bundle),
        "id": opened.id,
        "files": len(opened.manifest.files),
        "engines": [],
        "intact": True,
    }
