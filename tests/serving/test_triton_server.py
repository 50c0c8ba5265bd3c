"""A model repository in a real Triton Inference Server, the one that NVIDIA publishes on PyPI; see make test-triton.

It runs on the CPU. Its Python is one of its own, which sees this one's packages, but for numpy: of that it needs 1.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import venv
from base64 import b64decode
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from foresight.runtime.pipeline import load
from foresight.serving.triton import INPUTS, OUTPUTS
from foresight.serving.triton_repository import Triton, write_repository
from tests.serving.conftest import settings_of, wait_for

pytestmark = [pytest.mark.triton, pytest.mark.slow]
INSTALLED = Path(sys.prefix) / "triton"
READY_S, ANSWERED_S = 60, 60
ASKED = {"prompt": "a dog", "steps": 10, "seed": 3}
LONG = {"prompt": "a dog", "steps": 100}
TYPES = {"BYTES": np.object_, "INT32": np.int32, "INT64": np.int64}
KINDS = {"prompt": "BYTES", "steps": "INT32", "seed": "INT64"}


@pytest.fixture(scope="module")
def repository(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("triton") / "repository"
    write_repository(folder, Triton(settings_of(bundle, folder).worker))
    return folder


@pytest.fixture(scope="module")
def expected(bundle: Path) -> bytes:
    """The mp4 that `ASKED` makes."""
    with load(bundle, threads=1) as pipeline:
        return pipeline("a dog", steps=10, seed=3).to_bytes("mp4")


def free_ports() -> list[int]:
    sockets = [socket.socket() for _ in range(2)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def host_of(folder: Path) -> dict[str, str]:
    """The environment of a server whose Python has the packages of this one, after those installed beside Triton."""
    venv.create(folder / "host")
    (site,) = (folder / "host" / "lib").glob("*/site-packages")
    here = sysconfig.get_path("purelib")
    (site / "packages.pth").write_text(f"{INSTALLED}\nimport site; site.addsitedir({here!r})\n")
    libraries = [str(INSTALLED / "nvidia_pytriton.libs"), str(sysconfig.get_config_var("LIBDIR"))]
    return os.environ | {
        "PATH": f"{folder / 'host' / 'bin'}{os.pathsep}{os.environ['PATH']}",  # where its Python looks for a prefix
        "LD_LIBRARY_PATH": os.pathsep.join(libraries),
    }


class Server:
    """A server at work; `http` is its address."""

    def __init__(self, repository: Path, folder: Path) -> None:
        tritonserver = INSTALLED / "pytriton" / "tritonserver"
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        shutil.copytree(tritonserver / "backends" / "python", folder / "backends" / "python")
        shutil.copy(
            tritonserver / "python_backend_stubs" / version / "triton_python_backend_stub",
            folder / "backends" / "python",
        )
        http, grpc = free_ports()
        self.http, self.grpc = f"http://127.0.0.1:{http}/v2/models/tiny", f"127.0.0.1:{grpc}"
        self.log = folder / "log"
        options = {
            "model-repository": repository,
            "backend-directory": folder / "backends",
            "http-address": "127.0.0.1",
            "http-port": http,
            "grpc-address": "127.0.0.1",
            "grpc-port": grpc,
            "allow-metrics": "false",
        }
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [tritonserver / "bin" / "tritonserver", *(f"--{name}={value}" for name, value in options.items())],
                stdout=log, stderr=log, env=host_of(folder),
            )  # fmt: skip

    def ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            return httpx.get(f"{self.http}/ready").status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    def generate(self, **fields: Any) -> tuple[int, list[dict[str, Any]]]:
        """Status and events of a request over HTTP."""
        with httpx.stream("POST", f"{self.http}/generate_stream", json=fields, timeout=ANSWERED_S) as answer:
            lines = [line.removeprefix("data:") for line in answer.iter_lines() if line.startswith("data:")]
        return answer.status_code, [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    found = Server(repository, tmp_path_factory.mktemp("server"))
    try:
        wait_for(found.ready, READY_S)
        yield found
    finally:
        found.process.terminate()
        try:
            assert found.process.wait(ANSWERED_S) == 0, found.log.read_text()
        finally:
            found.process.kill()


class Stream:
    """Requests over gRPC, whose answers come as they come."""

    def __init__(self, address: str) -> None:
        self.grpc = import_module("tritonclient.grpc")
        self.client = self.grpc.InferenceServerClient(address)
        self.answers: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
        self.client.start_stream(lambda result, error: self.answers.put((result, error)))

    def ask(self, name: str, **fields: Any) -> None:
        inputs = []
        for field, value in fields.items():
            inputs.append(self.grpc.InferInput(field, [1], KINDS[field]))
            given = value.encode() if isinstance(value, str) else value
            inputs[-1].set_data_from_numpy(np.array([given], TYPES[KINDS[field]]))
        self.client.async_stream_infer("tiny", inputs, request_id=name)

    def next(self) -> tuple[str, str, bytes | None]:
        """Of the next answer: to whom, the phase, and the video."""
        result, error = self.answers.get(timeout=ANSWERED_S)
        assert error is None, error
        video = result.as_numpy("video")
        phase = result.as_numpy("phase")[0].decode()
        return result.get_response().id, phase, None if video is None else bytes(video[0])


@pytest.mark.parametrize("device", [None, "cuda:1"])
def test_the_configuration_is_one_to_triton(bundle: Path, tmp_path: Path, device: str | None) -> None:
    model_config = import_module("tritonclient.grpc.model_config_pb2")
    text_format = import_module("google.protobuf.text_format")
    settings = settings_of(bundle, tmp_path).worker
    worker = type(settings)(settings.bundles, device=device, threads=1)
    write_repository(tmp_path / "written", Triton(worker, signed_by=(Path('/a "key".pem'),)))
    text = (tmp_path / "written" / "tiny" / "config.pbtxt").read_text()
    found = text_format.Parse(text, model_config.ModelConfig())
    assert (found.name, found.backend, found.max_batch_size) == ("tiny", "python", 0)
    assert found.model_transaction_policy.decoupled
    types = model_config.DataType.Name
    assert {one.name: types(one.data_type) for one in found.input} == INPUTS
    assert {one.name: types(one.data_type) for one in found.output} == OUTPUTS
    assert all(list(one.dims) == [1] for one in (*found.input, *found.output))
    assert [one.name for one in found.input if not one.optional] == ["prompt"]
    (instances,) = found.instance_group
    kind = model_config.ModelInstanceGroup.Kind.Name(instances.kind)
    assert (kind, list(instances.gpus), instances.count) == (("KIND_GPU", [1], 1) if device else ("KIND_CPU", [], 1))
    assert found.parameters["signed_by"].string_value == '/a "key".pem'


def test_over_http_progress_comes_and_then_the_video(server: Server, expected: bytes) -> None:
    status, events = server.generate(**ASKED, base64=True)
    assert status == httpx.codes.OK, events
    *others, last = events
    assert others and not any("video" in event for event in others)
    shares = [event["progress"] for event in events]
    assert shares == sorted(shares) and last["phase"] == "completed"
    assert b64decode(last["video"]) == expected
    assert json.loads(last["trace"])["seeds"] == [3]


def test_what_cannot_be_made_is_refused(server: Server) -> None:
    status, events = server.generate(prompt="a dog", steps=0)
    assert status == httpx.codes.BAD_REQUEST
    assert events[0]["error"].startswith("steps: got 0, expected 1 to ")


def test_over_grpc_two_requests_are_accepted_at_once(server: Server, expected: bytes) -> None:
    stream = Stream(server.grpc)
    stream.ask("first", **ASKED)
    stream.ask("second", **ASKED)
    told: set[tuple[str, str]] = set()
    videos: dict[str, bytes] = {}
    while len(videos) < 2:
        name, phase, video = stream.next()
        told.add((name, phase))
        if video is not None:
            videos[name] = video
    assert videos == {"first": expected, "second": expected}
    assert ("second", "queued") in told
    stream.client.stop_stream()


def test_a_client_that_goes_ends_its_work(server: Server, expected: bytes) -> None:
    """All that it has asked for would take sixteen times as long as one; who comes next waits for half of that."""
    began = time.monotonic()
    server.generate(**LONG, base64=True)
    seconds = time.monotonic() - began
    stream = Stream(server.grpc)
    for index in range(16):
        stream.ask(str(index), **LONG)
    stream.next()
    stream.client.stop_stream(cancel_requests=True)
    began = time.monotonic()
    assert b64decode(server.generate(**ASKED, base64=True)[1][-1]["video"]) == expected
    assert time.monotonic() - began < 8 * seconds


def test_the_end_waits_for_what_runs(repository: Path, tmp_path: Path) -> None:
    server = Server(repository, tmp_path)
    try:
        wait_for(server.ready, READY_S)
        stream = Stream(server.grpc)
        stream.ask("last", **LONG)
        stream.next()
        server.process.send_signal(signal.SIGTERM)
        while (video := stream.next()[2]) is None:
            pass
        assert b"ftyp" in video[:16]
        stream.client.stop_stream()
        assert server.process.wait(ANSWERED_S) == 0
    finally:
        server.process.kill()
