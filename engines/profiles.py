"""Named profiles of a bundle, the only thing in its manifest that is written later than all else."""

from __future__ import annotations

import os
from collections.abc import Iterable

import msgspec

from .bundle import MANIFEST, UNFINISHED, Bundle, id_of_manifest, open_bundle
from .errors import BundleError, OutputError
from .files import document_of, sole_writer, write_atomically
from .manifest import PolicyProfile


def write_profiles(bundle: Bundle, profiles: Iterable[PolicyProfile]) -> Bundle:
    """Put profiles into a bundle, in the place of those of the same name and steps; returns it as it is then.

    The manifest is replaced whole or not at all; the bundle's id and its engines, and what is newest, stay. Raises
    OutputError, BundleError where the bundle is another one meanwhile.
    """
    written = {(profile.name, profile.steps): profile for profile in profiles}
    try:
        with sole_writer(bundle.path):
            current = open_bundle(bundle.path)
            kept = {(profile.name, profile.steps): profile for profile in current.manifest.profiles}
            together = tuple(profile for _, profile in sorted((kept | written).items()))
            content = document_of(msgspec.structs.replace(current.manifest, profiles=together))
            if {current.id, id_of_manifest(content)} != {bundle.id}:
                raise BundleError(
                    f"bundle {bundle.path}: is not the one that was tuned, or not as it was exported; export again, "
                    "then tune again"
                )
            _replace(bundle, content)
    except OSError as error:
        raise OutputError(
            f"bundle {bundle.path}: its profiles cannot be written ({error.strerror or error}); check its permissions "
            "and the free space"
        ) from error
    return open_bundle(bundle.path)


def _replace(bundle: Bundle, content: bytes) -> None:
    """Raises OSError."""
    places = (bundle.path / MANIFEST, bundle.path)
    times = [place.stat() for place in places]
    try:
        write_atomically(places[0], content)
    finally:
        bundle.file(UNFINISHED).unlink(missing_ok=True)
    for place, then in zip(places, times, strict=True):
        os.utime(place, ns=(then.st_atime_ns, then.st_mtime_ns))  # else it would be the newest
