"""The life of a pipeline: which requests are inside, whether more may come in, and what ends them.

A request is ended by its caller's token, by its deadline, by `close(cancel=True)`, or by the interpreter's exit: a
thread that is inside an engine when Python ends takes the process down with it, so the exit waits until all have left.
A pipeline belongs to the process that loaded it. In a forked child its engines' threads do not exist, and so it is
refused there and never freed: to free an engine is to wait for its threads.
"""

from __future__ import annotations

import atexit
import ctypes
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from ..engines.arrays import Array
from ..engines.backend import Backend, Engine
from ..engines.errors import Cancelled, InvalidRequest, quoted
from ..engines.interrupt import Watch
from ..engines.progress import OnProgress, Progress, silent
from .admission import CancelToken, check_cancelled
from .callbacks import OnFrames, check_result
from .denoise import OnStep
from .release import calls_callers
from .trace import Trace

POLL_SECONDS = 0.01  # between two looks, at exit, at who is still inside an engine
CLOSED = ", as its pipeline was closed"
EXITING = ", as the interpreter exits"
REASONS = {CLOSED: "closed", EXITING: "exit"}

T = TypeVar("T")


def check_process(pid: int, what: str) -> None:
    """Refuse what a process has inherited from the one that it was forked from. Raises InvalidRequest."""
    if os.getpid() != pid:
        raise InvalidRequest(
            f"{what} by process {pid}, called in {os.getpid()}, which was forked from it; load it after the fork, or "
            "start processes with multiprocessing's spawn"
        )


class Lifecycle:
    """Of one pipeline. `engines` are those that stay loaded; they are cleared when the pipeline is closed.

    Thread-safe, and usable from a signal handler that interrupts a request.
    """

    def __init__(self, engines: dict[str, Engine], backend: Backend) -> None:
        self.engines = engines
        self.backend = backend
        self.closed = False
        self._pid = os.getpid()
        self._freed = False
        self._running: list[Calls] = []
        self._changed = threading.Condition()
        _alive[id(self)] = self
        self.why = EXITING if _Process.exiting else None  # requests are to stop; read without the lock

    def check(self) -> None:
        """Whether a request may come in. Raises InvalidRequest, and Cancelled while the interpreter exits."""
        check_process(self._pid, "pipeline: loaded")
        if self.why == EXITING:
            raise Cancelled(f"request: cancelled before it began{EXITING}", REASONS[EXITING])
        if self.closed:
            raise InvalidRequest("pipeline: got a request after close(), expected none; load the bundle again")

    @property
    def inherited(self) -> bool:
        """Whether this is a child of the process that loaded the pipeline."""
        return os.getpid() != self._pid

    def close(self, cancel: bool, timeout: float | None) -> bool:
        """See VideoPipeline.close."""
        if not (timeout is None or (isinstance(timeout, (int, float)) and timeout >= 0)):
            raise InvalidRequest(
                f"timeout: got {quoted(timeout)}, expected seconds of 0 or more, or None to wait for ever"
            )
        if self.inherited:
            return True
        with self._changed:
            self.closed = True
            if cancel:
                self.why = self.why or CLOSED
            self._free_if_empty()
            me = threading.get_ident()
            if any(calls.thread == me for calls in self._running):  # it would wait for itself
                return False
            wait = None if timeout is None or math.isinf(timeout) else min(timeout, threading.TIMEOUT_MAX)
            return self._changed.wait_for(lambda: self._freed, wait)

    def enter(self, calls: Calls) -> None:
        """Let a request in; see `check`."""
        self.check()
        with self._changed:
            self.check()
            self._running.append(calls)

    def leave(self, calls: Calls) -> None:
        """A request is over. The last one to leave a closed pipeline frees it."""
        if self.inherited:
            return
        with self._changed:
            self._running.remove(calls)
            self._free_if_empty()
            self._changed.notify_all()

    def end(self) -> bool:
        """The interpreter exits: cancel all requests. Returns whether there were any."""
        self.why = EXITING
        return bool(self._running)

    def wait_outside(self) -> None:
        """Until no thread is inside an engine. One that is in a callback is let into none any more."""
        with self._changed:
            while not all(calls.outside for calls in self._running):
                self._changed.wait(POLL_SECONDS)

    def _free_if_empty(self) -> None:
        if self._freed or not self.closed or self._running:
            return
        try:
            with self.backend.arrays.active():
                self.engines.clear()
            self.backend.trim()
        finally:
            self._freed = True
            self._changed.notify_all()


class Calls:
    """One request inside a pipeline, and what it calls of its caller's. Is the request's cancel token.

    What a callback raises reaches the caller as it is, whatever is made of it on the way there.
    """

    def __init__(
        self,
        life: Lifecycle,
        on_step: OnStep | None = None,
        cancel: CancelToken | None = None,
        on_progress: OnProgress | None = None,
        on_frames: OnFrames | None = None,
        deadline: float | None = None,
    ) -> None:
        self.thread = threading.get_ident()
        self.outside = False  # of all engines: in a callback
        self.on_step = None if on_step is None else self._step
        self.on_progress = silent if on_progress is None else self._tell
        self.on_frames = None if on_frames is None else self._show
        self._life = life
        self._caller_on_step = on_step
        self._caller_cancel = cancel
        self._caller_on_progress = on_progress
        self._caller_on_frames = on_frames
        self._deadline = deadline
        self._ends = math.inf if deadline is None else time.monotonic() + deadline
        self._raised: BaseException | None = None

    def run(self, work: Callable[[], T]) -> T:
        """Do the request's work. Raises what `Lifecycle.check` does, what the work does, or what a callback did."""
        self._life.enter(self)
        try:
            with Watch(self._is_over):
                return work()
        except BaseException as error:
            if self._raised is None or error is self._raised:
                if self._raised is None and isinstance(error, Cancelled):
                    self._explain(error)
                self._raised = None
                raise
        finally:
            self._life.leave(self)
        raised, self._raised = self._raised, None
        try:
            raise raised  # from here, so that it gets no context that its caller did not give it
        finally:
            del raised  # or it would keep itself

    @property
    def why(self) -> str:
        """What cancelled the request, where it was not its caller."""
        if self._life.why is None and self._is_late():
            return f", as its deadline of {self._deadline:g} s had passed"
        return self._life.why or str(getattr(self._caller_cancel, "why", ""))

    @property
    def reason(self) -> str:
        """See Cancelled.reason."""
        if self._life.why is not None:
            return REASONS[self._life.why]
        return "deadline" if self._is_late() else str(getattr(self._caller_cancel, "reason", "caller"))

    def is_set(self) -> bool:
        """Whether to stop."""
        if self._must_end():
            return True
        if self._caller_cancel is None:
            return False
        answer = self._call(self._caller_cancel.is_set)
        check_result("cancel.is_set", answer)
        return bool(answer) or self._must_end()  # the pipeline may have been closed in there

    def _is_over(self) -> bool:
        """`is_set` for the watch, which asks from a thread of its own, while the request is inside an engine."""
        return self._must_end() or (self._caller_cancel is not None and bool(self._caller_cancel.is_set()))

    def _must_end(self) -> bool:
        return self._life.why is not None or self._is_late()

    def _is_late(self) -> bool:
        return time.monotonic() >= self._ends

    def _explain(self, error: Cancelled) -> None:
        """An engine that was stopped does not know why."""
        message = str(error)
        if self.why not in message:
            error.args = (message + self.why,)
        error.reason = self.reason

    def _step(self, done: int, total: int, trace: Trace) -> None:
        assert self._caller_on_step is not None
        check_result("on_step", self._call(self._caller_on_step, done, total, trace))
        if self._must_end():
            check_cancelled(self, f"after step {done} of {total}")

    def _tell(self, progress: Progress) -> None:
        assert self._caller_on_progress is not None
        check_result("on_progress", self._call(self._caller_on_progress, progress))

    def _show(self, prompt: int, first: int, frames: Array) -> None:
        assert self._caller_on_frames is not None
        check_result("on_frames", self._call(self._caller_on_frames, prompt, first, frames))

    def _call(self, function: Callable[..., T], *arguments: Any) -> T:
        mine = threading.get_ident() == self.thread  # else somebody looks at the token meanwhile
        self.outside = self.outside or mine
        try:
            return function(*arguments)
        except BaseException as error:
            self._raised = error
            raise
        finally:
            self.outside = self.outside and not mine
            if self._life.inherited:  # the callback has forked, and this is the child
                self._life.check()


calls_callers(Calls._call.__code__)


class _Process:
    exiting = False


_alive: WeakValueDictionary[int, Lifecycle] = WeakValueDictionary()


def _exit() -> None:
    """Before Python ends: threads that it waits for are done, the others are stopped here."""
    _Process.exiting = True
    mine = [life for life in _known() if not life.inherited]
    ended = [life.end() for life in mine]  # every one, before any is waited for
    if any(ended):
        _hush()
    for life in mine:
        life.wait_outside()


def _hush() -> None:
    """Threads that nobody waits for end by Cancelled now: print no traceback of that."""

    def without_cancelled(hook: Callable[[Any], object]) -> Callable[[Any], object]:
        return lambda args: None if isinstance(args.exc_value, Cancelled) else hook(args)

    threading.excepthook = without_cancelled(threading.excepthook)
    sys.unraisablehook = without_cancelled(sys.unraisablehook)


def _forked() -> None:
    """In a child: what it has inherited is never freed, not even when the child ends."""
    for life in _known():
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(life))


def _known() -> list[Lifecycle]:
    """Those that are there now, while other threads make more."""
    return [life for reference in _alive.valuerefs() if (life := reference()) is not None]


atexit.register(_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
