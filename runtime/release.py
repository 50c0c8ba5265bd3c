"""What an error keeps alive: the frames of its traceback, and with them every array that they had a name for.

Servers keep errors: a future does, and so does a log of failed jobs. A request's buffers are not to stay with them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import CodeType, FrameType

_callers: set[CodeType] = set()  # of functions that call what a caller gave them


def calls_callers(code: CodeType) -> None:
    """Frames that a function with this code calls belong to somebody else: they keep what they hold."""
    _callers.add(code)


@contextmanager
def released() -> Iterator[None]:
    """An error that leaves the block leaves its frames empty behind it, and those of the errors that it came from.

    Frames of callbacks keep what they hold, and so do errors that a callback had caught before it raised, and the one
    that the caller was handling when it came here, as who tries again does. Up to Python 3.12 a frame keeps what it
    has from the function around it: no comprehension or lambda may capture a buffer.
    """
    handled = sys.exc_info()[1]
    try:
        yield
    except BaseException as error:
        _release(error, handled)
        raise
    finally:
        del handled


def _release(error: BaseException, handled: BaseException | None) -> None:
    waiting: list[BaseException | None] = [error]
    seen = {id(handled)}
    while waiting:
        error_or_none = waiting.pop()
        if error_or_none is None or id(error_or_none) in seen:
            continue
        seen.add(id(error_or_none))
        if _clear(error_or_none):
            waiting += (error_or_none.__cause__, error_or_none.__context__)


def _clear(error: BaseException) -> bool:
    """Empty the frames of a traceback; False where it leads into a callback, whose frames stay."""
    for frame in _frames(error):
        calls = frame.f_code in _callers
        with suppress(RuntimeError):  # of a frame that still runs
            frame.clear()
        if calls:
            return False
    return True


def _frames(error: BaseException) -> Iterator[FrameType]:
    trace = error.__traceback__
    while trace is not None:
        yield trace.tb_frame
        trace = trace.tb_next
