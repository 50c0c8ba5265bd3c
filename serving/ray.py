"""The server on a cluster of Ray.

    serve run foresight.serving.ray:app bundles=cats=/models/cats data=/var/lib/foresight

One deployment, of one replica, answers: it is what `foresight serve` is, with the jobs in its folder. The videos are
made by another one, whose replicas may be anywhere, and come and go with the work. No more jobs than there may be
replicas are handed out at a time; the others wait in the service's own queue, by their priorities.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from concurrent.futures import CancelledError
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from ..engines.errors import Cancelled, EngineError, InvalidRequest, OutputError
from ..engines.files import sole_writer
from ..engines.signatures import read_public_keys
from ..runtime.admission import check_cancelled
from ..runtime.limits import RequestLimits
from ..runtime.whole import write_whole
from .api import create_app
from .auth import read_keys
from .pool import VideoJob
from .service import VideoService
from .settings import ServerSettings, WorkerSettings
from .spec import named_bundles
from .worker import Failure, Result, Running, Task, load_pipelines

MAKER, SERVER = "VideoMaker", "VideoServer"
TRIES = 3  # of a job whose replica dies
POLL_SECONDS = 0.05  # between two looks at whether a job was cancelled
WATCH_SECONDS = 1.0  # between two looks at the replicas
HEALTH_SECONDS = 3.0  # between two looks of Ray's at whether a replica lives
OPEN_REQUESTS = 1000  # that are answered at a time
LEAVE_SECONDS = 0.1  # until it hands out no more jobs: the replicas are ended at the same time
CLOSING_SECONDS = 20.0  # for what comes after the drain

log = logging.getLogger("foresight.serving")


class Arguments(BaseModel):
    """What the application is told, as `serve run` takes it: texts. Lists have commas; hours, MiB and seconds are such.

    `bundles` are NAME=FOLDER, and lie on every machine; `data` is on the one that answers. `num_gpus` are those of a
    replica.
    """

    model_config = ConfigDict(extra="forbid")

    bundles: str
    data: Path
    backend: str | None = None
    device: str | None = None
    threads: int | None = Field(default=None, ge=1)
    low_memory: bool = False
    cache_memory: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    cuda_graphs: bool = False
    split_guidance: bool = False
    signed_by: str = ""
    api_keys: Path | None = None
    num_gpus: float = Field(default=0, ge=0)
    min_replicas: int = Field(default=1, ge=1)
    max_replicas: int = Field(default=1, ge=1)
    waiting: int = Field(default=64, ge=1)
    jobs_per_key: int = Field(default=32, ge=1)
    max_steps: int = Field(default=100, ge=1)
    deadline: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    retention: float = Field(default=24, gt=0, allow_inf_nan=False)
    drain: float = Field(default=30, gt=0, allow_inf_nan=False)

    @property
    def replicas(self) -> int:
        """The most there may be."""
        return max(self.min_replicas, self.max_replicas)

    def settings(self) -> ServerSettings:
        """What the service is told. Reads the keys here. Raises InvalidRequest."""
        bundles = named_bundles(_listed(self.bundles))
        worker = WorkerSettings(
            bundles={name: path.absolute() for name, path in bundles.items()},
            backend=self.backend,
            device=self.device,
            threads=self.threads,
            low_memory=self.low_memory,
            cache_memory=None if self.cache_memory is None else int(self.cache_memory * 2**20),
            cuda_graphs=self.cuda_graphs,
            split_guidance=self.split_guidance,
            signed_by=read_public_keys(_listed(self.signed_by) or None),
        )
        return ServerSettings(
            worker=worker,
            data=self.data.absolute(),
            workers=self.replicas,
            waiting=self.waiting,
            jobs_per_key=self.jobs_per_key,
            limits=RequestLimits(steps=self.max_steps),
            deadline=self.deadline,
            retention=3600 * self.retention,
            drain=self.drain,
            keys=read_keys(self.api_keys),
        )


class VideoMaker:
    """A replica: it has the bundles loaded and warmed up, and makes one video at a time."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._pipelines = dict(load_pipelines(settings))

    async def make(self, task: Task) -> AsyncIterator[tuple[Any, ...]]:
        """Yields "progress", percent and phase; at last "ended", a Result or Failure, and the mp4.

        Who stops iterating stops the work within one block, and the replica takes another job only then.
        """
        loop, messages = asyncio.get_running_loop(), asyncio.Queue[tuple[Any, ...]]()
        with tempfile.TemporaryDirectory(prefix="foresight-") as folder:
            path = Path(folder) / "video.mp4"
            running = Running(
                msgspec.structs.replace(task, output=str(path)),
                self._pipelines[task.spec.model],
                lambda *message: loop.call_soon_threadsafe(messages.put_nowait, message),
            )
            running.start()
            try:
                while (message := await messages.get())[0] != "ended":
                    yield message[0], *message[2:]  # without the id
                outcome = message[2]
                yield "ended", outcome, path.read_bytes() if isinstance(outcome, Result) else b""
            finally:
                running.cancel()
                await asyncio.shield(asyncio.to_thread(running.join))


class Replicas:
    """The replicas of VideoMaker as a VideoPool. A job whose replica dies is made by another."""

    def __init__(self, makers: Any, application: str) -> None:
        """`makers` is the deployment's handle, in the application of that name."""
        self.ready = False
        self.failure = ""
        self.starts = 0  # of those that were seen
        self._make = makers.options(method_name="make", stream=True)
        self._application = application
        self._running = 0
        self._closing = threading.Event()
        threading.Thread(target=self._watch, name="foresight-replicas", daemon=True).start()

    def make(self, job: VideoJob) -> Result:
        """See VideoPool."""
        for _ in range(TRIES):
            check_cancelled(job, "while it waited for a replica")
            found = self._attempt(job)
            if isinstance(found, Failure):
                error = found.exception()
                raise Cancelled(f"{error}{job.why}", job.reason) if isinstance(error, Cancelled) else error
            if found is not None:
                return found
            log.error("replica lost", extra={"id": job.task.id})
        raise EngineError(f"replica: {TRIES} of them ended while they made the video; send the request again")

    def close(self) -> None:
        """See VideoPool; the replicas themselves are Ray's to end."""
        self._closing.set()

    def _attempt(self, job: VideoJob) -> Result | Failure | None:
        """What one replica makes of it; None where that has died. Raises Cancelled, OutputError."""
        messages: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        answers = self._make.remote(job.task)
        threading.Thread(target=_hear, args=(answers, messages), name="foresight-replica", daemon=True).start()
        told = False
        while True:
            try:
                kind, *content = messages.get(timeout=POLL_SECONDS)
            except queue.Empty:
                if job.is_set() and not told:
                    answers.cancel()
                    told = True
                continue
            if kind == "progress":
                job.percent, job.phase = content
            elif kind == "ended":
                return _kept(job.task, *content)
            else:
                check_cancelled(job, "while a replica made it")
                return None

    def _watch(self) -> None:
        while not self._closing.is_set():
            try:
                makers = serve.status().applications[self._application].deployments[MAKER]
            except (KeyError, RayError, RayServeException):  # while Ray's controller is started again
                log.debug("replicas cannot be counted", exc_info=True)
            else:
                running = sum(count for state, count in makers.replica_states.items() if state == "RUNNING")
                self.starts += max(0, running - self._running)
                self._running, self.ready = running, running > 0
                failed = makers.status == "DEPLOY_FAILED"
                self.failure = "replicas cannot be started; Ray's log says why" if failed else ""
            self._closing.wait(WATCH_SECONDS)


class VideoServer:
    """The one that answers. Nobody else has its folder meanwhile."""

    def __init__(self, settings: ServerSettings, makers: Any) -> None:
        self._folder = _alone_in(settings.data, settings.drain + CLOSING_SECONDS)
        replicas = Replicas(makers, serve.get_replica_context().app_name)
        self._service = VideoService(settings, pool=replicas)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self._service)


def app(arguments: Mapping[str, Any]) -> Any:
    """The application, of `Arguments`; API keys are read where it is built. Raises InvalidRequest."""
    try:
        given = Arguments.model_validate(dict(arguments))
    except ValidationError as error:
        found = error.errors()[0]
        raise InvalidRequest(f"{'.'.join(map(str, found['loc']))}: {found['msg']}") from error
    settings = given.settings()
    makers = serve.deployment(
        name=MAKER,
        ray_actor_options={"num_cpus": given.threads or 1, "num_gpus": given.num_gpus},
        max_ongoing_requests=1,
        autoscaling_config={
            "min_replicas": given.min_replicas,
            "max_replicas": given.replicas,
            "target_ongoing_requests": 1,
        },
        graceful_shutdown_timeout_s=given.drain,
        health_check_period_s=HEALTH_SECONDS,
    )(VideoMaker)
    server = serve.deployment(
        name=SERVER,
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=OPEN_REQUESTS,
        graceful_shutdown_wait_loop_s=LEAVE_SECONDS,
        graceful_shutdown_timeout_s=given.drain + CLOSING_SECONDS,
    )(serve.ingress()(VideoServer))
    return server.bind(settings, makers.bind(settings.worker))


def _alone_in(folder: Path, seconds: float) -> ExitStack:
    """Have a folder, once the server before this one has left it; at most so many seconds. Raises OutputError."""
    alone, ends = ExitStack(), time.monotonic() + seconds
    while True:
        try:
            alone.enter_context(sole_writer(folder))
            return alone
        except OutputError:
            if time.monotonic() > ends:
                raise
        time.sleep(WATCH_SECONDS)


def _kept(task: Task, outcome: Result | Failure, video: bytes) -> Result | Failure:
    """The outcome, whose video is where it belongs. Raises OutputError."""
    if isinstance(outcome, Result):
        write_whole(Path(task.output), lambda path: path.write_bytes(video))
    return outcome


def _hear(answers: Iterable[tuple[Any, ...]], messages: queue.SimpleQueue[tuple[Any, ...]]) -> None:
    """Hand on what a replica says, and that it says no more."""
    try:
        for message in answers:
            messages.put(message)
    except (RayError, RayServeException, CancelledError) as error:
        log.info("a replica was left", extra={"reason": type(error).__name__})
    finally:
        messages.put(("lost",))


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
