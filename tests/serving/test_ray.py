"""The server on a cluster of Ray on this machine: two replicas, one of which may die; see `make test-ray`."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from textwrap import dedent
from typing import Any

import httpx
import psutil
import pytest

from foresight.engines.errors import Cancelled, EngineError, InvalidRequest
from foresight.runtime.policies import NoReuse
from foresight.runtime.request import VideoRequest
from foresight.serving.auth import KEYS
from foresight.serving.pool import VideoJob
from foresight.serving.spec import Spec
from foresight.serving.store import Record, Store
from tests.serving.apart import free_port
from tests.serving.conftest import wait_for
from tests.support import copy_bundle, load_pipeline

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of Ray's own code
NAME, KEY, REPLICAS = "videos", "secret", 2
LONG = {"num_inference_steps": 100, "policy": "none"}
READY_S = 120
EMBEDDING = Path(__file__).parents[2] / "docs" / "embedding.md"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of a cluster with more slots than there are cores: with few it waits for ever."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray import serve

    port = free_port()
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The folder of the server's jobs."""
    return tmp_path / "data"


@pytest.fixture
def client(address: str, demo_bundle: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[httpx.Client]:
    """A client with a key, of a server whose replicas have all started."""
    from ray import serve

    from foresight.serving.ray import app

    monkeypatch.setenv(KEYS, KEY)
    serve.run(app(arguments(demo_bundle, data)), name=NAME)
    with httpx.Client(base_url=address, headers={"Authorization": f"Bearer {KEY}"}, timeout=30) as client:
        wait_for(lambda: len(replicas()) == REPLICAS and is_ready(client), READY_S)
        yield client
    serve.delete(NAME)


def arguments(bundle: Path, data: Path, **changes: str) -> dict[str, str]:
    told = {"bundles": f"demo={bundle}", "data": str(data), "threads": "1", "drain": "30"}
    return {**told, "min_replicas": str(REPLICAS), **changes}


def is_ready(client: httpx.Client) -> bool:
    return client.get("/health/ready").status_code == 200


def replicas() -> list[psutil.Process]:
    """The processes of those that make videos."""
    running = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            running += [process] if f"ServeReplica:{NAME}:VideoMaker" in " ".join(process.cmdline()) else []
    return running


def create(client: httpx.Client, **fields: Any) -> str:
    answer = client.post("/v1/videos", json={"prompt": "a red circle", "seed": 0, **fields})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def video(client: httpx.Client, job: str) -> dict[str, Any]:
    found: dict[str, Any] = client.get(f"/v1/videos/{job}").json()
    return found


def ended(client: httpx.Client, job: str) -> dict[str, Any]:
    wait_for(lambda: video(client, job)["status"] in ("completed", "failed"), READY_S)
    return video(client, job)


def at_work(client: httpx.Client, job: str) -> None:
    wait_for(lambda: video(client, job)["progress"] > 3)


def test_of_twenty_jobs_none_is_lost_when_a_replica_is_killed_half_way(client: httpx.Client, demo_bundle: Path) -> None:
    jobs = {seed: create(client, seed=seed, **{**LONG, "num_inference_steps": 40}) for seed in range(20)}
    wait_for(lambda: video(client, jobs[8])["status"] == "completed", READY_S)
    wait_for(lambda: sum(video(client, job)["status"] == "in_progress" for job in jobs.values()) == REPLICAS)
    replicas()[0].kill()
    assert {seed: ended(client, job)["error"] for seed, job in jobs.items()} == dict.fromkeys(jobs)
    pipeline = load_pipeline(demo_bundle)
    for seed, job in jobs.items():
        content = client.get(f"/v1/videos/{job}/content").content
        assert content == pipeline("a red circle", steps=40, seed=seed, policy=NoReuse()).to_bytes("mp4"), seed
    wait_for(lambda: len(replicas()) == REPLICAS, READY_S)


def test_while_a_job_runs_it_can_be_asked_for_and_deleted_and_its_replica_is_free_at_once(
    client: httpx.Client,
) -> None:
    first, second = (create(client, seed=seed, **LONG) for seed in range(2))
    for job in (first, second):
        at_work(client, job)
    assert {entry["id"]: entry["status"] for entry in client.get("/v1/videos").json()["data"]} == {
        first: "in_progress",
        second: "in_progress",
    }
    assert client.get(f"/v1/videos/{first}/content").status_code == 409
    assert client.delete(f"/v1/videos/{first}").json()["deleted"]
    assert client.get(f"/v1/videos/{first}").status_code == 404
    third = create(client, seed=2, num_inference_steps=1)  # the other replica is at work
    assert ended(client, third)["status"] == "completed"
    assert video(client, second)["status"] == "in_progress"


def test_without_replicas_it_is_not_ready_and_jobs_wait_for_them(client: httpx.Client) -> None:
    for replica in replicas():
        replica.kill()
    waiting = create(client, num_inference_steps=2)
    wait_for(lambda: not is_ready(client), READY_S)
    assert client.get("/health/ready").json() == {"status": "starting"}
    assert client.get("/health/live").status_code == 200
    assert ended(client, waiting)["status"] == "completed"
    wait_for(lambda: is_ready(client), READY_S)
    assert "foresight:worker_starts" in client.get("/metrics").text


def test_nobody_without_a_key_is_let_in(client: httpx.Client) -> None:
    assert httpx.get(f"{client.base_url}/v1/videos").status_code == 401
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["demo"]


def test_a_new_version_waits_for_the_old_one_whose_jobs_are_finished(
    client: httpx.Client, demo_bundle: Path, data: Path
) -> None:
    from ray import serve

    from foresight.serving.ray import app

    before = create(client, **LONG)
    at_work(client, before)
    serve.run(app(arguments(demo_bundle, data, max_steps="3")), name=NAME)
    wait_for(lambda: is_ready(client), READY_S)
    assert ended(client, before)["status"] == "completed"
    assert client.post("/v1/videos", json={"prompt": "a dog", "num_inference_steps": 4}).status_code == 400
    assert ended(client, create(client, num_inference_steps=3))["status"] == "completed"


def test_when_it_is_ended_jobs_that_run_are_finished_and_others_stay(client: httpx.Client, data: Path) -> None:
    from ray import serve

    running = [create(client, seed=seed, **LONG) for seed in range(REPLICAS)]
    for job in running:
        at_work(client, job)
    waiting = create(client, seed=5, **LONG)
    serve.delete(NAME)
    store = Store(data)
    records = {job: store.get(job) for job in (*running, waiting)}
    assert {job: record and record.status for job, record in records.items()} == {
        **dict.fromkeys(running, "completed"),
        waiting: "queued",
    }
    assert all(store.output(job).is_file() for job in running)
    store.close()


def job_of(seconds: float | None = None) -> VideoJob:
    record = Record(id="video_1", owner="me", spec=Spec(model="demo", prompt="a dog"), created_at=time.time())
    return VideoJob(record, Path("unused"), VideoRequest("a dog", deadline=seconds), "0" * 64)


class Dying:
    """A deployment's handle: whoever takes a job says how far it is, and dies."""

    def __init__(self) -> None:
        self.calls = 0

    def options(self, **options: Any) -> Dying:
        return self

    def remote(self, task: Any) -> Iterator[tuple[Any, ...]]:
        self.calls += 1
        return iter([("progress", self.calls, "denoising")])


def test_a_job_that_every_replica_dies_of_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from foresight.serving import ray

    monkeypatch.setattr(ray.Replicas, "_watch", lambda self: None)
    handle, job = Dying(), job_of()
    with pytest.raises(EngineError, match="replica: 3 of them ended while they made the video; send the request again"):
        ray.Replicas(handle, NAME).make(job)
    assert (handle.calls, job.percent) == (ray.TRIES, ray.TRIES)
    late = job_of(1e-9)
    with pytest.raises(Cancelled, match="deadline"):
        ray.Replicas(handle, NAME).make(late)
    assert handle.calls == ray.TRIES


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bundles": "a=/x"}, "data: Field required"),
        ({"bundles": "a=/x", "data": "d", "dta": "x"}, "dta: Extra inputs are not permitted"),
        ({"bundles": "a=/x", "data": "d", "num_gpus": "-1"}, "num_gpus: Input should be greater than or equal to 0"),
        ({"bundles": "a=/x,a=/y", "data": "d"}, "bundles: got 'a' twice"),
        ({"bundles": "a=/x", "data": "d", "signed_by": "/none.pem"}, "/none.pem"),
        ({"bundles": "a=/x", "data": "d", "api_keys": "/none"}, "api_keys: /none cannot be read"),
    ],
)
def test_wrong_arguments_are_refused(given: dict[str, str], message: str) -> None:
    from foresight.serving.ray import app

    with pytest.raises(InvalidRequest, match=re.escape(message)):
        app(given)


def test_the_example_of_a_deployment_of_ones_own_makes_videos(
    demo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray import serve

    page = EMBEDDING.read_text(encoding="utf-8")
    (example,) = re.findall(r"^    from ray import serve\n(?:    .*\n|\n)*", page, re.MULTILINE)
    copy_bundle(demo_bundle, tmp_path / "bundles" / "latte-demo")
    monkeypatch.chdir(tmp_path)
    module: dict[str, Any] = {"__name__": "example"}
    exec(dedent(example).replace("num_gpus", "num_cpus"), module)
    handle = serve.run(module["app"], _local_testing_mode=True)
    content = handle.remote("a red circle", 2).result()
    assert content == load_pipeline(demo_bundle)("a red circle", steps=2).to_bytes("mp4")


def test_arguments_are_those_of_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from foresight.engines.signatures import generate_key
    from foresight.serving.ray import Arguments

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(KEYS, "a, b")
    public = generate_key(tmp_path / "key.pem")
    told = {"bundles": "x=/models/x, models/y", "data": "data", "signed_by": str(public), "cache_memory": "2"}
    told |= {"retention": "2", "max_replicas": "3", "min_replicas": "4", "low_memory": "true", "max_steps": "7"}
    settings = Arguments.model_validate(told).settings()
    worker = settings.worker
    assert worker.bundles == {"x": Path("/models/x"), "y": tmp_path / "models" / "y"}
    assert [key.name for key in worker.signed_by] == [str(public)]
    assert (worker.cache_memory, worker.low_memory, settings.limits.steps) == (2 << 20, True, 7)
    assert (settings.data, settings.workers, settings.retention) == (tmp_path / "data", 4, 7200)
    assert settings.keys == ("a", "b")
