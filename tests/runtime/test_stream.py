"""A request as events, for loops and for asyncio."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import numpy as np
import pytest

from foresight.engines.errors import Cancelled, EngineError, InvalidRequest
from foresight.engines.progress import Progress
from foresight.runtime.pipeline import VideoPipeline
from foresight.runtime.request import VideoRequest
from foresight.runtime.stream import Frames, Step
from foresight.runtime.video import Video
from tests.support import watched_pipeline

TWO = VideoRequest(["a dog", "a red circle"], steps=3, seed=4)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "foresight-stream"]


def check_events(events: list[Any], expected: list[Video]) -> None:
    phases = [event.phase for event in events if isinstance(event, Progress)]
    assert list(dict.fromkeys(phases)) == ["encoding text", "denoising", "decoding"]
    assert [(event.done, event.total) for event in events if isinstance(event, Step)] == [(1, 3), (2, 3), (3, 3)]
    videos = [event for event in events if isinstance(event, Video)]
    assert events[-2:] == videos
    for place, (video, same) in enumerate(zip(videos, expected, strict=True)):
        shown = [event for event in events if isinstance(event, Frames) and event.prompt == place]
        assert [event.first for event in shown] == list(np.cumsum([0, *(len(event.frames) for event in shown[:-1])]))
        assert np.concatenate([event.frames for event in shown]).tobytes() == video.frames.tobytes()
        assert video.frames.tobytes() == same.frames.tobytes()


def test_a_stream_tells_what_happens_and_ends_with_the_videos(pipeline: VideoPipeline) -> None:
    check_events(list(pipeline.stream(TWO)), pipeline.generate(TWO))
    assert not threads()


def test_so_does_its_twin_for_asyncio(pipeline: VideoPipeline) -> None:
    async def collected() -> list[Any]:
        return [event async for event in pipeline.astream(TWO)]

    check_events(asyncio.run(collected()), pipeline.generate(TWO))
    assert not threads()


def test_agenerate_gives_the_videos(pipeline: VideoPipeline) -> None:
    videos = asyncio.run(pipeline.agenerate(TWO))
    assert [video.frames.tobytes() for video in videos] == [v.frames.tobytes() for v in pipeline.generate(TWO)]


def test_a_request_that_makes_no_sense_is_refused_before_it_is_iterated_over(pipeline: VideoPipeline) -> None:
    for begin in (pipeline.stream, pipeline.astream):
        with pytest.raises(InvalidRequest, match="steps: got 0"):
            begin(VideoRequest("a dog", steps=0))


def test_who_stops_iterating_cancels_the_request(single_bundle: Any) -> None:
    pipeline, backend = watched_pipeline(single_bundle)
    events = pipeline.stream(VideoRequest("a dog", steps=20))
    for event in events:
        if isinstance(event, Step):
            break
    events.close()
    assert not threads() and pipeline.close(timeout=0)
    assert not backend.alive


def test_a_task_that_is_cancelled_cancels_its_request(single_bundle: Any) -> None:
    pipeline, _ = watched_pipeline(single_bundle)

    async def late() -> None:
        await asyncio.wait_for(pipeline.agenerate(VideoRequest("a dog", steps=100)), 0.05)

    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(late())
    assert not threads() and pipeline.close(timeout=0)


def test_errors_reach_who_iterates(pipeline: VideoPipeline) -> None:
    cancel = threading.Event()
    events = pipeline.stream(VideoRequest("a dog", steps=20), cancel=cancel)
    assert isinstance(next(events), Progress)
    cancel.set()
    with pytest.raises(Cancelled) as caught:
        list(events)
    assert caught.value.reason == "caller"
    with pytest.raises(EngineError, match="lower the guidance"):
        list(pipeline.stream(VideoRequest("a dog", steps=2, guidance=3e38)))
    assert not threads()
