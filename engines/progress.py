"""Progress: what long work says about itself while it runs, to a callback of its caller's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

POLL_SECONDS = 0.1  # between two reports on work of other threads


@dataclass(frozen=True)
class Progress:
    """How far a phase is: `done` of `total` in `unit`, such as bytes, steps, chunks, frames or parts.

    `total` is 0 where it is not known. `detail` says in words what is being done; `share` is how much of the next
    unit is done already, 0 to 1.
    """

    phase: str
    done: int
    total: int
    unit: str
    detail: str = ""
    share: float = 0.0

    @property
    def fraction(self) -> float:
        """How much of the phase is done, 0 to 1; 0 where that is not known."""
        return min((self.done + self.share) / self.total, 1.0) if self.total else 0.0


OnProgress = Callable[[Progress], object]
OnPart = Callable[[int, int, str], None]  # of a job in parts: how many are done, of how many, which comes next


def silent(progress: Progress) -> None:
    """Tell nobody."""


class Counter:
    """What is done of one phase. Tells so when it is made, and after every step forward."""

    def __init__(self, phase: str, total: int, unit: str, on_progress: OnProgress | None) -> None:
        self._phase, self._total, self._unit = phase, total, unit
        self._on_progress = on_progress or silent
        self._done = 0
        self._lock = threading.Lock()
        self._abandoned = False
        self.tell()

    def tell(self, detail: str = "") -> None:
        """Say how far it is, and what comes now. Raises what the callback raises."""
        self._on_progress(Progress(self._phase, self._done, self._total, self._unit, detail))

    def advance(self, count: int = 1, detail: str = "") -> None:
        """So much more is done; say so."""
        self.add(count)
        self.tell(detail)

    def add(self, count: int) -> None:
        """So much more is done; from any thread. Raises RuntimeError where nobody waits for it any more."""
        if self._abandoned:
            raise RuntimeError("nobody waits for this any more")
        with self._lock:
            self._done += count

    def results(self, futures: Sequence[Future[T]]) -> list[T]:
        """What came of work that calls `add` in other threads; meanwhile it is told in this one.

        Raises what the first of them raises, or the callback; the others then end at their next `add`. So does an
        interruption: nobody has to wait until a large file is read.
        """
        try:
            for future in futures:
                while not wait([future], None if self._on_progress is silent else POLL_SECONDS).done:
                    self.tell()
                future.result()
            self.tell()
            return [future.result() for future in futures]
        except BaseException:
            self._abandoned = True
            for future in futures:
                future.cancel()
            raise
