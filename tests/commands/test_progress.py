"""What is shown of progress: on a terminal one line in place, elsewhere a line now and then."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import struct
import sys
import termios
from pathlib import Path

import pytest

from foresight.commands.progress import Display, clock_of, line_of
from foresight.engines.progress import Progress

STEP = Progress("denoising", 1, 50, "steps", "block 12 of 28", share=11 / 28)
LOADING = Progress("loading", 3 << 20, 12 << 20, "bytes")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("progress", "elapsed_s", "line"),
    [
        (STEP, 83, "denoising, step 2/50, block 12 of 28, 1:23, 48:16 left"),
        (LOADING, 5, "loading, 3.0/12.0 MiB, 0:05, 0:15 left"),
        (Progress("decoding", 0, 4, "chunks"), 2, "decoding, 0/4 chunks, 0:02"),
        (Progress("encoding", 16, 16, "frames"), 3661, "encoding, 16/16 frames, 1:01:01, 0:00 left"),
        (Progress("loading torch", 0, 0, ""), 0.2, "loading torch, 0:00"),
    ],
)
def test_a_line_says_phase_count_detail_elapsed_and_left(progress: Progress, elapsed_s: float, line: str) -> None:
    assert line_of(progress, elapsed_s) == line


@pytest.mark.parametrize("columns", range(1, 60))
def test_a_line_is_as_short_as_it_must_be_and_keeps_what_matters_most(columns: int) -> None:
    line = line_of(STEP, 83, columns)
    assert 0 < len(line) <= columns
    assert line.startswith("denoising"[:columns])
    assert ("step 2/50" in line) == (columns >= len("denoising, step 2/50"))
    assert line.count(" left") <= ("step 2/50" in line)


def test_clocks_have_hours_only_where_there_are_some() -> None:
    assert [clock_of(seconds) for seconds in (0, 59.9, 60, 3599, 3600)] == ["0:00", "0:59", "1:00", "59:59", "1:00:00"]


def test_on_a_terminal_a_shorter_line_leaves_nothing_of_a_longer_one() -> None:
    stream, clock = io.StringIO(), Clock()
    display = Display(stream, True, lambda: 80, clock)
    display(STEP)
    display(Progress("decoding", 0, 4, "chunks"))
    display.close()
    display(LOADING)
    assert "\n" not in stream.getvalue()
    _, first, second, cleared, after = stream.getvalue().split("\r")
    assert len(second) == len(first) and second.rstrip() == "decoding, 0/4 chunks, 0:00"
    assert cleared.isspace() and after == ""


def test_a_phase_is_not_drawn_more_often_than_eyes_can_see() -> None:
    stream, clock = io.StringIO(), Clock()
    display = Display(stream, True, lambda: 80, clock)
    for _ in range(1000):
        display(STEP)
        clock.now += 0.001
    assert stream.getvalue().count("\r") <= 12


def test_time_goes_on_where_nothing_is_reported() -> None:
    stream, clock = io.StringIO(), Clock()
    display = Display(stream, True, lambda: 80, clock)
    display(Progress("loading torch", 0, 0, ""))
    clock.now += 7
    display.tick()
    assert stream.getvalue() == "\rloading torch, 0:00\rloading torch, 0:07"


def test_off_a_terminal_there_is_a_line_after_ten_seconds_and_then_every_thirty() -> None:
    stream, clock = io.StringIO(), Clock()
    display = Display(stream, False, lambda: 80, clock)
    seconds = []
    for second in range(101):
        before = stream.getvalue()
        display(LOADING)
        if stream.getvalue() != before:
            seconds.append(second)
        clock.now += 1
    assert seconds == [10, 40, 70, 100]
    assert stream.getvalue().splitlines()[0] == "loading, 3.0/12.0 MiB, 0:10, 0:30 left"


def in_a_terminal(columns: int, *arguments: str) -> tuple[int, str]:
    """Exit code and all that a command line printed to a terminal that wide."""
    child, terminal = pty.fork()
    if child == 0:
        os.environ["PYTHONWARNINGS"] = "ignore"
        fcntl.ioctl(2, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        os.execv(sys.executable, [sys.executable, "-c", "from foresight.cli import main; main()", *arguments])
    printed = b""
    try:
        while chunk := os.read(terminal, 1 << 16):
            printed += chunk
    except OSError:  # Linux's way to say that nobody writes to it any more
        pass
    finally:
        os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), printed.decode()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_run_in_a_narrow_terminal_stays_on_one_line(single_bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "v.npy"
    asked = ("--bundle", str(single_bundle), "--prompt", "a dog", "--steps", "2", "--output", str(output))
    code, printed = in_a_terminal(20, "run", *asked)
    assert code == 0
    drawn = printed.split(f"{output}\r\n")[0]
    phases = [text.strip().partition(",")[0] for text in drawn.split("\r")]
    assert {"verifying", "loading", "denoising", "decoding"} <= set(phases)
    assert "\n" not in drawn and max(map(len, drawn.split("\r"))) < 20
