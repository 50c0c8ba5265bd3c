"""What a request is said to take before it runs."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from foresight.engines.errors import Cancelled, InvalidRequest
from foresight.runtime.decisions import Decision
from foresight.runtime.estimate import MOST_KINDS, Pace
from foresight.runtime.pipeline import VideoPipeline
from foresight.runtime.policies import Forecast, NoReuse, Static
from foresight.runtime.request import CheckedRequest, VideoRequest, check_request
from foresight.runtime.trace import StepTrace, Trace
from tests.support import load_pipeline


@pytest.fixture
def fresh(bundle: Path) -> VideoPipeline:
    return load_pipeline(bundle)


def checked(pipeline: VideoPipeline, request: VideoRequest) -> tuple[CheckedRequest, ...]:
    return check_request(request, pipeline.manifest, pipeline._table, pipeline.backend.arrays)


def trace_of(pipeline: VideoPipeline, steps: int, run: int, ms: float) -> Trace:
    """Of a request whose first `run` steps ran whole, each in `ms`; text took 100 ms, decoding 200."""
    trace = pipeline("a dog", steps=1).trace
    blocks, nothing = len(trace.blocks), (None,) * len(trace.blocks)
    trace.steps[:] = [
        StepTrace(
            0, ms, ((Decision.COMPUTE if step < run else Decision.FORECAST).value,) * blocks, nothing, nothing, nothing
        )
        for step in range(steps)
    ]
    trace.text_ms, trace.denoise_ms, trace.decode_ms = 100.0, ms * run, 200.0
    return trace


def test_bytes_are_those_of_the_plan(fresh: VideoPipeline) -> None:
    for policy in (Forecast(), NoReuse()):
        two = fresh.check(VideoRequest(["a", "b"], steps=2, guidance=1, policy=policy))
        assert two.bytes == fresh.memory(2, False, policy).per_request
    assert two.seconds is None


def test_what_generate_refuses_is_refused(fresh: VideoPipeline) -> None:
    with pytest.raises(InvalidRequest, match="guidance: got 0"):
        fresh.check(VideoRequest("a dog", guidance=0))


def test_a_warm_up_makes_seconds_known(fresh: VideoPipeline) -> None:
    fresh.warm_up()
    one, more = (fresh.check(VideoRequest("a dog", steps=steps)).seconds for steps in (1, 40))
    assert one and more and 0 < one < more
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(Cancelled):
        fresh.warm_up(cancel=cancel)


def test_seconds_follow_steps_rows_and_what_that_policy_skips(fresh: VideoPipeline) -> None:
    pace, blocks = Pace(), len(fresh.manifest.blocks)
    usual = checked(fresh, VideoRequest("a dog", steps=10, policy=Static()))
    assert pace.seconds(usual, blocks) is None
    pace.record(usual[0], trace_of(fresh, 10, 5, 40.0))
    assert pace.seconds(usual, blocks) == pytest.approx(0.1 + 5 * 0.04 + 0.2)
    whole = checked(fresh, VideoRequest("a dog", steps=20, policy=NoReuse()))
    assert pace.seconds(whole, blocks) == pytest.approx(0.1 + 20 * 0.04 + 0.2)
    two = checked(fresh, VideoRequest(["a", "b"], steps=20, policy=NoReuse()))
    assert pace.seconds(two, blocks) == pytest.approx(0.1 + 40 * 0.04 + 0.4)
    pace.record(usual[0], trace_of(fresh, 10, 5, 80.0))
    assert pace.seconds(usual, blocks) == pytest.approx(0.1 + 5 * 0.06 + 0.2)


def test_only_so_many_kinds_of_requests_are_remembered(fresh: VideoPipeline) -> None:
    pace, trace = Pace(), trace_of(fresh, 2, 1, 40.0)
    for place in range(MOST_KINDS + 1):
        pace.record(checked(fresh, VideoRequest("a dog", steps=2, policy=Forecast(0.001 * (place + 1))))[0], trace)
    known, forgotten = (
        pace.seconds(checked(fresh, VideoRequest("a dog", steps=2, policy=Forecast(tolerance))), 1)
        for tolerance in (0.001 * (MOST_KINDS + 1), 0.001)
    )
    assert known and forgotten and known < forgotten
