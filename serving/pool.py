"""The processes that make videos, seen from the one that answers requests: started, watched, and started again."""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from ..engines.errors import Cancelled
from ..runtime.admission import check_cancelled
from ..runtime.jobs import Job
from ..runtime.request import VideoRequest
from .settings import WorkerSettings
from .store import Record
from .worker import Failure, Result, Task, main

Main: TypeAlias = Callable[[Connection, WorkerSettings], object]  # what a process does; importable by its name

POLL_SECONDS = 0.05  # between two looks at whether a job was cancelled
STOP_SECONDS = 5.0  # for a process to end by itself
RESTART_SECONDS = (1.0, 60.0)  # between two starts: at first, and at most

log = logging.getLogger("foresight.serving")


class VideoJob(Job[Result]):
    """A job of the server's: `percent` is how far it is, in the phase `phase`; `record` is what is kept of it."""

    def __init__(self, record: Record, output: Path, request: VideoRequest, bundle: str) -> None:
        """`bundle` is the id of the one that the request was checked against."""
        super().__init__(record.spec.model, request, record.priority)
        self.record = record
        self.task = Task(id=record.id, spec=record.spec, output=str(output), bundle=bundle)
        self.percent = 0
        self.phase = "queued"


class VideoPool(Protocol):
    """Who makes a service's videos: processes of its own, or others."""

    @property
    def ready(self) -> bool:
        """Whether any would be made now: the bundles are loaded, and one was made."""

    @property
    def failure(self) -> str:
        """Why none can be made, where that is known."""

    @property
    def starts(self) -> int:
        """How often anybody began to make videos."""

    def make(self, job: VideoJob) -> Result:
        """Write a job's video to its task's output, as soon as somebody is free; tells the job how far it is.

        The job is its cancel token. Raises what making it raises, Cancelled, and EngineError where nobody could.
        """

    def close(self) -> None:
        """End all."""


class Worker:
    """One process, which is started again whenever it has ended. `ready` says whether it takes jobs."""

    def __init__(self, settings: WorkerSettings, index: int, idle: queue.SimpleQueue[Worker], main: Main) -> None:
        self.index = index
        self.ready = False
        self.starts = 0
        self.failure = ""  # why it could not be started
        self._settings = settings
        self._idle = idle
        self._main = main
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._process: Any = None
        self._job: tuple[VideoJob, queue.SimpleQueue[Result | Failure]] | None = None
        self._thread = threading.Thread(target=self._watch, name=f"foresight-pool-{index}", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int | None:
        """Of the process, if there is one."""
        return None if self._process is None else self._process.pid

    def make(self, job: VideoJob) -> Result:
        """Have it make a job's video, and wait for it. Raises what the job raises; EngineError where it has died."""
        outcome: queue.SimpleQueue[Result | Failure] = queue.SimpleQueue()
        with self._lock:
            if not self.ready or self._connection is None or self._job is not None:
                raise _Gone
            self._job = job, outcome
            self._send("make", job.task)
        told = False
        while True:
            try:
                found = outcome.get(timeout=POLL_SECONDS)
                break
            except queue.Empty:
                if job.is_set() and not told:
                    self._send("cancel", job.task.id)
                    told = True
        if isinstance(found, Failure):
            error = found.exception()
            raise Cancelled(f"{error}{job.why}", job.reason) if isinstance(error, Cancelled) else error
        return found

    def close(self) -> None:
        """End the process, by force where it does not end by itself."""
        self._closing.set()
        self._send("stop", None)
        process = self._process
        if process is not None:
            process.join(STOP_SECONDS)
            process.kill()
        self._thread.join(STOP_SECONDS)

    def _watch(self) -> None:
        wait, most = RESTART_SECONDS
        while not self._closing.is_set():
            began = time.monotonic()
            self._live()
            wait = RESTART_SECONDS[0] if time.monotonic() - began > most else min(2 * wait, most)
            self._closing.wait(wait)

    def _live(self) -> None:
        """One process from its start to its end."""
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        process = context.Process(
            target=self._main, args=(there, self._settings), name=f"foresight-worker-{self.index}", daemon=True
        )
        process.start()
        there.close()
        self.starts += 1
        self._connection, self._process = here, process
        try:
            while True:
                self._hear(*here.recv())
        except (EOFError, OSError):
            pass
        finally:
            process.join(STOP_SECONDS)
            process.kill()
            self._ended(process.exitcode)

    def _hear(self, kind: str, *content: Any) -> None:
        if kind == "ready":
            self.failure, self.ready = "", True
            log.info("worker ready", extra={"worker": self.index, "pid": self.pid})
            self._idle.put(self)
        elif kind == "fatal":
            self.failure = content[0]
            log.error("worker cannot start", extra={"worker": self.index, "reason": content[0]})
        elif self._job is not None and self._job[0].task.id == content[0]:
            job, outcome = self._job
            if kind == "progress":
                job.percent, job.phase = content[1:]
            else:
                self._job = None
                outcome.put(content[1])
                self._idle.put(self)

    def _ended(self, code: int | None) -> None:
        with self._lock:
            self.ready, self._connection = False, None
            job, self._job = self._job, None
        if self._closing.is_set() and job is None:
            return
        log.error("worker ended", extra={"worker": self.index, "exitcode": code})
        if job is not None:
            message = f"worker: ended while it made the video (exit code {code}); send the request again"
            job[1].put(Failure(error="EngineError", message=message))

    def _send(self, kind: str, content: Any) -> None:
        connection = self._connection
        try:
            if connection is not None:
                connection.send((kind, content))
        except OSError:
            pass  # it has ended, which whoever waits is told


class _Gone(Exception):
    """A worker that seemed idle has ended, or was started again since and is at another job already."""


class Pool:
    """`count` workers; a job is made by whichever is free first."""

    def __init__(self, settings: WorkerSettings, count: int, main: Main = main) -> None:
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        self.workers = [Worker(settings, index, self._idle, main) for index in range(count)]
        atexit.register(self.close)  # else Python waits for processes that wait for it

    @property
    def ready(self) -> bool:
        """Whether any worker takes jobs."""
        return any(worker.ready for worker in self.workers)

    @property
    def failure(self) -> str:
        """Why none could be started, where that is known."""
        return next((worker.failure for worker in self.workers if worker.failure), "")

    @property
    def pids(self) -> list[int | None]:
        """Of the processes."""
        return [worker.pid for worker in self.workers]

    @property
    def starts(self) -> int:
        """How often any was started."""
        return sum(worker.starts for worker in self.workers)

    def make(self, job: VideoJob) -> Result:
        """Make a job's video in one of them, as soon as one is free. Raises what it raises, and Cancelled."""
        while True:
            worker = self._free(job)
            try:
                return worker.make(job)
            except _Gone:
                continue

    def close(self) -> None:
        """End all."""
        atexit.unregister(self.close)
        for worker in self.workers:
            worker.close()

    def _free(self, job: VideoJob) -> Worker:
        while True:
            check_cancelled(job, "while it waited for a worker")
            with suppress(queue.Empty):
                return self._idle.get(timeout=POLL_SECONDS)
