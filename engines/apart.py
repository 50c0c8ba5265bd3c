"""Calls in processes of their own, which end with this one, however it ends."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar, cast

from .errors import EngineError, one_line

PR_SET_PDEATHSIG = 1  # of Linux: the signal to get when the parent's thread that started this process ends

T = TypeVar("T")


class Crashed(Exception):
    """The process ended without an answer."""


class Apart:
    """Makes calls, from any number of threads, each in a fresh process; `stop` ends those that are being made."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._processes: set[BaseProcess] = set()
        self._stopped = False

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """What the function returns; all of it must be possible to pickle. Raises what it raises, and Crashed."""
        context = multiprocessing.get_context("spawn")
        answers, answering = context.Pipe(duplex=False)
        process = context.Process(
            target=_answer, args=(answering, os.getpid(), function, arguments), name=function.__name__, daemon=True
        )
        with answers, answering:
            self._start(process)
            answering.close()  # the process has its own: when that is gone, there is no answer to wait for
            try:
                returned, result = answers.recv()
            except (EOFError, OSError) as error:
                raise Crashed from error
            finally:
                self._end(process)
        if not returned:
            raise result
        return cast(T, result)

    def stop(self) -> None:
        """End what runs, and start nothing any more."""
        with self._lock:
            self._stopped = True
            for process in self._processes:
                process.kill()

    def _start(self, process: BaseProcess) -> None:
        with self._lock:
            if self._stopped:
                raise Crashed
            _start_deaf(process)
            self._processes.add(process)

    def _end(self, process: BaseProcess) -> None:
        with self._lock:
            self._processes.discard(process)
            process.kill()  # it has answered, or never will
        process.join()
        process.close()


def _start_deaf(process: BaseProcess) -> None:
    """Start it deaf to Ctrl-C, which a terminal sends to all: this process ends it, once."""
    if not hasattr(signal, "pthread_sigmask"):
        process.start()
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _answer(answering: Connection, parent: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """In the process: make the call."""
    _end_with(parent)
    _mute()
    try:
        answer = True, function(*arguments)
    except Exception as error:  # noqa: BLE001 - it is raised where the call came from
        answer = False, error
    try:
        answering.send(answer)
    except (AttributeError, TypeError, ValueError) as error:  # what cannot be pickled
        answering.send((False, EngineError(f"{function.__name__}: {one_line(answer[1])} ({one_line(error)})")))


def _end_with(parent: int) -> None:
    """End this process when the one that started it ends, and if it has ended already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
    started_by = multiprocessing.parent_process()
    assert started_by is not None

    def watch() -> None:
        wait([started_by.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _mute() -> None:
    """The libraries print, past their loggers, what the loggers are told as well."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(nowhere, descriptor)
