"""Requests that wait for their turn: jobs, in one bounded queue, by priority and then as they came."""

from __future__ import annotations

import heapq
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import Any, Generic, Literal, TypeAlias, TypeVar

from ..engines.errors import Cancelled, InvalidRequest, QueueFull
from .callbacks import check_function, check_result
from .lifecycle import check_process
from .request import VideoRequest
from .stream import Event

Status: TypeAlias = Literal["queued", "running", "completed", "failed", "cancelled"]
OnEvent: TypeAlias = Callable[[Event], object]
Observer: TypeAlias = Callable[["Job[Any]"], object]
T = TypeVar("T")

log = logging.getLogger("foresight")


class Job(Generic[T]):
    """A request on its way through a queue. Thread-safe.

    `result` waits for what comes of it, the videos, and so does `await job`; `cancel` ends it wherever it is.
    `created`, `started` and `ended` are seconds of time.monotonic, None as long as they lie ahead; `estimate` is how
    long it was expected to run, in seconds, None where that was not known.
    """

    def __init__(
        self,
        model: str,
        request: VideoRequest,
        priority: int = 0,
        on_event: OnEvent | None = None,
        estimate: float | None = None,
    ) -> None:
        if on_event is not None:
            check_function("on_event", on_event, "an event")
        self.model = model
        self.request = request
        self.priority = priority
        self.on_event = on_event
        self.estimate = estimate
        self.status: Status = "queued"
        self.created = time.monotonic()
        self.started: float | None = None
        self.ended: float | None = None
        self._future: Future[T] = Future()
        self._timer: threading.Timer | None = None
        self._lock = threading.Lock()
        self._cancelled = threading.Event()
        self._observers: list[Observer] = []
        self._pid = os.getpid()
        self._queue: JobQueue[T] | None = None  # in which it waits

    def result(self, timeout: float | None = None) -> T:
        """What comes of it, once it is there: of a Runtime the videos, one a prompt.

        Raises what the request raised, TimeoutError, and InvalidRequest in a forked child, where nothing will come.
        """
        if not self.done:
            check_process(self._pid, "job: created")
        return self._future.result(timeout)

    def error(self) -> BaseException | None:
        """What the request raised; None while it has not ended, and where it went well."""
        return self._future.exception() if self._future.done() else None

    def cancel(self) -> None:
        """End it: at once where it waits, else within one block. Does nothing where it has ended."""
        self._cancelled.set()
        self.leave(Cancelled("request: cancelled while it waited in the queue"))

    def leave(self, why: Cancelled) -> None:
        """End it where it waits."""
        if self._queue is not None and self._queue.remove(self):
            self.end(why)

    @property
    def place(self) -> int | None:
        """How many are before it in the queue; None where it does not wait."""
        return None if self._queue is None else self._queue.place(self)

    def is_set(self) -> bool:
        """Whether to stop: a job is its request's cancel token, and knows its deadline."""
        return self._cancelled.is_set() or self._is_late()

    @property
    def why(self) -> str:
        """What cancelled it, where it was not its caller."""
        late = not self._cancelled.is_set() and self._is_late()
        return f", as its deadline of {self.request.deadline:g} s had passed" if late else ""

    @property
    def reason(self) -> str:
        """See Cancelled.reason."""
        return "deadline" if self.why else "caller"

    @property
    def done(self) -> bool:
        """Whether it has ended, one way or another."""
        return self._future.done()

    def queued(self) -> None:
        """It waits; at its deadline it does no longer."""
        self._tell()
        if self.request.deadline is not None:
            self._timer = threading.Timer(self.request.deadline, self._expire)
            self._timer.daemon = True
            self._timer.start()

    def run(self, work: Callable[[], T]) -> None:
        """Do it, in this thread; whatever comes of it is the job's outcome."""
        if self._timer is not None:
            self._timer.cancel()
        self.status, self.started = "running", time.monotonic()
        self._tell()
        try:
            self.end(work())
        except BaseException as error:  # noqa: BLE001 - it is told to who waits for the job
            self.end(error)

    def end(self, outcome: T | BaseException) -> None:
        """It has ended; what comes later changes nothing."""
        with self._lock:
            if self.ended is not None:
                return
            self.ended = time.monotonic()
        if isinstance(outcome, BaseException):
            self.status = "cancelled" if isinstance(outcome, Cancelled) else "failed"
            self._future.set_exception(outcome)
        else:
            self.status = "completed"
            self._future.set_result(outcome)
        self._tell()

    def watch(self, observer: Observer) -> None:
        """Call it with the job at every change of its status; what it raises is logged. Raises InvalidRequest."""
        check_function("observer", observer, "a job")
        self._observers.append(observer)

    def add_done_callback(self, function: Callable[[Job[T]], object]) -> None:
        """Call it when the job has ended, or now; in whichever thread ends it. Raises InvalidRequest."""
        check_function("function", function, "a job")
        self._future.add_done_callback(lambda _: check_result("function", function(self)))

    def __await__(self) -> Generator[Any, None, T]:
        import asyncio

        if not self.done:
            check_process(self._pid, "job: created")
        return asyncio.shield(asyncio.wrap_future(self._future)).__await__()

    def _is_late(self) -> bool:
        return self.request.deadline is not None and time.monotonic() >= self.created + self.request.deadline

    def _expire(self) -> None:
        self.leave(Cancelled(f"request: cancelled while it waited in the queue{self.why}", self.reason))

    def _tell(self) -> None:
        for observer in self._observers:
            try:
                check_result("observer", observer(self))
            except Exception:
                log.exception("an observer of requests failed")


class JobQueue(Generic[T]):
    """At most `most` jobs that wait; the first out is the one of highest priority, then the one that came first."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._heap: list[tuple[int, int, Job[T]]] = []
        self._count = itertools.count()
        self._changed = threading.Condition()
        self._closed = False

    def __len__(self) -> int:
        return len(self._heap)

    def put(self, job: Job[T], retry_after: float | None = None) -> None:
        """Let it wait. Raises QueueFull."""
        with self._changed:
            if self._closed:
                raise InvalidRequest("queue: got a request after it was closed, expected none")
            self.check_room(retry_after)
            heapq.heappush(self._heap, (-job.priority, next(self._count), job))
            job._queue = self
            job.queued()
            self._changed.notify()

    def check_room(self, retry_after: float | None = None) -> None:
        """Raises QueueFull where one more could not wait."""
        if len(self._heap) >= self.most:
            raise QueueFull(
                f"queue: got a request while {len(self._heap)} wait, expected fewer than {self.most}; try again later",
                retry_after,
            )

    def get(self) -> Job[T] | None:
        """The next one, once there is one; None when the queue was closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._heap or self._closed)
            return heapq.heappop(self._heap)[2] if self._heap and not self._closed else None

    def remove(self, job: Job[T]) -> bool:
        """Take it out; False where it is not in it."""
        with self._changed:
            kept = [row for row in self._heap if row[2] is not job]
            found = len(kept) < len(self._heap)
            heapq.heapify(kept)
            self._heap = kept
            return found

    def place(self, job: Job[T]) -> int | None:
        """How many are before it; None where it does not wait."""
        with self._changed:
            order = [row[2] for row in sorted(self._heap, key=lambda row: row[:2])]
        return order.index(job) if job in order else None

    def waiting(self) -> list[Job[T]]:
        """Those that wait, in no order."""
        with self._changed:
            return [row[2] for row in self._heap]

    def close(self) -> list[Job[T]]:
        """Let nobody wait any more; returns those that did."""
        with self._changed:
            left = [row[2] for row in self._heap]
            self._heap, self._closed = [], True
            self._changed.notify_all()
            return left
