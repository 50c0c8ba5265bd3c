"""What a request calls of its caller's: never async, and what it raises is the caller's own."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any
from unittest.mock import AsyncMock

import pytest

from foresight.engines.errors import EngineError, InvalidRequest
from foresight.runtime.pipeline import VideoPipeline


async def coroutine(*arguments: Any) -> bool:
    return False


async def later(*arguments: Any) -> AsyncIterator[int]:
    yield 1


def generator(*arguments: Any) -> Iterator[int]:
    yield 1


class Method:
    async def told(self, *arguments: Any) -> bool:
        return False

    @staticmethod
    async def static(*arguments: Any) -> bool:
        return False


class Callable_:
    async def __call__(self, *arguments: Any) -> bool:
        return False


class Awaitable_:
    def __await__(self) -> Iterator[None]:
        yield


class Token:
    """A cancel token with the given is_set."""

    def __init__(self, is_set: Any) -> None:
        self.is_set = is_set


ASYNC: dict[str, Any] = {
    "a coroutine function": coroutine,
    "an async generator function": later,
    "a generator function": generator,
    "a method": Method().told,
    "a static method": Method.static,
    "an object": Callable_(),
    "a partial": functools.partial(coroutine, 1),
    "a partial of a partial of an object": functools.partial(functools.partial(Callable_(), 1), 2),
}


RETURNS: dict[str, Callable[..., Any]] = {
    "a coroutine": lambda *_: coroutine(),
    "an async generator": lambda *_: later(),
    "a generator": lambda *_: generator(),
    "an awaitable": lambda *_: Awaitable_(),
    "what a mock makes": AsyncMock(return_value=False),
}


@pytest.mark.parametrize("kind", ASYNC)
def test_an_async_callback_is_refused_before_anything_runs(pipeline: VideoPipeline, kind: str) -> None:
    with pytest.raises(InvalidRequest, match=r"on_step: got an async function .*run_coroutine_threadsafe"):
        pipeline("a dog", steps=1, on_step=ASYNC[kind])
    with pytest.raises(InvalidRequest, match=r"cancel\.is_set: got an async function .*expected a plain function"):
        pipeline("a dog", steps=1, cancel=Token(ASYNC[kind]))


@pytest.mark.parametrize("kind", RETURNS)
def test_a_callback_that_returns_what_must_be_awaited_is_refused(pipeline: VideoPipeline, kind: str) -> None:
    with pytest.raises(InvalidRequest, match="on_step: got a"):
        pipeline("a dog", steps=2, on_step=RETURNS[kind])
    with pytest.raises(InvalidRequest, match=r"cancel\.is_set: got a"):
        pipeline("a dog", steps=2, cancel=Token(RETURNS[kind]))


def test_what_a_plain_callback_returns_does_not_matter(pipeline: VideoPipeline) -> None:
    told: list[int] = []
    pipeline("a dog", steps=2, on_step=lambda done, *_: told.append(done) or done)  # type: ignore[func-returns-value]
    assert told == [1, 2]


def test_a_callback_may_hand_work_over_to_an_event_loop(pipeline: VideoPipeline) -> None:
    async def serve() -> list[int]:
        told: list[int] = []
        loop, cancel = asyncio.get_running_loop(), asyncio.Event()

        async def tell(done: int) -> None:
            told.append(done)

        def on_step(done: int, total: int, trace: object) -> None:
            asyncio.run_coroutine_threadsafe(tell(done), loop)

        await asyncio.to_thread(lambda: pipeline("a dog", steps=2, on_step=on_step, cancel=cancel))
        await asyncio.sleep(0)
        return told

    assert asyncio.run(serve()) == [1, 2]


class Own(Exception):
    """An error that nobody else knows."""


ERRORS: list[BaseException] = [
    MemoryError("mine"),
    RuntimeError("mine"),
    StopIteration("mine"),
    ValueError("mine"),
    EngineError("mine"),
    Own("mine"),
    KeyboardInterrupt(),
    SystemExit(3),
    GeneratorExit(),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("where", ["on_step", "is_set"])
def test_what_a_callback_raises_reaches_its_caller_unchanged(
    pipeline: VideoPipeline, error: BaseException, where: str
) -> None:
    def complain(*arguments: Any) -> Any:
        raise error

    settings: dict[str, Any] = {"on_step": complain} if where == "on_step" else {"cancel": Token(complain)}
    with pytest.raises(type(error)) as raised:
        pipeline("a dog", steps=2, **settings)
    assert raised.value is error
    assert error.__cause__ is None and error.__context__ is None


def test_a_memory_error_of_the_callers_own_keeps_its_cause_in_every_step(pipeline: VideoPipeline) -> None:
    cause = Own()

    def complain(done: int, total: int, trace: object) -> None:
        if done == 2:
            raise MemoryError("mine") from cause

    with pytest.raises(MemoryError, match=r"^mine$") as raised:
        pipeline("a dog", steps=3, on_step=complain)
    assert raised.value.__cause__ is cause


def test_an_event_of_threading_is_a_token(pipeline: VideoPipeline) -> None:
    assert pipeline("a dog", steps=1, cancel=threading.Event()).frames.any()
