"""Keys and signatures: who signed is trusted, whatever else lies there is refused in one line."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from foresight.engines.bundle import MANIFEST, UNFINISHED, open_bundle, verify_files
from foresight.engines.compiled import INDEX, INDEX_SCHEMA, Index, fingerprint, list_compiled, verify_compiled
from foresight.engines.errors import BundleError, ForesightError, IntegrityError, InvalidRequest, OutputError
from foresight.engines.files import write_document
from foresight.engines.profiles import write_profiles
from foresight.engines.signatures import (
    INDEX_SIGNATURE,
    SIGNATURE,
    generate_key,
    read_private_key,
    read_public_keys,
)
from foresight.engines.signing import sign_bundle
from foresight.runtime.device import Runtime
from foresight.runtime.pipeline import load
from tests.support import copy_bundle, edit_manifest, profile_of, vouch_for


@pytest.fixture
def key(tmp_path: Path) -> Path:
    """The private key of a pair; the public one is `key.pub.pem`."""
    generate_key(tmp_path / "key.pem")
    return tmp_path / "key.pem"


@pytest.fixture
def public(key: Path) -> Path:
    return key.with_name("key.pub.pem")


@pytest.fixture
def signed(bundle: Path, key: Path, tmp_path: Path) -> Path:
    """A bundle that was signed, and may be damaged."""
    folder = copy_bundle(bundle, tmp_path / "signed")
    sign(folder, key)
    return folder


def sign(folder: Path, key: Path) -> list[Path]:
    opened = open_bundle(folder)
    verify_files(opened)
    return sign_bundle(opened, read_private_key(key))


def check(folder: Path, *keys: Path) -> None:
    opened = open_bundle(folder, read_public_keys(keys or None))
    verify_files(opened)
    for compiled in list_compiled(opened):
        verify_compiled(compiled)


def engines_in(folder: Path) -> Path:
    """Engines of a bundle, as far as their index: none of them is there."""
    target = {"gpu": "none"}
    index = Index(
        schema=INDEX_SCHEMA, bundle=open_bundle(folder).id, backend="tensorrt", target=target, settings={}, parts={}
    )
    place = folder / "engines" / f"tensorrt-{fingerprint(target)}"
    place.mkdir(parents=True)
    write_document(place / INDEX, index)
    return place


def test_a_bundle_is_taken_with_the_key_that_signed_it_among_others_and_without_any(
    signed: Path, public: Path, tmp_path: Path
) -> None:
    other = generate_key(tmp_path / "other.pem")
    check(signed, public)
    check(signed, other, public)
    verify_files(open_bundle(signed))


def test_a_signature_is_the_plain_one_of_the_bytes_on_disk(signed: Path, public: Path) -> None:
    signature = (signed / SIGNATURE).read_bytes()
    assert len(signature) == 64
    loaded = serialization.load_pem_public_key(public.read_bytes())
    assert isinstance(loaded, ed25519.Ed25519PublicKey)
    loaded.verify(signature, (signed / MANIFEST).read_bytes())


def test_signing_changes_neither_the_id_nor_what_is_newest(signed: Path, bundle: Path, key: Path) -> None:
    before = signed.stat().st_mtime_ns
    assert sign(signed, key) == [signed / SIGNATURE]
    assert signed.stat().st_mtime_ns == before
    assert open_bundle(signed).id == open_bundle(bundle).id


def remove(folder: Path) -> None:
    (folder / SIGNATURE).unlink()


def garbage(folder: Path) -> None:
    (folder / SIGNATURE).write_bytes(bytes(64))


def empty(folder: Path) -> None:
    (folder / SIGNATURE).write_bytes(b"")


def longer(folder: Path) -> None:
    (folder / SIGNATURE).write_bytes((folder / SIGNATURE).read_bytes() + b"\n")


def huge(folder: Path) -> None:
    os.truncate(folder / SIGNATURE, 1 << 40)


def link(folder: Path) -> None:
    (folder / SIGNATURE).rename(folder.with_name("elsewhere.sig"))
    (folder / SIGNATURE).symlink_to(folder.with_name("elsewhere.sig"))


def pipe(folder: Path) -> None:
    (folder / SIGNATURE).unlink()
    os.mkfifo(folder / SIGNATURE)


def other_manifest(folder: Path) -> None:
    edit_manifest(folder, lambda manifest: manifest["defaults"].update(fps=9))


def unreadable_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text("{")


def other_weights(folder: Path) -> None:
    with (folder / "epilogue.data").open("r+b") as file:
        file.write(b"\xff")


def other_weights_vouched_for(folder: Path) -> None:
    other_weights(folder)
    vouch_for(folder, "epilogue.data")


def profiles(folder: Path) -> None:
    write_profiles(open_bundle(folder), [profile_of("fast")])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove, r"manifest\.sig is missing; have its maker sign it"),
        (garbage, r"manifest\.sig is no signature of its manifest\.json by .*key\.pub\.pem"),
        (empty, r"is no signature"),
        (longer, r"is no signature"),
        (huge, r"larger than 1 MiB"),
        (link, r"manifest\.sig is a link"),
        (pipe, r"manifest\.sig is no regular file"),
        (other_manifest, r"is no signature"),
        (unreadable_manifest, r"is no signature"),
        (other_weights, r"epilogue\.data was altered"),
        (other_weights_vouched_for, r"is no signature"),
        (profiles, r"is no signature"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_not_as_it_was_signed_is_refused(
    signed: Path, public: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(signed)
    with pytest.raises(IntegrityError, match=message) as refused:
        check(signed, public)
    assert "\n" not in str(refused.value)


def test_profiles_that_were_written_afterwards_are_taken_once_they_are_signed(
    signed: Path, public: Path, key: Path
) -> None:
    profiles(signed)
    sign(signed, key)
    check(signed, public)


def test_a_signature_by_another_key_is_refused(signed: Path, tmp_path: Path) -> None:
    other = generate_key(tmp_path / "other.pem")
    with pytest.raises(IntegrityError, match=r"is no signature of its manifest\.json by .*other\.pub\.pem"):
        check(signed, other)


def test_a_signature_of_another_bundle_is_refused(signed: Path, single_bundle: Path, public: Path, key: Path) -> None:
    other = copy_bundle(single_bundle, signed.with_name("other"))
    other_manifest(other)
    sign(other, key)
    (signed / SIGNATURE).write_bytes((other / SIGNATURE).read_bytes())
    with pytest.raises(IntegrityError, match="is no signature"):
        check(signed, public)


def test_nothing_is_signed_that_changed_after_it_was_verified(signed: Path, key: Path) -> None:
    opened, before = open_bundle(signed), (signed / SIGNATURE).read_bytes()
    other_manifest(signed)
    with pytest.raises(IntegrityError, match=r"manifest\.json was changed"):
        sign_bundle(opened, read_private_key(key))
    assert (signed / SIGNATURE).read_bytes() == before


def test_a_signature_replaces_a_link_and_writes_through_none(signed: Path, public: Path, key: Path) -> None:
    link(signed)
    elsewhere = signed.with_name("elsewhere.sig")
    elsewhere.write_bytes(b"mine")
    (signed / f"{SIGNATURE}.tmp").symlink_to(elsewhere)
    sign(signed, key)
    check(signed, public)
    assert elsewhere.read_bytes() == b"mine" and not (signed / f"{SIGNATURE}.tmp").is_symlink()


def test_what_a_killed_signer_left_refuses_no_bundle(signed: Path, public: Path) -> None:
    (signed / f"{SIGNATURE}.tmp").write_bytes(b"half")
    check(signed, public)


@pytest.mark.parametrize("name", [SIGNATURE, UNFINISHED])
def test_no_file_of_a_bundle_is_called_like_a_signature(signed: Path, name: str) -> None:
    edit_manifest(signed, lambda manifest: manifest["files"].update({name: manifest["files"]["epilogue.data"]}))
    with pytest.raises(IntegrityError, match="leaves the bundle or is not plain"):
        open_bundle(signed)


# Compiled engines


def test_engines_are_signed_with_the_bundle(signed: Path, public: Path, key: Path) -> None:
    engines = engines_in(signed)
    assert sign(signed, key) == [signed / SIGNATURE, engines / INDEX_SIGNATURE]
    check(signed, public)
    verify_files(open_bundle(signed))


def test_engines_that_were_built_after_it_was_signed_are_refused(signed: Path, public: Path) -> None:
    engines_in(signed)
    check(signed)
    with pytest.raises(IntegrityError, match=r"engines .*engines\.sig is missing; have its maker sign it: .* sign "):
        check(signed, public)


def test_engines_whose_index_was_altered_are_refused(signed: Path, public: Path, key: Path) -> None:
    engines = engines_in(signed)
    sign(signed, key)
    index = engines / INDEX
    index.write_text(index.read_text().replace(f'"schema": {INDEX_SCHEMA}', f'"schema":  {INDEX_SCHEMA}'))
    with pytest.raises(IntegrityError, match=r"engines\.sig is no signature of its engines\.json"):
        check(signed, public)


# Loading


def test_load_takes_a_signed_bundle_and_refuses_another_before_a_file_of_it_is_opened(
    signed: Path, bundle: Path, public: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(signed, keys=[public], threads=1).close()
    remove(signed)
    monkeypatch.setattr("foresight.runtime.pipeline.verify_files", pytest.fail)
    monkeypatch.setattr("foresight.runtime.pipeline.create_backend", pytest.fail)
    with pytest.raises(IntegrityError, match=r"manifest\.sig is missing"):
        load(signed, keys=[public])


def test_a_runtime_with_keys_loads_signed_bundles_only(signed: Path, bundle: Path, public: Path) -> None:
    with Runtime(threads=1, keys=[public]) as runtime:
        runtime.load(signed, "mine")
        with pytest.raises(IntegrityError, match=r"manifest\.sig is missing"):
            runtime.load(bundle, "other")
        assert runtime.models.names() == ["mine"]


def test_no_bundle_is_loaded_from_an_address() -> None:
    with pytest.raises(BundleError, match="not found"):
        load("https://example.com/bundle")


# Keys


def test_a_private_key_is_its_owners_alone(key: Path, public: Path) -> None:
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert b"PRIVATE" in key.read_bytes() and b"PRIVATE" not in public.read_bytes()


@pytest.mark.parametrize("there", ["key.pem", "key.pub.pem"])
def test_no_key_is_ever_replaced(tmp_path: Path, there: str) -> None:
    (tmp_path / there).symlink_to("nowhere")
    with pytest.raises(OutputError, match="is there already, and no key is replaced"):
        generate_key(tmp_path / "key.pem")
    assert [path.name for path in tmp_path.iterdir()] == [there]


def test_a_key_for_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written"):
        generate_key(tmp_path / "none" / "key.pem")


def pem_of(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey, secret: bool) -> bytes:
    if not secret:
        form = serialization.PublicFormat.SubjectPublicKeyInfo
        return key.public_key().public_bytes(serialization.Encoding.PEM, form)
    none = serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, none)


def rsa_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


def curve_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


@pytest.mark.parametrize(("make", "kind"), [(rsa_key, "RSA"), (curve_key, "(EC|EllipticCurve)")])
def test_keys_of_another_kind_are_refused(
    tmp_path: Path, make: Callable[[], rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey], kind: str
) -> None:
    file, made = tmp_path / "key.pem", make()
    file.write_bytes(pem_of(made, secret=False))
    with pytest.raises(InvalidRequest, match=f"holds a public key of {kind}, expected one of Ed25519"):
        read_public_keys([file])
    file.write_bytes(pem_of(made, secret=True))
    with pytest.raises(InvalidRequest, match=f"holds a private key of {kind}, expected one of Ed25519"):
        read_private_key(file)


def test_a_key_with_a_password_is_refused(tmp_path: Path) -> None:
    form, locked = serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"secret")
    key = ed25519.Ed25519PrivateKey.generate()
    (tmp_path / "key.pem").write_bytes(key.private_bytes(serialization.Encoding.PEM, form, locked))
    with pytest.raises(InvalidRequest, match="needs a password"):
        read_private_key(tmp_path / "key.pem")


@pytest.mark.parametrize(
    "content", [b"", b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", b"\xff" * 99]
)
def test_what_is_no_key_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "key.pem").write_bytes(content)
    with pytest.raises(InvalidRequest, match="holds no public key in PEM"):
        read_public_keys([tmp_path / "key.pem"])
    with pytest.raises(InvalidRequest, match="holds no private key in PEM"):
        read_private_key(tmp_path / "key.pem")


def test_a_private_key_is_no_public_one(key: Path, public: Path) -> None:
    with pytest.raises(InvalidRequest, match="holds no public key"):
        read_public_keys([key])
    with pytest.raises(InvalidRequest, match="holds no private key"):
        read_private_key(public)


def test_files_that_no_key_is_in_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "huge").touch()
    os.truncate(tmp_path / "huge", 1 << 40)
    for name, message in (("pipe", "no regular file"), ("huge", "larger than 64 KiB"), ("none", "cannot be read")):
        with pytest.raises(InvalidRequest, match=message):
            read_public_keys([tmp_path / name])


@pytest.mark.parametrize("keys", [[], "key.pem", Path("key.pem"), [None], ["\0"]], ids=repr)
def test_what_names_no_keys_is_refused_and_never_taken_for_none(bundle: Path, keys: Any) -> None:
    with pytest.raises(InvalidRequest, match="^keys?: got|^key: .* cannot be read"):
        load(bundle, keys=keys)


def test_without_the_library_nothing_is_taken_for_signed(
    signed: Path, key: Path, public: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = read_public_keys([public])
    for name in [name for name in sys.modules if name.partition(".")[0] == "cryptography"]:
        monkeypatch.setitem(sys.modules, name, None)
    for attempt in (
        lambda: read_public_keys([public]),
        lambda: read_private_key(key),
        lambda: open_bundle(signed, keys),
        lambda: generate_key(key.with_name("new.pem")),
    ):
        with pytest.raises(ForesightError, match=r"cryptography is not installed .*foresight-engines\[sign\]"):
            attempt()
    verify_files(open_bundle(signed))
