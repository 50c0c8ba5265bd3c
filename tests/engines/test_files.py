"""Files and folders that are written whole, by one process at a time, and go on after an interruption."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from foresight.engines.errors import OutputError
from foresight.engines.files import empty_folder, file_record, is_as_recorded, resumable, sole_writer


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


def test_a_file_is_as_recorded_until_a_byte_of_it_changes(tmp_path: Path) -> None:
    file = tmp_path / "abc"
    assert not is_as_recorded(file, None)
    file.write_bytes(b"abc")
    record = file_record(file)
    assert is_as_recorded(file, record) and not is_as_recorded(file, None)
    file.write_bytes(b"abd")
    assert not is_as_recorded(file, record)
    file.unlink()
    assert not is_as_recorded(file, record)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (KeyboardInterrupt(), None),
        (OSError(errno.ENOSPC, "No space left"), "it: No space left; free some space and make again, it goes on from"),
        (OSError(errno.EACCES, "Denied"), "it: Denied; check the path and its permissions and make again, it goes on"),
    ],
)
def test_a_folder_takes_its_place_only_when_it_is_whole_and_goes_on_where_it_was_interrupted(
    tmp_path: Path, error: BaseException, told: str | None
) -> None:
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "old").touch()

    def fill_and_fail() -> None:
        with resumable(folder, "it", again="make") as partial:
            (partial / "first").touch()
            raise error

    with pytest.raises(OutputError if isinstance(error, OSError) else KeyboardInterrupt, match=told):
        fill_and_fail()
    assert [path.name for path in folder.iterdir()] == ["old"]
    with resumable(folder, "it", again="make") as partial:
        assert [path.name for path in partial.iterdir()] == ["first"]
        (partial / "second").touch()
    assert sorted(path.name for path in folder.iterdir()) == ["first", "second"]
    assert list(tmp_path.iterdir()) == [folder]
