"""The service without HTTP: jobs are created, queued, made by workers, kept, and removed."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import TypeAlias, cast

import msgspec

from ..engines.errors import EngineError, ForesightError, InvalidRequest, QueueFull
from ..runtime.jobs import Job, JobQueue
from ..runtime.request import VideoRequest
from ..runtime.workers import Workers
from .pool import Main, Pool, VideoJob, VideoPool
from .records import Records
from .settings import ServerSettings
from .spec import Model, Spec, open_models
from .store import Record, Status, new_id
from .worker import Failure, Result, main

STOP_SECONDS = 10.0  # for a job that is deleted to stop
SWEEP_SECONDS = 30.0  # between two looks for jobs whose time is over
RESTARTED = "server: was restarted while it made the video; send the request again"

log = logging.getLogger("foresight.serving")


Observer: TypeAlias = Callable[[Record, VideoJob], object]


class Conflict(ForesightError):
    """What is asked contradicts what there is."""


class VideoService:
    """Jobs of all owners. Thread-safe.

    Every job that was accepted ends: it is completed or failed, also where a worker dies or the server is started anew.
    `observe` is called with each record whose status has changed, and with the job.
    """

    def __init__(self, settings: ServerSettings, main: Main = main, pool: VideoPool | None = None) -> None:
        """`main` is what workers do, where no other `pool` makes the videos.

        Raises BundleError, IntegrityError, InvalidRequest, OutputError.
        """
        self.settings = settings
        self.models: dict[str, Model] = open_models(settings.worker)
        self.store = Records(settings.data)
        self.observers: list[Observer] = []
        self.draining = False
        self._live: dict[str, VideoJob] = {}
        self._lock = threading.RLock()
        self._closed = threading.Event()
        self._queue: JobQueue[Result] = JobQueue(settings.waiting)
        self.pool: VideoPool = Pool(settings.worker, settings.workers, main) if pool is None else pool
        self._workers = Workers(self._queue, self._make, settings.workers)
        self._recover()
        threading.Thread(target=self._tidy, name="foresight-tidy", daemon=True).start()

    @property
    def ready(self) -> bool:
        """Whether jobs are accepted and made: a worker has warmed up."""
        return not self.draining and self.pool.ready

    def model(self, record: Record) -> Model:
        """What a job is of; where that is served no longer, another one: what is shown of the job is then little."""
        return self.models.get(record.spec.model) or next(iter(self.models.values()))

    @property
    def counts(self) -> tuple[int, int]:
        """How many jobs run and wait."""
        return len(self._workers.running()), len(self._queue)

    def create(
        self, owner: str, spec: Spec, key: str | None = None, priority: int = 0, traceparent: str | None = None
    ) -> Record:
        """Accept a job. With an idempotency key that was used before, what it made then.

        Raises InvalidRequest; QueueFull where too many wait, in all or of that owner; Conflict where the key was used
        for another request; OutputError.
        """
        if self.draining:
            raise QueueFull("server: is being shut down, expected no requests; try again later", self.settings.drain)
        model = self.models.get(spec.model)
        if model is None:
            raise InvalidRequest(f"model: got {spec.model[:40]!r}, expected one of {', '.join(self.models)}")
        request = model.check(spec, self.settings.limits)
        with self._lock:
            before = None if key is None else self.store.of_key(owner, key)
            if before is not None:
                if before.spec != spec:
                    raise Conflict("idempotency_key: was used for another request, expected a new one")
                return before
            self._check_owner(owner)
            self._queue.check_room(self._workers.retry_after())  # before there is anything for others to see
            record = Record(
                id=new_id(),
                owner=owner,
                spec=spec,
                created_at=time.time(),
                priority=priority,
                idempotency_key=key,
                traceparent=traceparent,
            )
            record = self.store.add(record)
            try:
                self._submit(record, request)
            except ForesightError:  # it is being closed
                self.store.remove(record.id)
                raise
        return record

    def get(self, owner: str, job: str) -> Record | None:
        """A job of an owner's, if there is one."""
        record = self.store.get(job)
        return record if record is not None and record.owner == owner else None

    def live(self, record: Record) -> VideoJob | None:
        """A job that waits or runs here."""
        return self._live.get(record.id)

    def delete(self, record: Record) -> None:
        """Stop a job where it runs, and forget it and its video. Raises Conflict where it does not stop in time."""
        live = self._live.get(record.id)
        if live is not None:
            live.cancel()
            with suppress(ForesightError):
                try:
                    live.result(STOP_SECONDS)
                except TimeoutError as error:
                    raise Conflict("video: does not stop; try again later") from error
        self.store.remove(record.id)

    def close(self, drain: float | None = None) -> None:
        """Accept nothing more, let jobs that run finish for so many seconds, then end all.

        Jobs that wait stay, for the next start; those that were cut off have failed.
        """
        self.draining = True
        waiting = self._queue.close()
        ends = time.monotonic() + (self.settings.drain if drain is None else drain)
        running = self._workers.running()
        for job in running:
            with suppress(Exception):
                job.result(max(0.0, ends - time.monotonic()))
        for job in running:
            job.cancel()
        self._workers.join(STOP_SECONDS)
        self._closed.set()
        self.pool.close()
        log.info("server closed", extra={"waiting": len(waiting)})
        self.store.close()

    def _check_owner(self, owner: str) -> None:
        most = self.settings.jobs_per_key
        if len(self.store.active(owner)) >= most:
            raise QueueFull(
                f"jobs: got one more while {most} of this key wait or run, expected at most {most}; try again later",
                self._workers.retry_after(),
            )

    def _submit(self, record: Record, request: VideoRequest) -> None:
        request = replace(request, deadline=self.settings.deadline)
        bundle = self.models[record.spec.model].bundle.id
        job = VideoJob(record, self.store.output(record.id), request, bundle)
        job.watch(lambda job: self._changed(cast(VideoJob, job)))
        self._live[record.id] = job
        try:
            self._queue.put(job, self._workers.retry_after())
        except QueueFull:
            del self._live[record.id]
            raise

    def _make(self, job: Job[Result]) -> Result:
        return self.pool.make(cast(VideoJob, job))

    def _changed(self, job: VideoJob) -> None:
        """Write down what has become of a job, and tell who wants to know."""
        record, error = job.record, job.error()
        if job.status == "running":
            record = msgspec.structs.replace(record, status="in_progress", started_at=time.time())
        elif job.status == "completed":
            record = self._ended(record, "completed", result=job.result(0))
        elif error is not None:
            record = self._ended(record, "failed", failure=Failure.of(error))
        job.record = record
        self.store.update(record)
        if job.done:
            self._live.pop(record.id, None)
        for observer in self.observers:
            observer(record, job)

    def _ended(self, record: Record, status: Status, **outcome: Result | Failure) -> Record:
        now = time.time()
        return msgspec.structs.replace(
            record, status=status, completed_at=now, expires_at=now + self.settings.retention, **outcome
        )

    def _tidy(self) -> None:
        while not self._closed.wait(SWEEP_SECONDS):
            self.store.tidy(time.time())

    def _recover(self) -> None:
        """What an earlier server has left: jobs that waited go on waiting, those that ran have failed."""
        self.store.sweep()
        for record in self.store.active():
            try:
                self._submit(record, self._again(record))
            except ForesightError as error:
                self.store.update(self._ended(record, "failed", failure=Failure.of(error)))

    def _again(self, record: Record) -> VideoRequest:
        if record.status == "in_progress":
            raise EngineError(RESTARTED)
        if record.spec.model not in self.models:
            raise InvalidRequest(f"model: got {record.spec.model[:40]!r}, which is served no longer")
        return self.models[record.spec.model].check(record.spec, self.settings.limits)
