"""Files that nobody has vouched for yet: opened without following links, hashed, and stamped as they were hashed.

A name may stand for another file a moment later. So a file is judged and read through one descriptor, and its stamp,
taken from that descriptor, tells later on whether the name still stands for the file that was hashed, unchanged.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from .errors import BundleError, IntegrityError
from .graphs import RefusedGraph, check_graph
from .manifest import FileRecord

CHUNK = 1 << 20
LFS_POINTER = b"version https://git-lfs"


class Stamp(NamedTuple):
    """What tells a file from one that took its place, and from itself after somebody wrote to it."""

    device: int
    inode: int
    bytes: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, place: int | Path) -> Stamp:
        """Of an open file, or of what a path names now, be it a link. Raises OSError."""
        found = os.fstat(place) if isinstance(place, int) else place.lstat()
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@contextmanager
def open_plain(folder: Path, name: str, what: str = "bundle", remedy: str = "export again") -> Iterator[BinaryIO]:
    """A regular file of a folder, opened for reading: no link, and nothing that lets its reader wait.

    `what` the folder is, and the `remedy`, are for messages.
    Raises IntegrityError, and BundleError where it cannot be read, then or while it is open.
    """
    path = folder / name
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise IntegrityError(f"{what} {folder}: {name} is no regular file; {remedy}")
        with os.fdopen(descriptor, "rb") as file:
            yield file
    except FileNotFoundError as error:
        raise IntegrityError(f"{what} {folder}: {name} is missing; {remedy}") from error
    except OSError as error:
        if error.errno == errno.ELOOP:
            advice = _without_links(path) if what == "bundle" else f"expected a plain file; {remedy}"
            raise IntegrityError(f"{what} {folder}: {name} is a link; {advice}") from error
        if error.errno in (errno.ENXIO, errno.ENODEV):  # a socket, or a device that is not there
            raise IntegrityError(f"{what} {folder}: {name} is no regular file; {remedy}") from error
        raise unreadable(folder, name, error, what) from error


def verify_file(
    folder: Path,
    name: str,
    record: FileRecord,
    told: Callable[[int], object],
    weights: tuple[str, int] | None = None,
) -> Stamp:
    """Compare a file with its record; returns the stamp of what was hashed. `told` how many more bytes were read.

    `weights` is given for a graph: the name and size of the only file that it may have its weights in. Raises
    IntegrityError, BundleError.
    """
    with open_plain(folder, name) as file:
        stamp = Stamp.of(file.fileno())
        if stamp.bytes != record.bytes:
            raise IntegrityError(
                f"bundle {folder}: {name} has {stamp.bytes} bytes, expected {record.bytes}; {_whole(file)}"
            )
        got, graph = hashlib.sha256(), bytearray()
        while chunk := file.read(CHUNK):
            got.update(chunk)
            told(len(chunk))
            if weights is not None and len(graph) <= record.bytes:
                graph += chunk
        if got.hexdigest() != record.sha256:
            raise IntegrityError(
                f"bundle {folder}: {name} was altered (SHA-256 {got.hexdigest()[:12]}…, expected "
                f"{record.sha256[:12]}…); export again"
            )
        if Stamp.of(file.fileno()) != stamp:
            raise changed(folder, name)
    if weights is not None:
        try:
            check_graph(bytes(graph), *weights)
        except RefusedGraph as error:
            raise IntegrityError(f"bundle {folder}: {name} {error}; export again") from error
    return stamp


def read_small(folder: Path, name: str, most: int, what: str = "bundle", remedy: str = "export again") -> bytes:
    """The content of a file that nothing vouches for. Raises IntegrityError where it is larger, and as `open_plain`."""
    with open_plain(folder, name, what, remedy) as file:
        content = file.read(most + 1)
        if len(content) > most:
            raise IntegrityError(f"{what} {folder}: {name} is larger than {most >> 20} MiB, as none is; {remedy}")
        return content


def read_unchanged(folder: Path, name: str, stamp: Stamp | None, record: FileRecord) -> bytes:
    """The content of a file that has been verified, at which it had `stamp` (None: it has not been).

    Raises IntegrityError where it is another file now, or was written to; BundleError where it cannot be read.
    """
    with open_plain(folder, name) as file:
        before = Stamp.of(file.fileno())
        if before.bytes != record.bytes or stamp not in (None, before):
            raise changed(folder, name)
        content = file.read(record.bytes)
        if len(content) != record.bytes or Stamp.of(file.fileno()) != before:
            raise changed(folder, name)
        return content


def changed(folder: Path, name: str) -> IntegrityError:
    """The error for a file that is not the one that was verified."""
    return IntegrityError(
        f"bundle {folder}: {name} was changed or removed after it was verified; load the bundle again, and export to a "
        "new folder instead of one that is in use"
    )


def unreadable(folder: Path, name: str, error: OSError, what: str = "bundle") -> BundleError:
    """The error for a file that its owner, its permissions or its disk withhold."""
    return BundleError(
        f"{what} {folder}: {name} cannot be read ({error.strerror or error}); check its owner and permissions"
    )


def _whole(file: BinaryIO) -> str:
    if file.read(len(LFS_POINTER)) == LFS_POINTER:
        return "it only points to a file in Git LFS: run git lfs pull, or hf download REPOSITORY --local-dir FOLDER"
    return "export again"


def _without_links(path: Path) -> str:
    try:
        cached = "blobs" in path.readlink().parts
    except OSError:
        cached = False
    if cached:
        return "a hub's cache holds links: get plain files with hf download REPOSITORY --local-dir FOLDER"
    return "a bundle holds plain files only"
