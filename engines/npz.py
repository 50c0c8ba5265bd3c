"""Judges a file of numpy arrays before numpy reads it: a few KiB of zip may say that they unpack to any size."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Collection
from typing import BinaryIO

import numpy as np

HEADER_BYTES = 4096
WIDTH = 128  # numbers a row may have


def check_npz(file: BinaryIO, names: Collection[str], rows: int) -> None:
    """Refuse a file that does not hold exactly these arrays, of numbers, with at most so many rows.

    Every member is unpacked once, never beyond what that many rows take. The file is left at its beginning. Raises
    ValueError with the reason.
    """
    try:
        _check(file, names, HEADER_BYTES + 8 * rows * WIDTH)
    except ValueError:
        raise
    except Exception as error:  # zlib.error, struct.error, BadZipFile, NotImplementedError, RuntimeError, and more
        raise ValueError(f"it is no zip of arrays: {type(error).__name__}: {error}") from error
    finally:
        file.seek(0)


def _check(file: BinaryIO, names: Collection[str], most: int) -> None:
    size = file.seek(0, 2)
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        got, expected = sorted(member.filename for member in members), sorted(f"{name}.npy" for name in names)
        if got != expected:
            extra = ascii(sorted({*got} - {*expected}) or "some twice")[:80]
            raise ValueError(f"it lacks {sorted({*expected} - {*got}) or 'nothing'}, and has {extra} beside them")
        for member in members:
            if member.file_size > most or member.compress_size > size:
                raise ValueError(f"{member.filename} would take {member.file_size} bytes, expected at most {most}")
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{member.filename} is packed in a way that numpy does not write")
            _check_array(archive, member)


def _check_array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """Whether the array's header says the size that the member has; and whether all of that can be unpacked."""
    with archive.open(member) as packed:
        version = np.lib.format.read_magic(packed)
        if version != (1, 0):
            raise ValueError(f"{member.filename} has a header of version {version}, expected 1.0")
        shape, _, dtype = np.lib.format.read_array_header_1_0(packed, max_header_size=HEADER_BYTES)
        if dtype.hasobject:
            raise ValueError(f"{member.filename} holds pickled objects, which are never read")
        left = len(packed.read(member.file_size))
        if any(dim < 0 for dim in shape) or math.prod(shape) * dtype.itemsize != left:
            raise ValueError(f"{member.filename} has {left} bytes, and says that it has {dtype} {shape}")
