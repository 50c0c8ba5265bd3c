"""One server for many tests: its worker takes seconds to start."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import uvicorn
from starlette.testclient import TestClient

from foresight.serving.api import create_app
from foresight.serving.pool import Main, Pool
from foresight.serving.service import VideoService
from foresight.serving.settings import ServerSettings, WorkerSettings
from foresight.serving.worker import main as usual
from tests.serving import slow

READY_S, ENDED_S = 60, 60
Serve: TypeAlias = Callable[..., Any]


def wait_for(condition: Callable[[], Any], seconds: float = ENDED_S) -> Any:
    """What the condition gives, as soon as it is true."""
    ends = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < ends, "it did not come true in time"
        time.sleep(0.02)
    return found


def settings_of(bundle: Path, data: Path, **changes: Any) -> ServerSettings:
    """Of a server of that bundle, as `tiny`."""
    return ServerSettings(**{"worker": WorkerSettings({"tiny": bundle}, threads=1), "data": data, **changes})


def processes_of(service: VideoService) -> Pool:
    """What makes its videos: processes of its own."""
    assert isinstance(service.pool, Pool)
    return service.pool


@contextmanager
def served(
    settings: ServerSettings, ready: bool = True, main: Main = usual
) -> Iterator[tuple[TestClient, VideoService]]:
    """A server, with a client of it."""
    service = VideoService(settings, main)
    with TestClient(create_app(service), raise_server_exceptions=False) as client:
        if ready:
            wait_for(lambda: service.ready, READY_S)
        yield client, service


@contextmanager
def listening(settings: ServerSettings) -> Iterator[str]:
    """A server on a real socket; its address."""
    service = VideoService(settings)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(create_app(service), log_config=None))
        thread = threading.Thread(target=server.run, args=([found],))
        thread.start()
        wait_for(lambda: service.ready, READY_S)
        try:
            yield f"http://127.0.0.1:{found.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def server(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TestClient, VideoService]]:
    """A server that needs no key; it goes with the module, as other tests look at the processes that there are."""
    with served(settings_of(bundle, tmp_path_factory.mktemp("served")), main=slow.main) as both:
        yield both


@pytest.fixture(scope="module")
def client(server: tuple[TestClient, VideoService]) -> TestClient:
    """A client of the server."""
    return server[0]


@pytest.fixture(scope="module")
def service(server: tuple[TestClient, VideoService]) -> VideoService:
    """What the server serves."""
    return server[1]


def create(client: TestClient, status: int = 200, **fields: Any) -> dict[str, Any]:
    """A job, short unless told otherwise."""
    body = {"prompt": "a dog", "num_inference_steps": 2, "seed": 0, **fields}
    answer = client.post("/v1/videos", json={name: value for name, value in body.items() if value is not None})
    assert answer.status_code == status, answer.text
    found: dict[str, Any] = answer.json()
    return found


def ended(client: TestClient, job: str) -> dict[str, Any]:
    """The job, when it has ended."""

    def found() -> dict[str, Any] | None:
        video: dict[str, Any] = client.get(f"/v1/videos/{job}").json()
        return video if video["status"] in ("completed", "failed") else None

    video: dict[str, Any] = wait_for(found)
    return video
