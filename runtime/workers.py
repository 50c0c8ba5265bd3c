"""The threads that requests of a runtime run in."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from .jobs import Job, JobQueue

T = TypeVar("T")


class Workers(Generic[T]):
    """`count` threads that take jobs out of a queue and `make` what they ask for, until the queue is closed."""

    def __init__(self, queue: JobQueue[T], make: Callable[[Job[T]], T], count: int) -> None:
        self._queue = queue
        self._make = make
        self._running: set[Job[T]] = set()
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._work, name=f"foresight-worker-{index}", daemon=True) for index in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def running(self) -> list[Job[T]]:
        """What they are at."""
        with self._lock:
            return list(self._running)

    @property
    def alive(self) -> bool:
        """Whether all are there."""
        return all(thread.is_alive() for thread in self._threads)

    def join(self, timeout: float | None) -> bool:
        """Wait until all have ended, each for at most so many seconds; returns whether they have."""
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout)
        return not any(thread.is_alive() for thread in self._threads)

    def retry_after(self) -> float | None:
        """Seconds until one of them is expected to be free; None where that is not known."""
        known = [job.estimate for job in [*self.running(), *self._queue.waiting()] if job.estimate is not None]
        return sum(known) / len(known) / len(self._threads) if known else None

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            with self._lock:
                self._running.add(job)
            try:
                job.run(lambda job=job: self._make(job))  # type: ignore[misc]
            finally:
                with self._lock:
                    self._running.discard(job)
            del job  # or an idle thread would keep its videos
