"""Files and folders that appear whole or not at all, whoever else writes to the same place."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ..engines.errors import OutputError

FRAME_NAME = re.compile(r"frame-\d{4,}\.png")
IN_THE_WAY = (errno.ENOTEMPTY, errno.EEXIST)
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux


def write_whole(target: Path, write: Callable[[Path], object]) -> Path:
    """Let `write` fill a temporary path beside `target`, then put it there; leaves no remains. Raises OutputError.

    A folder takes the place of one that holds nothing but frames. Of several who write to one place at the same time,
    the last one's result is there in the end, and anyone's whole result at any time where the system can exchange two
    folders, as Linux can.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
            temporary = Path(folder) / target.name
            write(temporary)
            _put(temporary, target)
    except OSError as error:
        raise OutputError(
            f"output {target}: {error.strerror or error}; check the path, its permissions and the free space"
        ) from error
    return target


def holds_only_frames(folder: Path) -> bool:
    """Whether an earlier video is all that lies in a folder. Raises OSError."""
    return all(FRAME_NAME.fullmatch(entry.name) for entry in folder.iterdir())


def _put(temporary: Path, target: Path) -> None:
    """Rename, until nobody else's folder is in the way. What was there before goes with the temporary folder."""
    while True:
        try:
            os.replace(temporary, target)
            return
        except OSError as error:
            if not temporary.is_dir() or not (target.is_dir() or error.errno in IN_THE_WAY):
                raise
        try:
            if _exchange(temporary, target):
                if not holds_only_frames(temporary):  # they were put there after the target was checked
                    _exchange(temporary, target)
                    raise _other_things(target)
                return
            _replace_by_hand(temporary, target)
            return
        except OSError as error:  # somebody else has just moved the old one away, or put a new one there
            if error.errno not in (errno.ENOENT, *IN_THE_WAY):
                raise


def _replace_by_hand(temporary: Path, target: Path) -> None:
    """Move the old folder away and the new one there; the old one back where that fails. Raises OSError."""
    older = temporary.parent / f"older-{len(list(temporary.parent.iterdir()))}"
    os.rename(target, older)
    try:
        if not holds_only_frames(older):
            raise _other_things(target)
        os.rename(temporary, target)
    except BaseException:
        with suppress(OSError):
            os.rename(older, target)
        raise


def _other_things(target: Path) -> OutputError:
    return OutputError(f"output: folder {target} holds other things than frames; name one that is new")


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two paths in one step; False where the system cannot. Raises OSError."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if rename is None:
        return False
    if rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(other))
