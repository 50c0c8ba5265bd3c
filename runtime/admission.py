"""Which requests may run: not those that were cancelled, nor those for which no memory is left beside the others."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from ..engines.arrays import MEBI, Arrays
from ..engines.errors import Cancelled, InvalidRequest, OutOfMemory

POLL_SECONDS = 0.05  # between two looks at the cancel token of a request that waits


class CancelToken(Protocol):
    """Anything like threading.Event: the request stops before its next block once `is_set()` is true."""

    def is_set(self) -> bool:
        """Whether to stop."""


def check_cancelled(cancel: CancelToken | None, when: str) -> None:
    """Raises Cancelled where the token is set; `when` says how far the request got. A token may know `why`."""
    if cancel is not None and cancel.is_set():
        raise Cancelled(f"request: cancelled {when}{getattr(cancel, 'why', '')}")


class OneAtATime:
    """Requests take turns. Waiting ends when a request is cancelled."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: int | None = None

    @contextmanager
    def turn(self, cancel: CancelToken | None) -> Iterator[None]:
        """Wait for it, and have it. Raises Cancelled, and InvalidRequest for a request from inside another."""
        me = threading.get_ident()
        if self._thread == me:
            raise InvalidRequest(
                "request: came from inside another of the same pipeline, expected one at a time with low memory; "
                "wait for the other, or load a second pipeline"
            )
        while not self._lock.acquire(timeout=POLL_SECONDS):
            check_cancelled(cancel, "while it waited for another")
        try:
            self._thread = me
            yield
        finally:
            self._thread = None
            self._lock.release()


class Room:
    """The memory of a device, as far as the requests of one pipeline share it."""

    def __init__(self, arrays: Arrays) -> None:
        self._arrays = arrays
        self._lock = threading.Lock()
        self._promised: list[int] = []
        self._free: int | None = None  # when no request was running

    @contextmanager
    def reserve(self, size: int, prompts: int) -> Iterator[None]:
        """Promise a request `size` bytes. Raises OutOfMemory where they are not there beside what others may take."""
        with self._lock:
            if not self._promised:
                self._free = self._arrays.free_bytes()
            taken = sum(self._promised)
            if self._free is not None and taken + size > self._free:
                others = f" and {taken / MEBI:.0f} promised to {len(self._promised)} others" if taken else ""
                raise OutOfMemory(
                    f"request: got {self._free / MEBI:.0f} MiB of free memory on {self._arrays.device}{others}, "
                    f"expected {size / MEBI:.0f} for {prompts} prompts; send fewer at once, or use a smaller "
                    "--cache-memory, or --low-memory"
                )
            self._promised.append(size)
        try:
            yield
        finally:
            with self._lock:
                self._promised.remove(size)
