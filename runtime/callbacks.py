"""What a request calls of its caller's: `on_step`, `on_progress`, `on_frames`, and the cancel token's `is_set`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from ..engines.arrays import Array
from ..engines.errors import InvalidRequest, quoted

OnFrames = Callable[[int, int, Array], object]

_REMEDY = "hand work over from an ordinary one, say with asyncio.run_coroutine_threadsafe"


def check_callbacks(on_step: Any, cancel: Any, on_progress: Any = None, on_frames: Any = None) -> None:
    """Functions, and something like threading.Event; none of them async. Raises InvalidRequest."""
    if on_step is not None and not callable(on_step):
        raise InvalidRequest(
            f"on_step: got {quoted(on_step)}, expected a function of steps done, their number and the trace"
        )
    if on_progress is not None and not callable(on_progress):
        raise InvalidRequest(f"on_progress: got {on_progress!r}, expected a function of a Progress")
    if on_frames is not None and not callable(on_frames):
        raise InvalidRequest(
            f"on_frames: got {quoted(on_frames)}, expected a function of a prompt's place, a frame's number and frames"
        )
    if cancel is not None and not callable(getattr(cancel, "is_set", None)):
        raise InvalidRequest(
            f"cancel: got {quoted(cancel)}, expected something with is_set(), as threading.Event has it"
        )
    functions = {"on_step": on_step, "on_progress": on_progress, "on_frames": on_frames}
    functions["cancel.is_set"] = getattr(cancel, "is_set", None)
    for name, function in functions.items():
        _check_plain(name, function)


def check_function(name: str, function: Any, of: str) -> None:
    """A plain function of what `of` says. Raises InvalidRequest."""
    if not callable(function):
        raise InvalidRequest(f"{name}: got {quoted(function)}, expected a function of {of}")
    _check_plain(name, function)


def _check_plain(name: str, function: Any) -> None:
    if _runs_later(function):
        raise InvalidRequest(f"{name}: got an async function or a generator, expected a plain function; {_REMEDY}")


def check_result(name: str, result: Any) -> None:
    """A request awaits nothing: refuse a callback that returned what somebody would have to. Raises InvalidRequest."""
    if not (inspect.isawaitable(result) or inspect.isasyncgen(result) or inspect.isgenerator(result)):
        return
    if inspect.iscoroutine(result) or inspect.isgenerator(result):
        result.close()  # it has not begun; or Python would warn that nobody awaited it
    raise InvalidRequest(
        f"{name}: got a {type(result).__name__} from it, which nobody awaits, expected a plain function; {_REMEDY}"
    )


def _runs_later(function: Any) -> bool:
    """Whether a call of it only makes something that would have to be awaited or iterated over."""
    tests: tuple[Callable[[Any], bool], ...] = (
        inspect.iscoroutinefunction,
        inspect.isasyncgenfunction,
        inspect.isgeneratorfunction,
    )
    while isinstance(function, functools.partial):
        function = function.func
    called = getattr(type(function), "__call__", None)  # noqa: B004 - an object's own
    return any(test(candidate) for test in tests for candidate in (function, called))
