"""A runtime: several pipelines, one queue, and what becomes of requests that wait, fail or are cancelled."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from foresight.engines.errors import BundleError, Cancelled, EngineError, InvalidRequest, QueueFull
from foresight.engines.progress import Progress
from foresight.runtime.device import Runtime
from foresight.runtime.jobs import Job
from foresight.runtime.limits import RequestLimits
from foresight.runtime.pipeline import VideoPipeline
from foresight.runtime.policies import Static
from foresight.runtime.request import VideoRequest
from foresight.runtime.stream import Event, Frames, Step
from tests.support import BACKEND, copy_bundle

TIMEOUT_S = 60
pytestmark = pytest.mark.skipif(BACKEND != "onnxruntime", reason="makes its own backends")


@pytest.fixture
def runtime(bundle: Path) -> Iterator[Runtime]:
    with Runtime(threads=1, waiting=3) as runtime:
        runtime.load(bundle, "tiny")
        yield runtime


class Gate:
    """A request that waits in its first step until it is let go; others wait for it."""

    def __init__(self, runtime: Runtime, **settings: Any) -> None:
        self.inside, self.go = threading.Event(), threading.Event()
        self.job = runtime.submit("tiny", VideoRequest("a dog", steps=2, **settings), on_event=self.wait)
        assert self.inside.wait(TIMEOUT_S)

    def wait(self, event: Event) -> None:
        if isinstance(event, Step):
            self.inside.set()
            assert self.go.wait(TIMEOUT_S)


def request(seed: int = 0, **settings: Any) -> VideoRequest:
    return VideoRequest("a dog", **{"steps": 2, "seed": seed, "policy": Static(), **settings})


def test_a_job_makes_the_video_of_its_request(runtime: Runtime, pipeline: VideoPipeline) -> None:
    events: list[Event] = []
    job = runtime.submit("tiny", request(3), on_event=events.append)
    (video,) = job.result(TIMEOUT_S)
    assert video.frames.tobytes() == pipeline.generate(request(3))[0].frames.tobytes()
    assert (job.status, job.done, job.error(), job.place) == ("completed", True, None, None)
    assert job.started is not None and job.ended is not None and job.created <= job.started <= job.ended
    assert {type(event) for event in events} == {Progress, Step, Frames} and job.estimate


def test_it_can_be_awaited(runtime: Runtime) -> None:
    async def made() -> Any:
        return await runtime.submit("tiny", request())

    assert asyncio.run(made())[0].frames.any()


def test_who_came_first_is_first_but_for_priority(runtime: Runtime) -> None:
    gate, order = Gate(runtime), []
    jobs = [runtime.submit("tiny", request(seed), priority=priority) for seed, priority in enumerate((0, 0, 5))]
    for job in jobs:
        job.add_done_callback(lambda job: order.append(job.request.seed))
    assert [job.place for job in jobs] == [1, 2, 0] and (runtime.running, runtime.waiting) == (1, 3)
    gate.go.set()
    for job in jobs:
        job.result(TIMEOUT_S)
    assert order == [2, 0, 1]


def test_a_full_queue_says_when_to_try_again(runtime: Runtime) -> None:
    gate = Gate(runtime)
    jobs = [runtime.submit("tiny", request()) for _ in range(3)]
    with pytest.raises(QueueFull, match="got a request while 3 wait, expected fewer than 3; try again") as caught:
        runtime.submit("tiny", request())
    assert caught.value.retry_after and caught.value.retry_after > 0
    gate.go.set()
    assert all(job.result(TIMEOUT_S) for job in jobs) and runtime.submit("tiny", request()).result(TIMEOUT_S)


def test_a_job_is_cancelled_where_it_waits_and_where_it_runs(runtime: Runtime) -> None:
    gate = Gate(runtime)
    waiting = runtime.submit("tiny", request())
    waiting.cancel()
    with pytest.raises(Cancelled, match="while it waited in the queue"):
        waiting.result(0)
    assert waiting.status == "cancelled" and runtime.waiting == 0
    gate.job.cancel()
    gate.go.set()
    with pytest.raises(Cancelled, match="cancelled in step 2 of 2") as caught:
        gate.job.result(TIMEOUT_S)
    assert caught.value.reason == "caller"
    assert runtime.submit("tiny", request()).result(TIMEOUT_S)


def test_a_deadline_counts_from_the_beginning_of_the_wait(runtime: Runtime) -> None:
    gate = Gate(runtime, deadline=0.5)
    waiting = runtime.submit("tiny", request(deadline=0.2))
    with pytest.raises(Cancelled, match=r"waited in the queue, as its deadline of 0\.2 s had passed") as caught:
        waiting.result(TIMEOUT_S)
    assert caught.value.reason == "deadline" and not gate.job.done
    time.sleep(0.5)
    gate.go.set()
    with pytest.raises(Cancelled, match=r"in step 2 of 2, .*as its deadline of 0\.5 s had passed") as running:
        gate.job.result(TIMEOUT_S)
    assert running.value.reason == "deadline"


def test_a_request_that_fails_is_told_and_the_next_is_as_ever(runtime: Runtime, pipeline: VideoPipeline) -> None:
    failed = runtime.submit("tiny", request(guidance=3e38))
    with pytest.raises(EngineError, match="lower the guidance"):
        failed.result(TIMEOUT_S)
    assert failed.status == "failed" and isinstance(failed.error(), EngineError)
    broken = runtime.submit("tiny", request(), on_event=lambda event: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        broken.result(TIMEOUT_S)
    (video,) = runtime.submit("tiny", request(1)).result(TIMEOUT_S)
    assert video.frames.tobytes() == pipeline.generate(request(1))[0].frames.tobytes()
    assert runtime.alive and runtime.running == 0


def test_what_makes_no_sense_never_waits(runtime: Runtime) -> None:
    for model, wrong, message in (
        ("other", request(), "model: got 'other', expected one that is loaded: tiny"),
        ("tiny", request(steps=0), "steps: got 0"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            runtime.submit(model, wrong)
    assert runtime.waiting == 0


LIMITS = {
    "steps": (RequestLimits(steps=1), "steps: got 2, expected at most 1"),
    "prompts": (RequestLimits(prompts=0), "prompts: got 1, expected at most 0"),
    "characters": (RequestLimits(characters=4), "characters: got 5, expected at most 4"),
    "work": (RequestLimits(work=1535), "work: got 1536, expected at most 1535"),
}


@pytest.mark.parametrize("kind", LIMITS)
def test_a_runtime_has_limits_of_its_own(bundle: Path, kind: str) -> None:
    limits, message = LIMITS[kind]
    with Runtime(threads=1, limits=limits) as runtime:
        runtime.load(bundle, "tiny")
        with pytest.raises(InvalidRequest, match=message):
            runtime.submit("tiny", request())


def test_observers_see_every_change_and_cannot_break_anything(
    runtime: Runtime, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[tuple[str, int]] = []

    def observe(job: Job[Any]) -> None:
        seen.append((job.status, runtime.waiting))
        raise RuntimeError("of the observer")

    runtime.observe(observe)
    runtime.submit("tiny", request()).result(TIMEOUT_S)
    runtime.close()
    assert [status for status, _ in seen] == ["queued", "running", "completed"]
    assert "an observer of requests failed" in caplog.text


def test_several_models_share_one_backend(runtime: Runtime, bundle: Path, open_sora_bundle: Path) -> None:
    loaded = [runtime.load(bundle, "again"), runtime.load(open_sora_bundle)]
    assert runtime.models.names() == ["tiny", "again", open_sora_bundle.name]
    assert len({id(pipeline.backend) for pipeline in [*loaded, runtime.models.get("tiny")]}) == 1
    jobs = [runtime.submit(name, request()) for name in runtime.models.names()]
    first, again, other = (job.result(TIMEOUT_S)[0].frames for job in jobs)
    assert first.tobytes() == again.tobytes() and other.shape != first.shape
    runtime.unload("again")
    assert loaded[0].closed and not loaded[1].closed and runtime.submit("tiny", request()).result(TIMEOUT_S)


@pytest.mark.parametrize("make_room", [False, True])
def test_a_model_is_exchanged_while_it_serves(runtime: Runtime, bundle: Path, make_room: bool) -> None:
    gate, old = Gate(runtime), runtime.models.get("tiny")
    waiting = runtime.submit("tiny", request())
    loading = threading.Thread(target=lambda: runtime.load(bundle, "tiny", make_room=make_room))
    loading.start()
    while runtime.models.names() and runtime.models.get("tiny") is old:
        time.sleep(0.01)
    assert not old.closed and not gate.job.done
    gate.go.set()
    assert gate.job.result(TIMEOUT_S)
    loading.join(TIMEOUT_S)
    assert old.closed and not runtime.models.get("tiny").closed
    if not make_room:
        assert waiting.result(TIMEOUT_S)
    assert runtime.submit("tiny", request()).result(TIMEOUT_S)


def test_a_bundle_that_cannot_be_loaded_changes_nothing(runtime: Runtime, bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError):
        runtime.load(tmp_path, "tiny")
    broken = copy_bundle(bundle, tmp_path / "broken")
    (broken / "block.000.data").write_bytes(b"")
    with pytest.raises(Exception, match=r"block\.000\.data"):
        runtime.load(broken, "tiny")
    assert runtime.submit("tiny", request()).result(TIMEOUT_S)


def test_closing_ends_who_waits_and_finishes_who_runs(bundle: Path) -> None:
    runtime = Runtime(threads=1)
    pipeline = runtime.load(bundle, "tiny")
    gate, waiting = Gate(runtime), runtime.submit("tiny", request())
    assert not runtime.close(timeout=0.05) and not runtime.alive
    with pytest.raises(Cancelled, match="while it waited, as the runtime was closed") as caught:
        waiting.result(0)
    assert caught.value.reason == "closed"
    with pytest.raises(InvalidRequest, match="runtime: got a request after close"):
        runtime.submit("tiny", request())
    gate.go.set()
    assert gate.job.result(TIMEOUT_S) and runtime.close(timeout=TIMEOUT_S) and pipeline.closed


def test_closing_with_cancel_ends_who_runs_too(bundle: Path) -> None:
    runtime = Runtime(threads=1)
    runtime.load(bundle, "tiny")
    gate = Gate(runtime)
    closing = threading.Thread(target=lambda: runtime.close(cancel=True))
    closing.start()
    gate.go.set()
    with pytest.raises(Cancelled):
        gate.job.result(TIMEOUT_S)
    closing.join(TIMEOUT_S)
    assert not closing.is_alive()


def test_two_run_at_a_time_where_that_is_allowed(bundle: Path, pipeline: VideoPipeline) -> None:
    with Runtime(threads=1, running=2, waiting=8) as runtime:
        runtime.load(bundle, "tiny")
        gates = [Gate(runtime, seed=seed) for seed in range(2)]
        assert runtime.running == 2
        for gate in gates:
            gate.go.set()
        videos = [gate.job.result(TIMEOUT_S)[0] for gate in gates]
    assert [video.frames.tobytes() for video in videos] == [
        pipeline("a dog", steps=2, seed=seed).frames.tobytes() for seed in range(2)
    ]


async def later(_: object) -> None:
    """What nobody awaits."""


@pytest.mark.parametrize("function", [later, "no function"])
def test_what_a_runtime_could_only_call_in_vain_is_refused(runtime: Runtime, function: Any) -> None:
    request = VideoRequest("a dog", steps=2)
    job = runtime.submit("tiny", request)
    for give in (
        runtime.observe,
        job.watch,
        job.add_done_callback,
        lambda function: runtime.submit("tiny", request, on_event=function),
    ):
        with pytest.raises(InvalidRequest, match="expected a"):
            give(function)
    assert len(job.result(TIMEOUT_S)) == 1


def test_an_observer_that_gives_what_nobody_awaits_is_logged(
    runtime: Runtime, caplog: pytest.LogCaptureFixture
) -> None:
    runtime.observe(lambda job: later(job))  # noqa: PLW0108 - an async function itself is refused
    assert len(runtime.submit("tiny", VideoRequest("a dog", steps=2)).result(TIMEOUT_S)) == 1
    assert "an observer of requests failed" in caplog.text and "which nobody awaits" in caplog.text
