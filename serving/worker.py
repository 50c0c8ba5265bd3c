"""A process that makes videos: it loads the bundles, takes one job at a time, and writes the results.

It is told what to do over a pipe, and tells what happens over the same; when the other end is gone, it ends.
"""

from __future__ import annotations

import logging
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeAlias

import msgspec

from ..engines import errors
from ..engines.backend import Backend, SharedBackends, create_backend
from ..engines.bundle import open_bundle, verify_files
from ..engines.errors import Cancelled, EngineError, ForesightError, IntegrityError, OutputError
from ..engines.progress import Progress
from ..runtime.memory import MemoryLimits
from ..runtime.pipeline import VideoPipeline
from ..runtime.policies import Decision
from ..runtime.trace import Trace
from ..runtime.video import Video
from .logs import log_as_json
from .settings import WorkerSettings
from .spec import Spec, check_same, notes_of, request_of

CreateBackend: TypeAlias = Callable[..., Backend]

TELL_SECONDS = 0.1  # between two reports of progress
LOG_SECONDS = 15.0  # between two lines on how far loading is
OPERATORS = (EngineError, IntegrityError, OutputError)  # whose business these are, beside the client's
PATHS = re.compile(r"(?<![\w:/])/[^\s:;]*/")  # folders, which are nobody's business but the server's
LETTERS = {Decision.COMPUTE: "C", Decision.REUSE: "R", Decision.DEAD: "D", Decision.FORECAST: "F"}
SHARES = {"encoding text": (0, 0.02), "denoising": (0.02, 0.93), "decoding": (0.93, 0.99)}  # of a job, by phase

log = logging.getLogger("foresight.serving")


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """One job, where its video goes, and the id of the bundle that it was checked against."""

    id: str
    spec: Spec
    output: str
    bundle: str


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What a job has made. `steps` has a text a step, a letter a block: Computed, Reused, Dead or Forecast."""

    bytes: int
    frames: int
    fps: int
    width: int
    height: int
    policy: dict[str, Any]
    stages: dict[str, float]
    counts: dict[str, int]
    share_skipped: float
    cache_bytes: int
    peak_bytes: int
    steps: tuple[str, ...]
    notes: tuple[str, ...] = ()


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """Why a job has made nothing: the name of its error, and what it said."""

    error: str
    message: str
    reason: str = ""

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """What is told of an error, no folders; of one that is none of this package's, only its kind."""
        if isinstance(error, ForesightError):
            return cls(
                error=type(error).__name__, message=PATHS.sub("", str(error)), reason=getattr(error, "reason", "")
            )
        return cls(error="EngineError", message=f"request: failed with {type(error).__name__}; see the server's log")

    @property
    def code(self) -> str:
        """What kind of failure, as clients see it."""
        words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", self.error).lower()
        return f"{words}_{self.reason}" if self.reason else words

    def exception(self) -> ForesightError:
        """The error again."""
        kind: type[ForesightError] = getattr(errors, self.error)
        return Cancelled(self.message, self.reason) if kind is Cancelled else kind(self.message)


def main(connection: Connection, settings: WorkerSettings, create: CreateBackend = create_backend) -> None:
    """The whole life of the process; `create` makes its backends, see create_backend."""
    for number in (signal.SIGINT, signal.SIGTERM):  # it ends with its parent, who is told of these
        signal.signal(number, signal.SIG_IGN)
    log_as_json()
    outlet = _Outlet(connection)
    try:
        pipelines = dict(load_pipelines(settings, create))
    except ForesightError as error:
        outlet.send("fatal", str(error))
        return
    outlet.send("ready")
    current: Running | None = None
    while (message := _receive(connection)) is not None and message[0] != "stop":
        kind, content = message
        if kind == "make":
            current = Running(content, pipelines[content.spec.model], outlet.send)
            current.start()
        elif current is not None and current.task.id == content:
            current.cancel()
    if current is not None:
        current.cancel()


def load_pipelines(
    settings: WorkerSettings, create: CreateBackend = create_backend
) -> Iterator[tuple[str, VideoPipeline]]:
    """All pipelines, verified and warmed up, on one backend where they can share it. Raises ForesightError."""
    backends = SharedBackends(
        settings.backend,
        settings.device,
        settings.threads,
        settings.cuda_graphs,
        settings.shared_weights,
        create,
    )
    for name, path in settings.bundles.items():
        told = _Loading(name)
        bundle = open_bundle(path, settings.signed_by)
        verify_files(bundle, told)
        limits = MemoryLimits(
            settings.low_memory,
            settings.cache_memory,
            fixed_slots=settings.cuda_graphs,
            split_guidance=settings.split_guidance,
        )
        pipeline = VideoPipeline(bundle, backends.of(bundle), limits, on_progress=told)
        pipeline.warm_up(on_progress=told)
        yield name, pipeline


class _Loading:
    """Logs how far a bundle is, every now and then: models of real size take minutes until they serve."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._next = time.monotonic() + LOG_SECONDS

    def __call__(self, progress: Progress) -> None:
        if (now := time.monotonic()) < self._next:
            return
        self._next = now + LOG_SECONDS
        far = {"phase": progress.phase, "done": progress.done, "total": progress.total, "unit": progress.unit}
        log.info("worker loading", extra={"model": self._model, **far, "detail": progress.detail})


def _receive(connection: Connection) -> tuple[str, Any] | None:
    try:
        message: tuple[str, Any] = connection.recv()
    except (EOFError, OSError):  # the parent is gone
        return None
    return message


class _Outlet:
    """Messages to the parent, from any thread."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, kind: str, *content: Any) -> None:
        """Where nobody listens any more, nothing is told."""
        with self._lock, suppress(OSError):
            self._connection.send((kind, *content))


class Running(threading.Thread):
    """A job at work; `tell` is told "progress", percent and phase, and "ended" with what came of it, after the id."""

    def __init__(self, task: Task, pipeline: VideoPipeline, tell: Callable[..., object]) -> None:
        super().__init__(name=f"foresight-job-{task.id}", daemon=True)
        self.task = task
        self._pipeline = pipeline
        self._send = tell
        self._cancelled = threading.Event()
        self._told = 0.0

    def cancel(self) -> None:
        """Stop within one block."""
        self._cancelled.set()

    def run(self) -> None:
        outcome: Result | Failure
        try:
            outcome = self._make()
        except Exception as error:
            if not isinstance(error, ForesightError):
                log.exception("a job failed in a way that is none of ours")
            outcome = Failure.of(error)
            if isinstance(error, OPERATORS):
                log.error("a job failed", extra={"job": self.task.id, "reason": str(error)})  # noqa: TRY400 - it says all
        self._send("ended", self.task.id, outcome)

    def _make(self) -> Result:
        pipeline, spec = self._pipeline, self.task.spec
        check_same(pipeline.bundle, self.task.bundle)
        request = request_of(spec, pipeline.manifest)
        (video,) = pipeline.generate(request, on_progress=self._tell, cancel=self._cancelled)
        started = time.perf_counter()
        path = video.save(Path(self.task.output))
        notes = notes_of(spec, video.trace)
        return _result(video, path.stat().st_size, time.perf_counter() - started, notes)

    def _tell(self, progress: Progress) -> None:
        now = time.monotonic()
        if now - self._told < TELL_SECONDS:
            return
        self._told = now
        self._send("progress", self.task.id, int(100 * share_done(progress)), progress.phase)


def share_done(progress: Progress) -> float:
    """How much of a whole job is done, 0 to 1, by what is told of its phase."""
    first, last = SHARES.get(progress.phase, (0.0, 0.0))
    return first + (last - first) * progress.fraction


def _result(video: Video, size: int, encode_seconds: float, notes: tuple[str, ...]) -> Result:
    trace: Trace = video.trace
    frames, height, width, _ = video.frames.shape
    return Result(
        bytes=size,
        frames=frames,
        fps=video.fps,
        width=width,
        height=height,
        policy=trace.policy,
        stages={
            "text": trace.text_ms / 1e3,
            "denoising": trace.denoise_ms / 1e3,
            "decoding": trace.decode_ms / 1e3,
            "encoding": encode_seconds,
        },
        counts={decision.value: trace.count(decision) for decision in Decision},
        share_skipped=trace.share_skipped,
        cache_bytes=trace.cache_bytes,
        peak_bytes=trace.planned_bytes,
        steps=tuple("".join(LETTERS[Decision(value)] for value in step.decisions) for step in trace.steps),
        notes=notes,
    )
