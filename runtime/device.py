"""Runtime: one device, the pipelines that share it, and one queue before them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from ..engines.backend import SharedBackends
from ..engines.bundle import open_bundle, verify_files
from ..engines.errors import Cancelled, InvalidRequest
from ..engines.progress import OnProgress
from ..engines.signatures import KeyFile, read_public_keys
from .callbacks import check_callbacks, check_function
from .jobs import Job, JobQueue, Observer, OnEvent
from .lifecycle import check_process
from .limits import RequestLimits
from .memory import MemoryLimits
from .models import Models
from .pipeline import VideoPipeline
from .profiles import check_profiles
from .request import VideoRequest, check_count
from .stream import Frames, Step
from .video import Video
from .workers import Workers

CLOSED = "as the runtime was closed"


class Runtime:
    """One device, and the pipelines that share it: its memory, its stream, and the threads that requests run in.

    At most `running` requests run at a time, in threads of the runtime's own, and at most `waiting` more wait, in one
    queue for all models. `limits` are what requests may ask for. The other options are those of `foresight.load`, for
    all pipelines. Safe from several threads; it belongs to the process that made it.
    """

    def __init__(
        self,
        device: str | None = None,
        *,
        backend: str | None = None,
        threads: int | None = None,
        cuda_graphs: bool = False,
        shared_weights: bool = False,
        keys: Iterable[KeyFile] | None = None,
        running: int = 1,
        waiting: int = 16,
        limits: RequestLimits | None = None,
    ) -> None:
        for name, value in (("threads", threads), ("running", running), ("waiting", waiting)):
            check_count(name, value)
        self.models = Models()
        self._keys = read_public_keys(keys)
        self.limits = limits or RequestLimits()
        self._backends = SharedBackends(backend, device, threads, cuda_graphs, shared_weights)
        self._loading = threading.Lock()
        self._observers: list[Observer] = []
        self._queue = JobQueue[list[Video]](waiting)
        self._workers = Workers(self._queue, self._make, running)
        self._closed = False
        self._pid = os.getpid()

    def load(
        self,
        bundle: str | os.PathLike[str],
        name: str | None = None,
        *,
        low_memory: bool = False,
        cache_memory: int | None = None,
        split_guidance: bool = False,
        make_room: bool = False,
        on_progress: OnProgress | None = None,
    ) -> VideoPipeline:
        """Verify a bundle, load it, warm it up, and serve it under a name (None: its folder's).

        A pipeline that had the name before serves until the new one is ready, finishes its requests, and is closed.
        With `make_room` it goes first, for where there is no memory for both; requests for it are refused meanwhile.
        Raises BundleError, IntegrityError, EngineError, InvalidRequest; what was served then goes on being served,
        unless it had to make room.
        """
        check_callbacks(None, None, on_progress)
        check_count("cache_memory", cache_memory)
        opened = open_bundle(bundle, self._keys)
        served_as = Path(bundle).resolve().name if name is None else name
        self._check_open()
        with self._loading:
            self._check_open()
            check_profiles(opened)
            verify_files(opened, *(() if on_progress is None else (on_progress,)))
            if make_room:
                self.unload(served_as)
            limits = MemoryLimits(low_memory, cache_memory, None, self._backends.cuda_graphs, split_guidance)
            pipeline = VideoPipeline(opened, self._backends.of(opened), limits, on_progress=on_progress)
            try:
                pipeline.warm_up()
            except BaseException:
                pipeline.close()
                raise
            before = self.models.put(served_as, pipeline)
        if before is not None:
            before.close()
        return pipeline

    def unload(self, name: str) -> None:
        """Serve a model no longer: its requests that run are finished, those that wait will be refused."""
        pipeline = self.models.take(name)
        if pipeline is not None:
            pipeline.close()

    def submit(
        self, model: str, request: VideoRequest, *, priority: int = 0, on_event: OnEvent | None = None
    ) -> Job[list[Video]]:
        """Let a request wait for its turn; what has a higher priority goes first, then what came first.

        `on_event` is called with what `VideoPipeline.stream` yields, but for the videos, in the thread that runs it.
        The request's deadline counts from now. Raises InvalidRequest, QueueFull.
        """
        self._check_open()
        pipeline = self.models.get(model)
        self.limits.check(request, pipeline.manifest)
        job = Job[list[Video]](model, request, priority, on_event, pipeline.check(request).seconds)
        for observer in self._observers:
            job.watch(observer)
        self._queue.put(job, self._workers.retry_after())
        return job

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """How many requests run."""
        return len(self._workers.running())

    @property
    def alive(self) -> bool:
        """Whether requests are served: it was not closed, and its threads are there."""
        return not self._closed and self._workers.alive

    def observe(self, observer: Observer) -> None:
        """Call it with every job from now on, at every change of its status; see Job. Raises InvalidRequest."""
        check_function("observer", observer, "a job")
        self._observers.append(observer)

    def close(self, *, cancel: bool = False, timeout: float | None = None) -> bool:
        """Refuse new requests, end those that wait, finish those that run or cancel them, and free all pipelines.

        Waits for at most `timeout` seconds (None: for ever); returns whether all is free. In a forked child it does
        nothing.
        """
        if os.getpid() != self._pid:
            return True
        self._closed = True
        for job in self._queue.close():
            job.end(Cancelled(f"request: cancelled while it waited, {CLOSED}", "closed"))
        for job in self._workers.running() if cancel else []:
            job.cancel()
        pipelines = [self.models.get(name) for name in self.models.names()]
        freed = [pipeline.close(cancel=cancel, timeout=timeout) for pipeline in pipelines]
        return self._workers.join(timeout) and all(freed)

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close it; on an error, requests that still run are cancelled."""
        self.close(cancel=kind is not None)

    def _make(self, job: Job[list[Video]]) -> list[Video]:
        with self.models.lease(job.model) as pipeline:
            return _generate(pipeline, job)

    def _check_open(self) -> None:
        check_process(self._pid, "runtime: made")  # its threads are not in a child
        if self._closed:
            raise InvalidRequest("runtime: got a request after close(), expected none; make another")


def _generate(pipeline: VideoPipeline, job: Job[list[Video]]) -> list[Video]:
    """Make a job's videos, and tell its caller what happens meanwhile."""
    put: Callable[..., object] | None = job.on_event
    return pipeline.generate(
        replace(job.request, deadline=None),  # the job has it
        on_step=None if put is None else lambda done, total, trace: put(Step(done, total, trace)),
        on_progress=put,
        on_frames=None if put is None else lambda place, first, frames: put(Frames(place, first, frames)),
        cancel=job,
    )
