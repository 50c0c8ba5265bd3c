"""sign, verify --key: a bundle is its maker's, and stays it."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from tests.commands.support import Cli, assert_refused, document
from tests.support import copy_bundle, edit_manifest


@pytest.fixture
def copied(bundle: Path, tmp_path: Path) -> Path:
    return copy_bundle(bundle, tmp_path / "copied")


@pytest.fixture
def keys(foresight_cli: Cli, tmp_path: Path) -> tuple[Path, Path]:
    """A private and a public key."""
    made = document(foresight_cli("sign", "--generate", tmp_path / "key.pem", "--json"))
    assert made == {"private": str(tmp_path / "key.pem"), "public": str(tmp_path / "key.pub.pem")}
    return Path(made["private"]), Path(made["public"])


def test_what_was_signed_is_verified_with_the_public_key(
    foresight_cli: Cli, copied: Path, keys: tuple[Path, Path]
) -> None:
    private, public = keys
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    signed = document(foresight_cli("sign", copied, "--key", private, "--json"))
    assert signed["signatures"] == [str(copied / "manifest.sig")]
    verified = document(foresight_cli("verify", copied, "--key", public, "--json"))
    assert (verified["id"], verified["signed"]) == (signed["id"], True)
    assert "signed by one of the keys given" in foresight_cli("verify", copied, "--key", public).out


def test_what_was_not_signed_or_altered_since_is_refused(
    foresight_cli: Cli, copied: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    private, public = keys
    assert_refused(foresight_cli("verify", copied, "--key", public), 4, r"manifest\.sig is missing")
    foresight_cli("sign", copied, "--key", private)
    foresight_cli("sign", "--generate", tmp_path / "other.pem")
    other = tmp_path / "other.pub.pem"
    assert_refused(foresight_cli("verify", copied, "--key", other), 4, "is no signature of its manifest")
    edit_manifest(copied, lambda manifest: manifest["defaults"].update(fps=9))
    assert_refused(foresight_cli("verify", copied, "--key", public), 4, "is no signature of its manifest")


def test_a_damaged_bundle_is_not_signed(foresight_cli: Cli, copied: Path, keys: tuple[Path, Path]) -> None:
    (copied / "epilogue.data").write_bytes(b"")
    assert_refused(foresight_cli("sign", copied, "--key", keys[0]), 4, r"epilogue\.data has 0 bytes")
    assert not (copied / "manifest.sig").exists()


def test_a_key_is_not_replaced(foresight_cli: Cli, keys: tuple[Path, Path]) -> None:
    assert_refused(foresight_cli("sign", "--generate", keys[0]), 1, "is there already, and no key is replaced")


def test_arguments_that_say_too_little_or_too_much_are_refused(
    foresight_cli: Cli, copied: Path, keys: tuple[Path, Path]
) -> None:
    assert_refused(foresight_cli("sign", copied), 2, "expected BUNDLE and --key")
    assert_refused(foresight_cli("sign", "--key", keys[0]), 2, "expected BUNDLE and --key")
    assert_refused(foresight_cli("sign", copied, "--generate", keys[0]), 2, "expected --generate alone")
    assert_refused(foresight_cli("sign", copied, "--key", keys[1]), 2, "holds no private key in PEM")
    assert_refused(foresight_cli("verify", copied, "--key", keys[0]), 2, "holds no public key in PEM")


def test_a_server_refuses_what_was_not_signed_before_it_begins(
    foresight_cli: Cli, copied: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    outcome = foresight_cli("serve", copied, "--data", tmp_path / "data", "--port", 0, "--signed-by", keys[1])
    assert_refused(outcome, 4, r"manifest\.sig is missing")
