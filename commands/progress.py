"""Progress on stderr: on a terminal one line that is drawn again in place, elsewhere a line every half minute."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from ..engines.progress import Progress

MEBI = 2**20
DRAW_SECONDS = 0.1  # at least, between two drawings of one phase
TICK_SECONDS = 0.5  # the elapsed time goes on where nothing is reported
FIRST_SECONDS, EVERY_SECONDS = 10.0, 30.0  # off a terminal
WORTH_SAYING = 0.005  # of a phase done, before a time left is guessed

Columns = Callable[[], int]


class Display:
    """Draws what it is called with. Any thread may call it; nothing is drawn any more after `close`."""

    def __init__(
        self,
        stream: TextIO,
        in_place: bool,
        columns: Columns,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream, self._in_place, self._columns, self._clock = stream, in_place, columns, clock
        self._lock = threading.RLock()  # a signal handler may interrupt a drawing
        self._current: Progress | None = None
        self._began = self._drawn = 0.0
        self._next_line = clock() + FIRST_SECONDS
        self._width = 0  # of what is drawn
        self._closed = False

    def __call__(self, progress: Progress) -> None:
        """Show it, or keep it until there is something to show."""
        with self._lock:
            is_new = self._current is None or self._current.phase != progress.phase
            if is_new:
                self._began = self._clock()
            self._current = progress
            if is_new or self._clock() - self._drawn >= DRAW_SECONDS:
                self.tick()

    def tick(self) -> None:
        """Show the time that has passed."""
        with self._lock:
            if self._closed or self._current is None:
                return
            now = self._clock()
            if self._in_place:
                self._draw(line_of(self._current, now - self._began, max(self._columns() - 1, 1)))
                self._drawn = now
            elif now >= self._next_line:
                self._write(line_of(self._current, now - self._began) + "\n")
                self._next_line = now + EVERY_SECONDS

    def clear(self) -> None:
        """Make room for a result; the next drawing begins anew."""
        with self._lock:
            if self._width:
                self._draw("")
                self._write("\r")

    def close(self) -> None:
        """Leave an empty line behind."""
        with self._lock:
            self.clear()
            self._closed = True

    def _draw(self, text: str) -> None:
        self._write("\r" + text + " " * min(self._width - len(text), self._columns() - 1 - len(text)))
        self._width = len(text)

    def _write(self, text: str) -> None:
        with suppress(OSError, ValueError):  # nobody looks any more
            self._stream.write(text)
            self._stream.flush()


def line_of(progress: Progress, elapsed_s: float, columns: int | None = None) -> str:
    """One line, at most `columns` long: what matters less is left out where there is no room."""
    left = time_left(progress, elapsed_s)
    elapsed = f"{clock_of(elapsed_s)}"
    pieces = [(0, progress.phase), (1, count_of(progress)), (3, progress.detail), (4, elapsed)]
    pieces.append((2, "" if left is None else f"{clock_of(left)} left"))
    kept: list[tuple[int, str]] = []
    for piece in sorted(piece for piece in pieces if piece[1]):
        longer = sum(len(text) for _, text in [*kept, piece]) + 2 * len(kept)
        if columns is None or longer <= columns or not kept:
            kept.append(piece)
    line = ", ".join(text for _, text in sorted(kept, key=pieces.index))
    return line if columns is None else line[:columns]


def count_of(progress: Progress) -> str:
    """How far it is, in its unit."""
    if progress.unit == "bytes":
        total = f"/{progress.total / MEBI:.1f}" if progress.total else ""
        return f"{progress.done / MEBI:.1f}{total} MiB"
    if not progress.total:
        return ""
    if progress.unit == "steps":
        return f"step {min(progress.done + 1, progress.total)}/{progress.total}"
    return f"{progress.done}/{progress.total} {progress.unit}"


def time_left(progress: Progress, elapsed_s: float) -> float | None:
    """Seconds that the phase will take yet if it goes on as it went; None where that cannot be known."""
    fraction = progress.fraction
    return None if fraction < WORTH_SAYING else elapsed_s * (1 - fraction) / fraction


def clock_of(seconds: float) -> str:
    """As clocks have it: 0:05, 12:34, 1:02:03."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def columns_of(terminal: TextIO) -> int:
    """How wide it is now; what says nothing of that is taken for 80 columns."""
    try:
        return os.get_terminal_size(terminal.fileno()).columns or 80
    except OSError:
        return 80


@contextmanager
def displayed(stream: TextIO | None = None) -> Iterator[Display]:
    """A display on stderr, whose time goes on by itself until the block ends."""
    stream = stream or sys.stderr
    display, ended = Display(stream, stream.isatty(), lambda: columns_of(stream)), threading.Event()

    def go_on() -> None:
        while not ended.wait(TICK_SECONDS):
            display.tick()

    def make_room(record: logging.LogRecord) -> bool:
        display.clear()
        return True

    handlers = logging.getLogger().handlers[:]
    for handler in handlers:
        handler.addFilter(make_room)
    threading.Thread(target=go_on, name="progress", daemon=True).start()
    try:
        yield display
    finally:
        ended.set()
        display.close()
        for handler in handlers:
            handler.removeFilter(make_room)
