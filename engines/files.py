"""Files and folders that are written whole or not at all, by one process at a time."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import OutputError
from .manifest import FileRecord
from .verify import CHUNK


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
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


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
                f"{folder}: another process is writing to it; wait for that, or choose another --output"
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
