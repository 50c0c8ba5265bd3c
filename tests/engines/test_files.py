"""Files that are written whole, and folders that one process at a time writes to."""

from __future__ import annotations

from pathlib import Path

import pytest

from foresight.engines.errors import OutputError
from foresight.engines.files import empty_folder, file_record, sole_writer


def test_a_file_record_is_size_and_sha256(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    record = file_record(tmp_path / "abc")
    assert record.bytes == 3
    assert record.sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_one_process_at_a_time_writes_to_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "bundle.partial"
    with sole_writer(folder):
        (folder / "nested").mkdir()
        (folder / "nested" / "file").touch()
        with pytest.raises(OutputError, match=r"bundle\.partial: another process is writing to it; wait for that"):
            sole_writer(folder).__enter__()
        empty_folder(folder)
        assert list(folder.iterdir()) == []
    with sole_writer(folder):
        folder.rename(tmp_path / "bundle")
    with sole_writer(folder):
        assert folder.is_dir()
