"""Engines that fail, requests that are cancelled, clients that go and workers that die, through the whole server."""

from __future__ import annotations

import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.testclient import TestClient

from foresight.runtime.pipeline import VideoPipeline
from foresight.serving.api import create_app
from foresight.serving.service import VideoService
from tests.serving import faulty
from tests.serving.conftest import create, ended, processes_of, served, settings_of, wait_for
from tests.serving.faulty import FAULT, HELD, KINDS

STEPS, BLOCKS = 3, 4
BACK_S, HANG_S = 20, 40  # until it is known that a worker has died, and that any request may take
CODES = {"raises": "engine_error", "is out of memory": "out_of_memory", "gives NaN": "engine_error"}
OTHERS = ("text_encoder", "condition", "prologue", "epilogue", "vae_decoder")


@dataclass
class Broken:
    """A server whose engines fail when they are told to, by the file `fault`."""

    client: TestClient
    service: VideoService
    fault: Path
    fresh: bytes

    def begin(self, part: str, runs: int, kind: str) -> str:
        """A request in which that part does that; its id."""
        self.fault.write_text(f"{part} {runs} {kind}")
        job = create(self.client, num_inference_steps=STEPS, guidance_scale=1, policy="none", seed=1)
        return str(job["id"])

    def next_is_as_ever(self) -> None:
        """The next request's bytes are those of a fresh process, and nobody but it was promised memory."""
        job = ended(self.client, create(self.client, seed=4)["id"])
        assert self.client.get(f"/v1/videos/{job['id']}/content").content == self.fresh
        assert self.fault.with_suffix(".promised").read_text() == "1"
        self.client.delete(f"/v1/videos/{job['id']}")


@pytest.fixture(scope="module")
def broken(bundle: Path, pipeline: VideoPipeline, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broken]:
    folder = tmp_path_factory.mktemp("broken")
    fresh = pipeline("a dog", steps=2, seed=4).to_bytes("mp4")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FAULT, str(folder / "fault"))
        with served(settings_of(bundle, folder / "data"), main=faulty.main) as (client, service):
            yield Broken(client, service, folder / "fault", fresh)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("part", "runs"),
    [*((f"block.{block:03d}", step) for step in range(STEPS) for block in range(BLOCKS)), *((p, 0) for p in OTHERS)],
)
def test_a_request_whose_engine_fails_says_why_and_the_next_is_as_in_a_fresh_process(
    broken: Broken, part: str, runs: int, kind: str
) -> None:
    failed = ended(broken.client, broken.begin(part, runs, kind))
    assert (failed["status"], failed["error"]["code"]) == ("failed", CODES[kind]), failed
    words = {"raises": f"{part}: injected fault", "is out of memory": "out of memory", "gives NaN": "not finite"}
    message = failed["error"]["message"]
    assert words[kind] in message and "\n" not in message and str(broken.fault.parent) not in message
    broken.next_is_as_ever()


@pytest.mark.parametrize("step", range(STEPS))
@pytest.mark.parametrize("block", range(BLOCKS))
def test_a_request_that_is_deleted_in_any_block_of_any_step_ends_there_and_leaves_nothing(
    broken: Broken, block: int, step: int
) -> None:
    held = broken.fault.with_suffix(".held")
    job = broken.begin(f"block.{block:03d}", step, HELD)
    wait_for(held.exists)
    held.unlink()
    assert broken.client.delete(f"/v1/videos/{job}").json()["deleted"]
    assert broken.service.counts == (0, 0)
    broken.next_is_as_ever()


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="limits of other processes can be set on Linux only")
def test_a_disk_that_takes_no_more_while_a_video_is_written_fails_that_job_alone(broken: Broken) -> None:
    """The operating system refuses what the worker writes beyond some bytes, as a full disk does."""
    (pid,) = processes_of(broken.service).pids
    assert pid is not None
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (100, before[1]))
    failed = ended(broken.client, create(broken.client)["id"])
    resource.prlimit(pid, resource.RLIMIT_FSIZE, before)
    assert (failed["status"], failed["error"]["code"]) == ("failed", "output_error")
    assert str(broken.service.store.folder) not in failed["error"]["message"]
    assert not list(broken.service.store.output("x").parent.iterdir())
    broken.next_is_as_ever()


def test_while_a_worker_is_gone_the_server_answers_says_so_and_comes_back(broken: Broken) -> None:
    running = broken.begin("block.001", 1, HELD)
    held = broken.fault.with_suffix(".held")
    wait_for(held.exists)
    held.unlink()
    waiting = create(broken.client, seed=4)["id"]
    (pid,) = processes_of(broken.service).pids
    assert pid is not None and broken.client.get("/health/ready").status_code == 200
    os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    wait_for(lambda: broken.client.get("/health/ready").status_code == 503, BACK_S)
    paths = ["/v1/videos", f"/v1/videos/{running}", "/v1/models", "/metrics", "/health/live", f"/v1/videos/{waiting}"]
    assert [broken.client.get(path).status_code for path in paths] == [200] * len(paths)
    assert ended(broken.client, running)["error"]["code"] == "engine_error"
    assert time.monotonic() - killed < HANG_S
    wait_for(lambda: broken.client.get("/health/ready").status_code == 200)
    assert ended(broken.client, waiting)["status"] == "completed"
    broken.next_is_as_ever()


def test_a_worker_that_died_while_idle_takes_one_job_at_a_time_when_it_is_back(bundle: Path, tmp_path: Path) -> None:
    """It stands twice in the line of those that are free: from before it died, and from when it came back."""
    service = VideoService(settings_of(bundle, tmp_path, workers=2))
    wait_for(lambda: all(worker.ready for worker in processes_of(service).workers))
    first, second = processes_of(service).workers
    for worker in (first, second):
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
    wait_for(lambda: first.starts == 2 and second.starts == 2 and first.ready and second.ready)
    with TestClient(create_app(service)) as client:
        jobs = [create(client, num_inference_steps=20, seed=seed)["id"] for seed in range(6)]
        assert [ended(client, job)["status"] for job in jobs] == ["completed"] * len(jobs)


@pytest.fixture(scope="module")
def address(broken: Broken) -> Iterator[tuple[str, int]]:
    """The same server, over a real socket; who leaves is noticed only there."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        app = create_app(broken.service)
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        wait_for(lambda: server.started)
        yield listening.getsockname()
        server.should_exit = True
        thread.join()


POST = b"POST /v1/videos HTTP/1.1\r\nHost: x\r\n"
LEAVING = {
    "while polling": b"GET /v1/videos HTTP/1.1\r\nHost: x\r\n\r\n",
    "in the middle of the head": b"GET /v1/vid",
    "in the middle of the body": POST + b'Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"prompt": "a',
    "in the middle of a form": POST + b"Content-Type: multipart/form-data; boundary=x\r\n"
    b"Content-Length: 100\r\n\r\n--x\r\n",
}


@pytest.mark.parametrize("when", LEAVING)
def test_a_client_that_leaves_disturbs_nobody(
    broken: Broken, address: tuple[str, int], when: str, caplog: pytest.LogCaptureFixture
) -> None:
    def leave(_: Any) -> None:
        with socket.create_connection(address, timeout=HANG_S) as connection:
            connection.sendall(LEAVING[when])

    before = len(broken.client.get("/v1/videos").json()["data"])
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(leave, range(40)))
    broken.next_is_as_ever()
    assert len(broken.client.get("/v1/videos").json()["data"]) == before
    assert not [record for record in caplog.records if record.exc_info]
