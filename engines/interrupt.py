"""Ends a graph that runs: the request of this thread may be over before it is.

A request has one watch, inside which its engines run. An engine that can be stopped says how while it is at work; one
that cannot says nothing, and runs to its end. So whatever stands between a request and an engine has nothing to hand
on, and a run outside any watch is not watched.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar, Token
from dataclasses import dataclass

TICK_SECONDS = 0.005  # between two looks
WATCH = "foresight-watch"  # the name of a watch's thread
PATIENCE_SECONDS = 0.015  # a graph that ends sooner is not worth a look


@dataclass(eq=False)
class Run:
    """One run of a graph. `stopped` is set before `stop` is called, from another thread."""

    stop: Callable[[], None]
    began: float
    stopped: bool = False


class Watch:
    """Asks `is_set` every few milliseconds while a graph runs inside, in a thread that ends with the watch.

    Where `is_set` raises, nothing is watched any more: the request meets the error when it asks itself.
    """

    def __init__(self, is_set: Callable[[], bool]) -> None:
        self._is_set = is_set
        self._run: Run | None = None
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._token: Token[Watch | None] | None = None

    def __enter__(self) -> Watch:
        self._token = _watch.set(self)
        return self

    def __exit__(self, *caught: object) -> None:
        assert self._token is not None
        _watch.reset(self._token)
        self._over.set()
        if self._thread is not None:
            self._thread.join(1)  # not for ever: what it asks is the caller's

    def begin(self, run: Run | None) -> None:
        """This is what runs now."""
        self._run = run
        if self._thread is None and run is not None:
            self._thread = threading.Thread(target=self._look, name=WATCH, daemon=True)
            with suppress(RuntimeError):  # the interpreter exits: it has no threads any more, and no time to lose
                self._thread.start()
                return
            self._thread = None

    def _look(self) -> None:
        while not self._over.wait(TICK_SECONDS):
            run = self._run
            if run is None or run.stopped or time.monotonic() - run.began < PATIENCE_SECONDS:
                continue
            try:
                stop = self._is_set()
            except Exception:  # noqa: BLE001 - of the caller's token
                return
            if stop:
                run.stopped = True
                run.stop()


_watch: ContextVar[Watch | None] = ContextVar("foresight_watch", default=None)


def is_watched() -> bool:
    """Whether this thread is inside a watch."""
    return _watch.get() is not None


@contextmanager
def stoppable(stop: Callable[[], None]) -> Iterator[Run]:
    """Inside, the watch of this thread may call `stop`, from its own thread and even a moment too late."""
    run, watch = Run(stop, time.monotonic()), _watch.get()
    if watch is None:
        yield run
        return
    watch.begin(run)
    try:
        yield run
    finally:
        watch.begin(None)
