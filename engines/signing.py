"""Signing a bundle, with the engines that are compiled for it, after all of it was verified."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from .bundle import MANIFEST, Bundle
from .compiled import INDEX, Compiled, Index, list_compiled, verify_compiled
from .errors import IntegrityError, OutputError
from .files import sole_writer
from .limits import INDEX_BYTES, MANIFEST_BYTES
from .manifest import Manifest
from .signatures import INDEX_SIGNATURE, SIGNATURE, sign_file
from .verify import changed, read_small

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


def sign_bundle(bundle: Bundle, key: Ed25519PrivateKey) -> list[Path]:
    """Sign the manifest of a bundle, whose files must have been verified, and the index of all its engines.

    Returns the signatures' files. What is the newest bundle stays. Raises IntegrityError where engines are not as they
    were built, or something is another one meanwhile; BundleError, OutputError.
    """
    engines = list_compiled(bundle)
    for compiled in engines:
        verify_compiled(compiled)
    try:
        with sole_writer(bundle.path):
            then = bundle.path.stat()
            written = [_sign_manifest(bundle, key), *(_sign_index(compiled, key) for compiled in engines)]
            os.utime(bundle.path, ns=(then.st_atime_ns, then.st_mtime_ns))  # else it would be the newest
    except OSError as error:
        raise OutputError(
            f"bundle {bundle.path}: cannot be signed ({error.strerror or error}); check its permissions"
        ) from error
    return written


def _sign_manifest(bundle: Bundle, key: Ed25519PrivateKey) -> Path:
    content = read_small(bundle.path, MANIFEST, MANIFEST_BYTES)
    if msgspec.json.decode(content, type=Manifest) != bundle.manifest:
        raise changed(bundle.path, MANIFEST)
    sign_file(bundle.path, MANIFEST, SIGNATURE, content, key)
    return bundle.path / SIGNATURE


def _sign_index(compiled: Compiled, key: Ed25519PrivateKey) -> Path:
    content = read_small(compiled.folder, INDEX, INDEX_BYTES, "engines", "remove the folder")
    if msgspec.json.decode(content, type=Index) != compiled.index:
        raise IntegrityError(f"engines {compiled.folder}: {INDEX} was changed while it was signed; sign again")
    sign_file(compiled.folder, INDEX, INDEX_SIGNATURE, content, key)
    return compiled.folder / INDEX_SIGNATURE
