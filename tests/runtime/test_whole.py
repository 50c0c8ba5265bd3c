"""Several who save to one place at the same time: each result is whole, and nothing else is lost or left."""

from __future__ import annotations

import errno
import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from foresight.engines.errors import OutputError
from foresight.runtime import whole
from foresight.runtime.whole import write_whole

SAVERS, FRAMES, TIMES = 8, 6, 10


def write_frames(mark: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        folder.mkdir()
        for index in range(FRAMES):
            (folder / f"frame-{index:04d}.png").write_text(mark)

    return write


def save_often(target: Path, mark: str) -> list[str]:
    """The errors of saving again and again."""
    errors = []
    for _ in range(TIMES):
        try:
            write_whole(target, write_frames(mark))
        except OutputError as error:
            errors.append(str(error))
    return errors


def content(folder: Path) -> set[str]:
    names = sorted(path.name for path in folder.iterdir())
    assert names == [f"frame-{index:04d}.png" for index in range(FRAMES)]
    return {(folder / name).read_text() for name in names}


@pytest.fixture(params=["exchange", "no exchange"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Systems that can exchange two folders in one step, and those that cannot."""
    if request.param == "no exchange":
        monkeypatch.setattr(whole, "_exchange", lambda one, other: False)
    return str(request.param)


def test_threads_save_to_one_folder(tmp_path: Path, system: str) -> None:
    target, errors = tmp_path / "video", list[str]()
    threads = [
        threading.Thread(target=lambda mark=mark: errors.extend(save_often(target, mark)))
        for mark in map(str, range(SAVERS))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(content(target)) == 1, "the result of one of them"
    assert list(tmp_path.iterdir()) == [target]


def test_processes_save_to_one_folder(tmp_path: Path) -> None:
    code = "import sys; from tests.runtime.test_whole import *; print(save_often(Path(sys.argv[1]), sys.argv[2]))"
    program = [sys.executable, "-c", code, str(tmp_path / "video")]
    savers = [subprocess.Popen([*program, mark], stdout=subprocess.PIPE, text=True) for mark in "abc"]
    assert [saver.communicate()[0] for saver in savers] == ["[]\n"] * 3
    assert len(content(tmp_path / "video")) == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_threads_save_to_one_file(tmp_path: Path) -> None:
    target = tmp_path / "video.mp4"
    threads = [
        threading.Thread(target=write_whole, args=[target, lambda path, mark=mark: path.write_text(mark * 999)])
        for mark in "abcdefgh"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(target.read_text())) == 1 and target.stat().st_size == 999
    assert list(tmp_path.iterdir()) == [target]


def test_what_was_put_into_the_folder_meanwhile_is_not_lost(tmp_path: Path, system: str) -> None:
    target = tmp_path / "video"
    write_whole(target, write_frames("older"))

    def write(folder: Path) -> None:
        write_frames("newer")(folder)
        (target / "thesis.tex").write_text("years of work")

    with pytest.raises(OutputError, match="holds other things than frames"):
        write_whole(target, write)
    assert (target / "thesis.tex").read_text() == "years of work"
    assert (target / "frame-0000.png").read_text() == "older"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_an_older_folder_is_there_again_where_the_new_one_could_not_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    target, calls, rename = tmp_path / "video", itertools.count(), os.rename
    write_whole(target, write_frames("older"))

    def fail_second(*paths: Any) -> None:
        if next(calls) == 1:
            raise error
        rename(*paths)

    monkeypatch.setattr(whole, "_exchange", lambda one, other: False)
    monkeypatch.setattr(os, "rename", fail_second)
    with pytest.raises(OutputError if isinstance(error, OSError) else KeyboardInterrupt):
        write_whole(target, write_frames("newer"))
    assert content(target) == {"older"}
    assert list(tmp_path.iterdir()) == [target]


def test_a_link_to_a_folder_is_replaced_and_what_it_led_to_stays(tmp_path: Path, system: str) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    write_whole(real, write_frames("older"))
    link.symlink_to(real)
    write_whole(link, write_frames("newer"))
    assert content(link) == {"newer"} and content(real) == {"older"}


@pytest.fixture(autouse=True)
def nothing_hidden(tmp_path: Path) -> Iterator[None]:
    yield
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
