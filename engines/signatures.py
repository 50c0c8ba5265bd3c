"""Who made a bundle: detached Ed25519 signatures beside the two files that vouch for all others.

`manifest.sig` signs the bytes of `manifest.json`, which has the SHA-256 of every file; `engines.sig` in a folder of
compiled engines signs those of its `engines.json`, which names its bundle and has the SHA-256 of every plan. A
signature is 64 bytes, as RFC 8032 has it, so that other programs can check it too. Keys are PEM: PKCS #8, and
SubjectPublicKeyInfo. The library, cryptography, is imported when a key is used.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from .errors import ForesightError, IntegrityError, InvalidRequest, OutputError, one_line, quoted
from .files import TEMPORARY, write_atomically
from .verify import read_small
from .wording import command

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

SIGNATURE = "manifest.sig"
INDEX_SIGNATURE = "engines.sig"
SIGNATURES = {name + end for name in (SIGNATURE, INDEX_SIGNATURE) for end in ("", TEMPORARY)}
KEY_BYTES = 64 << 10
MOST_BYTES = 1 << 20  # that are read of what should be a signature

KeyFile: TypeAlias = str | os.PathLike[str]


@dataclass(frozen=True)
class PublicKey:
    """Of somebody who is trusted: 32 bytes, and the file that they came from, for messages. Can be pickled."""

    name: str
    raw: bytes


def read_public_keys(files: Iterable[KeyFile] | None) -> tuple[PublicKey, ...]:
    """The keys in these PEM files, one of which must have signed; of None, none, and nothing need be signed.

    Raises InvalidRequest for what holds no public Ed25519 key, and for no files at all; ForesightError where the
    library is not installed.
    """
    if files is None:
        return ()
    if isinstance(files, (str, bytes, os.PathLike)):
        raise InvalidRequest(f"keys: got {quoted(files)}, expected a list of PEM files")
    keys = tuple(_read_public_key(file) for file in files)
    if not keys:
        raise InvalidRequest("keys: got none, expected at least one PEM file, or None for bundles that nobody signed")
    return keys


def read_private_key(file: KeyFile) -> Ed25519PrivateKey:
    """The key to sign with. Raises InvalidRequest for what holds none, ForesightError without the library."""
    return _read_key(file, "private", "Ed25519PrivateKey")  # type: ignore[no-any-return]


def generate_key(file: Path) -> Path:
    """Write a new private key, which its owner alone may read, and beside it the public one, whose path is returned.

    Raises OutputError, also where either file is there already: neither is ever replaced.
    """
    serialization, ed25519 = _library()
    public = file.with_name(f"{file.stem}.pub{file.suffix}")
    key = ed25519.Ed25519PrivateKey.generate()
    pem = serialization.Encoding.PEM
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    shared = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    if os.path.lexists(public):  # before there is a private key without it
        raise OutputError(f"key: {public} is there already, and no key is replaced; choose another name")
    _write_new(file, secret, 0o600)
    try:
        _write_new(public, shared, 0o644)
    except OutputError:
        file.unlink(missing_ok=True)  # nobody has signed with it
        raise
    return public


def sign_file(folder: Path, name: str, signature: str, content: bytes, key: Ed25519PrivateKey) -> None:
    """Sign the content of a file; its signature appears beside it, whole or not at all. Raises OutputError."""
    place = folder / signature
    try:
        write_atomically(place, key.sign(content))
    except OSError as error:
        raise OutputError(
            f"{folder}: {name} cannot be signed ({error.strerror or error}); check its permissions and the free space"
        ) from error
    finally:
        with suppress(OSError):
            place.with_name(signature + TEMPORARY).unlink(missing_ok=True)


def check_signature(
    folder: Path, name: str, signature: str, content: bytes, keys: Sequence[PublicKey], what: str = "bundle"
) -> None:
    """Refuse the content of a file that none of these keys has signed; without keys, nothing is refused.

    `what` the folder is, is for messages. Raises IntegrityError, BundleError, ForesightError without the library.
    """
    if not keys:
        return
    _, ed25519 = _library()
    from cryptography.exceptions import InvalidSignature

    bundle = folder if what == "bundle" else folder.parents[1]
    remedy = f"have its maker sign it: {command(f'sign {bundle} --key PRIVATE.pem')}"
    found = read_small(folder, signature, MOST_BYTES, what, remedy)
    for key in keys:
        with suppress(InvalidSignature):
            ed25519.Ed25519PublicKey.from_public_bytes(key.raw).verify(found, content)
            return
    names = " or ".join(key.name for key in keys)
    raise IntegrityError(
        f"{what} {folder}: {signature} is no signature of its {name} by {names}: one was altered, or another key "
        f"signed; {remedy}"
    )


def _read_public_key(file: KeyFile) -> PublicKey:
    key = _read_key(file, "public", "Ed25519PublicKey")
    return PublicKey(name=str(file), raw=key.public_bytes_raw())


def _read_key(file: KeyFile, kind: str, expected: str) -> Any:
    serialization, ed25519 = _library()
    content = _read_pem(file)
    try:
        if kind == "public":
            key = serialization.load_pem_public_key(content)
        else:
            key = serialization.load_pem_private_key(content, password=None)
    except TypeError as error:
        raise InvalidRequest(f"key: {file} needs a password, expected a {kind} key that needs none") from error
    except Exception as error:  # the library has errors of its own beside ValueError
        raise InvalidRequest(f"key: {file} holds no {kind} key in PEM, expected one of Ed25519") from error
    if not isinstance(key, getattr(ed25519, expected)):
        got = type(key).__name__.removesuffix("PublicKey").removesuffix("PrivateKey").lstrip("_")
        raise InvalidRequest(f"key: {file} holds a {kind} key of {got}, expected one of Ed25519")
    return key


def _read_pem(file: KeyFile) -> bytes:
    """What the operator names; it may be a link, as mounted secrets are, but nothing that lets its reader wait."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as opened:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise InvalidRequest(f"key: {file} is no regular file, expected one in PEM")
            content = opened.read(KEY_BYTES + 1)
    except (OSError, TypeError, ValueError) as error:
        if isinstance(error, InvalidRequest):
            raise
        reason = error.strerror if isinstance(error, OSError) else one_line(error)
        raise InvalidRequest(f"key: {quoted(str(file))} cannot be read ({reason}); expected a file in PEM") from error
    if len(content) > KEY_BYTES:
        raise InvalidRequest(f"key: {file} is larger than {KEY_BYTES >> 10} KiB, as no key is; expected one in PEM")
    return content


def _write_new(file: Path, content: bytes, mode: int) -> None:
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    except FileExistsError as error:
        raise OutputError(f"key: {file} is there already, and no key is replaced; choose another name") from error
    except OSError as error:
        raise OutputError(f"key: {file} cannot be written ({error.strerror or error}); check its folder") from error
    try:
        with os.fdopen(descriptor, "wb") as opened:
            opened.write(content)
    except OSError as error:
        file.unlink(missing_ok=True)
        raise OutputError(f"key: {file} cannot be written ({error.strerror or error}); free some space") from error


def _library() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise ForesightError(
            f'key: cryptography is not installed ({one_line(error)}); pip install "foresight-engines[sign]"'
        ) from error
    return serialization, ed25519
