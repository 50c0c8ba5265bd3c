"""`foresight serve`: bundles over HTTP, as OpenAI's /v1/videos."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..engines.errors import OutputError
from ..engines.files import sole_writer
from ..serving.auth import KEYS, read_keys
from .console import print_lines
from .loading import Engines, engine_options
from .options import OUTPUT_FOLDER, PATH, common, group

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

    from ..serving.service import VideoService
    from ..serving.settings import ServerSettings

LOCAL = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Place:
    """Where it listens, and where it keeps what."""

    host: str
    port: int
    data: Path
    api_keys: Path | None
    signed_by: tuple[Path, ...]
    otel: bool


@dataclass(frozen=True)
class Bounds:
    """How much may be asked."""

    workers: int
    waiting: int
    jobs_per_key: int
    max_steps: int
    deadline: float | None
    retention: float
    drain: float


@click.command()
@click.argument("bundles", nargs=-1, metavar="[BUNDLE | NAME=BUNDLE]...")
@group(
    "place",
    Place,
    click.option("--host", default="127.0.0.1", show_default=True, help="0.0.0.0 for everybody: then give keys."),
    click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True),
    click.option(
        "--data", type=OUTPUT_FOLDER, default=Path("served"), show_default=True, help="Folder of jobs and videos."
    ),
    click.option("--api-keys", type=PATH, help=f"A file with one a line.  [default: {KEYS}, else none are needed]"),
    click.option("--signed-by", type=PATH, multiple=True, help="Public key, PEM; loads only what one of these signed."),
    click.option("--otel", is_flag=True, help="Send traces by OpenTelemetry; OTEL_… variables say where."),
)
@group(
    "bounds",
    Bounds,
    click.option("--workers", type=click.IntRange(1), default=1, show_default=True, help="Processes that make videos."),
    click.option("--waiting", type=click.IntRange(1), default=64, show_default=True, help="Most jobs that wait."),
    click.option("--jobs-per-key", type=click.IntRange(1), default=32, show_default=True, help="Most, unfinished."),
    click.option("--max-steps", type=click.IntRange(1), default=100, show_default=True, help="Of a request."),
    click.option("--deadline", type=float, help="Seconds from a job's creation to its end.  [default: none]"),
    click.option("--retention", type=float, default=24.0, show_default=True, help="Hours that videos are kept."),
    click.option("--drain", type=float, default=30.0, show_default=True, help="Seconds for running jobs at the end."),
)
@engine_options
@common
def serve(bundles: tuple[str, ...], place: Place, bounds: Bounds, engines: Engines, as_json: bool) -> None:
    """Serve bundles over HTTP: jobs as OpenAI's /v1/videos has them, a page for people, health and metrics."""
    try:
        import uvicorn

        from ..serving.api import create_app
    except ModuleNotFoundError as error:
        raise OutputError(f'serve: {error.name} is not installed; pip install "foresight-engines[serve]"') from error
    from ..serving.logs import log_as_json
    from ..serving.service import VideoService

    settings = _settings(bundles, place, bounds, engines)
    log_as_json()
    with _alone_in(place.data):
        service = VideoService(settings)
        _run(uvicorn.Server(_config(create_app(service), place, bounds)), service, place)


def _config(app: FastAPI, place: Place, bounds: Bounds) -> uvicorn.Config:
    import uvicorn

    return uvicorn.Config(
        app,
        host=place.host,
        port=place.port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, math.ceil(bounds.drain)),
    )


def _run(server: uvicorn.Server, service: VideoService, place: Place) -> None:
    """Serve until a signal comes. Raises OutputError where it cannot listen."""
    if not service.settings.keys and place.host not in LOCAL:
        print_lines([f"note: anybody who reaches {place.host} may use this server; give --api-keys"])
    names = ", ".join(service.models)
    said = f"serving {names} on http://{place.host}:{place.port}; jobs and videos are kept in {place.data}"
    print_lines([said, *(f"note: {model.name}: {one}" for model in service.models.values() for one in model.cautions)])
    with _traced(service, place.otel), _signals_left_alone(), suppress(SystemExit):  # which uvicorn ends with
        server.run()
    if not server.started:
        service.close(0)
        raise OutputError(f"serve: cannot listen on {place.host}:{place.port}; choose another port")


@contextmanager
def _alone_in(data: Path) -> Iterator[None]:
    """Have the folder of jobs: two servers would each take the other's for jobs that were cut off.

    Raises OutputError.
    """
    with ExitStack() as alone:
        try:
            alone.enter_context(sole_writer(data))
        except OSError as error:
            raise OutputError(f"data {data}: {error.strerror or error}; choose a folder that is writable") from error
        yield


def _settings(bundles: tuple[str, ...], place: Place, bounds: Bounds, engines: Engines) -> ServerSettings:
    """Raises InvalidRequest, BundleError."""
    from ..engines.bundle import newest_bundle
    from ..runtime.limits import RequestLimits
    from ..serving.settings import ServerSettings
    from ..serving.spec import named_bundles

    return ServerSettings(
        worker=engines.worker(named_bundles(bundles or (str(newest_bundle()),)), place.signed_by),
        data=place.data,
        workers=bounds.workers,
        waiting=bounds.waiting,
        jobs_per_key=bounds.jobs_per_key,
        limits=RequestLimits(steps=bounds.max_steps),
        deadline=bounds.deadline,
        retention=3600 * bounds.retention,
        drain=bounds.drain,
        keys=read_keys(place.api_keys),
    )


@contextmanager
def _traced(service: VideoService, wanted: bool) -> Iterator[None]:
    """Raises OutputError where the libraries are missing."""
    if not wanted:
        yield
        return
    try:
        from ..serving.tracing import Tracing, provider_from_environment

        tracing = Tracing(service, provider_from_environment())
    except ModuleNotFoundError as error:
        service.close(0)
        raise OutputError(f'serve: {error.name} is not installed; pip install "foresight-engines[otel]"') from error
    try:
        yield
    finally:
        tracing.close()


@contextmanager
def _signals_left_alone() -> Iterator[None]:
    """The server has handlers of its own, and hands on what came when it has ended; then it has been answered."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
