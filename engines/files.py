"""Files and folders that are written whole or not at all, by one process at a time.

A folder that takes long to fill is filled beside its place, and keeps what it holds where that is interrupted; a file
in it says what is done, each file with its hash. Exports and builds are such jobs.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from .errors import OutputError
from .manifest import FileRecord
from .verify import CHUNK

PARTIAL = ".partial"
TEMPORARY = ".tmp"


def file_record(path: Path, told: Callable[[int], object] = lambda count: None) -> FileRecord:
    """Size and hash of a file as they are now; `told` how many more bytes were read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            told(len(chunk))
    return FileRecord(bytes=path.stat().st_size, sha256=digest.hexdigest())


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that, whatever happens, it has either its old content or the new one."""
    temporary = path.with_name(path.name + TEMPORARY)
    temporary.unlink(missing_ok=True)  # what was interrupted; or a link, through which nothing is written
    with temporary.open("xb") as file:
        file.write(content)
    os.replace(temporary, path)


def is_as_recorded(path: Path, record: FileRecord | None) -> bool:
    """Whether a file is there and is what a record of it says; never where there is no record."""
    return record is not None and path.is_file() and file_record(path) == record


def document_of(content: Any) -> bytes:
    """JSON that people may read."""
    return msgspec.json.format(msgspec.json.encode(content), indent=1)


def write_document(path: Path, content: msgspec.Struct) -> None:
    """Write JSON that people may read, whole or not at all."""
    write_atomically(path, document_of(content))


@contextmanager
def resumable(folder: Path, what: str, again: str) -> Iterator[Path]:
    """Yields a folder to fill, which takes the place of `folder` in the end.

    It is `<folder>.partial`, with all that it held when an earlier attempt was interrupted; no other process writes to
    it meanwhile. What was at `folder` goes only after the new one stands. `what` is written, and how to begin `again`,
    are for messages. Raises OutputError, also for any OSError inside.
    """
    partial = folder.with_name(folder.name + PARTIAL)
    try:
        with sole_writer(partial):
            yield partial
            _replace(partial, folder)
    except OSError as error:
        hint = "free some space" if error.errno == errno.ENOSPC else "check the path and its permissions"
        raise OutputError(
            f"{what}: {error.strerror or error}; {hint} and {again} again, it goes on from here"
        ) from error


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Make a folder, if need be, and be the only process that writes to it. Raises OutputError where another one does.

    The lock goes with the process, however that ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(
                f"{folder}: another process is writing to it; wait for that, or choose another folder"
            ) from error
        yield
    finally:
        os.close(descriptor)


def empty_folder(folder: Path) -> None:
    """Remove everything in a folder, but not the folder: a lock may be held on it."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _replace(partial: Path, folder: Path) -> None:
    old = folder.with_name(f"{folder.name}.old-{os.getpid()}{PARTIAL}")  # by its name, nobody's bundle or engines
    if folder.exists():
        os.rename(folder, old)
    os.rename(partial, folder)
    shutil.rmtree(old, ignore_errors=True)
