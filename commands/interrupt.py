"""Ctrl-C and SIGTERM end a command with one line, whatever became of the KeyboardInterrupt on its way."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import Any, NoReturn

AGAIN_SECONDS = 1.0  # a second one sooner belongs to the first: keys bounce, and groups of processes get it twice
ENDS = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (143, "terminated")}


class Interrupted(Exception):
    """A KeyboardInterrupt, where others would make something else of that."""


class Interrupts:
    """The signals of one command. `came` is the first that did.

    The first raises KeyboardInterrupt. Libraries that are being imported make other errors of it, or none: so whoever
    ends the command looks at `came`, and `check` raises it once more. A later one, and any during the command's end,
    ends the process at once. It is a request's cancel token, too: while the main thread is inside a library, Python
    calls no handler, and another thread has to see that a signal came.
    """

    def __init__(self) -> None:
        self.came: signal.Signals | None = None
        self._at = 0.0
        self._ending = False
        self._before: dict[signal.Signals, Any] = {}
        self._pipe: tuple[int, int] | None = None  # to which signals are written as they come
        self._seen = False

    def install(self) -> None:
        """Handle the signals that nobody else handles, nor wants ignored."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
            if signal.getsignal(number) == default:
                self._before[number] = signal.signal(number, self._handle)
        if self._before:
            self._pipe = os.pipe()
            for end in self._pipe:
                os.set_blocking(end, False)
            self._wakeup_before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)

    def restore(self) -> None:
        """Handle them as before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._pipe is not None:
            signal.set_wakeup_fd(self._wakeup_before)
            for end in self._pipe:
                os.close(end)
            self._pipe = None

    def is_set(self) -> bool:
        """Whether one came, from any thread, before its handler is called."""
        if self._pipe is not None and not self._seen:
            with suppress(BlockingIOError):
                self._seen = not set(os.read(self._pipe[0], 64)).isdisjoint(self._before)
        return self._seen or self.came is not None

    def check(self) -> None:
        """Raises KeyboardInterrupt where a signal came and something has kept it from ending the command."""
        if self.came is not None and not self._ending:
            raise KeyboardInterrupt

    def ending(self) -> None:
        """From now on nothing is raised any more: the command reports, and the interpreter ends."""
        self._ending = True

    @property
    def end(self) -> tuple[int, str]:
        """Exit code and message of the signal that came; Ctrl-C's where none did, but a KeyboardInterrupt."""
        return ENDS[self.came or signal.SIGINT]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now, first = time.monotonic(), self.came is None
        if first:
            self.came, self._at = signal.Signals(number), now
            if not self._ending:
                raise KeyboardInterrupt
        if first or (now - self._at > AGAIN_SECONDS and not self._ending):
            self._exit()

    def _exit(self) -> NoReturn:
        code, message = self.end
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"error: {message}\n".encode())
        os._exit(code)
