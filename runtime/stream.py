"""A request as a series of events, for who iterates instead of giving callbacks; also from asyncio.

The request runs in a thread of its own. Who stops iterating cancels it, and waits until its work has stopped, which is
within one block.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import aclosing, suppress
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING, TypeAlias

from ..engines.arrays import Array
from ..engines.progress import Progress
from .admission import CancelToken
from .request import VideoRequest
from .trace import Trace
from .video import Video

if TYPE_CHECKING:
    from .pipeline import VideoPipeline


@dataclass(frozen=True)
class Step:
    """A step is over: `done` of `total`, and the trace so far, which goes on being filled."""

    done: int
    total: int
    trace: Trace


@dataclass(frozen=True)
class Frames:
    """Frames of one prompt's video, as they were decoded: from number `first` on, (n, H, W, 3) uint8; only read."""

    prompt: int
    first: int
    frames: Array


Event: TypeAlias = Progress | Step | Frames | Video
_Put: TypeAlias = Callable[[Event | BaseException | None], object]


def stream(
    pipeline: VideoPipeline, request: VideoRequest, *, cancel: CancelToken | None = None
) -> Generator[Event, None, None]:
    """Make the videos of a request, and tell what happens meanwhile.

    Yields a Progress where a phase begins and before every block, a Step after every step, Frames as they are decoded,
    and in the end a Video for every prompt. Who stops iterating, or closes the generator, cancels the request. Raises
    InvalidRequest at once, and while it is iterated over what `generate` raises.
    """
    pipeline.check(request)
    return _events(pipeline, request, cancel)


def astream(
    pipeline: VideoPipeline, request: VideoRequest, *, cancel: CancelToken | None = None
) -> AsyncGenerator[Event, None]:
    """`stream` for asyncio: an async generator, which keeps no event loop waiting."""
    pipeline.check(request)
    return _async_events(pipeline, request, cancel)


async def agenerate(
    pipeline: VideoPipeline, request: VideoRequest, *, cancel: CancelToken | None = None
) -> list[Video]:
    """`generate` for asyncio; to cancel the task cancels the request."""
    async with aclosing(astream(pipeline, request, cancel=cancel)) as events:
        return [event async for event in events if isinstance(event, Video)]


def _events(pipeline: VideoPipeline, request: VideoRequest, cancel: CancelToken | None) -> Generator[Event, None, None]:
    events: SimpleQueue[Event | BaseException | None] = SimpleQueue()
    job = _Job(pipeline, request, cancel, events.put)
    try:
        while (event := events.get()) is not None:
            if isinstance(event, BaseException):
                raise event
            yield event
    finally:
        job.end()


async def _async_events(
    pipeline: VideoPipeline, request: VideoRequest, cancel: CancelToken | None
) -> AsyncGenerator[Event, None]:
    loop, events = asyncio.get_running_loop(), asyncio.Queue[Event | BaseException | None]()

    def put(event: Event | BaseException | None) -> None:
        with suppress(RuntimeError):  # the loop is closed, so that nobody waits for it
            loop.call_soon_threadsafe(events.put_nowait, event)

    job = _Job(pipeline, request, cancel, put)
    try:
        while (event := await events.get()) is not None:
            if isinstance(event, BaseException):
                raise event
            yield event
    finally:
        job.cancel()
        await asyncio.shield(asyncio.to_thread(job.end))


class _Job:
    """A request in a thread of its own. Puts its events, then None; where it failed, the error instead."""

    def __init__(self, pipeline: VideoPipeline, request: VideoRequest, cancel: CancelToken | None, put: _Put) -> None:
        self._stopped = threading.Event()
        self._caller_cancel = cancel
        self._put = put
        self._thread = threading.Thread(
            target=self._run, args=(pipeline, request), name="foresight-stream", daemon=True
        )
        self._thread.start()

    def is_set(self) -> bool:
        """Whether nobody wants the video any more."""
        return self._stopped.is_set() or (self._caller_cancel is not None and self._caller_cancel.is_set())

    def cancel(self) -> None:
        """Nobody wants it any more."""
        self._stopped.set()

    def end(self) -> None:
        """Cancel it where it still runs, and wait until it does not."""
        self.cancel()
        if threading.current_thread() is not self._thread:  # in which the garbage collector may come here
            self._thread.join()

    def _run(self, pipeline: VideoPipeline, request: VideoRequest) -> None:
        end: BaseException | None = None
        try:
            for video in pipeline.generate(
                request,
                on_step=lambda done, total, trace: self._put(Step(done, total, trace)),
                on_progress=self._put,
                on_frames=lambda prompt, first, frames: self._put(Frames(prompt, first, frames)),
                cancel=self,
            ):
                self._put(video)
        except BaseException as error:  # noqa: BLE001 - it is the caller's, in the caller's thread
            end = error
        self._put(end)
