"""Which requests may run: not those that were cancelled, nor those for which no memory is left beside the others."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, Protocol
from weakref import WeakKeyDictionary

from ..engines.arrays import MEBI, Arrays
from ..engines.errors import Cancelled, InvalidRequest, OutOfMemory

POLL_SECONDS = 0.05  # between two looks at the cancel token of a request that waits


class CancelToken(Protocol):
    """Anything like threading.Event: the request stops before its next block once `is_set()` is true."""

    def is_set(self) -> bool:
        """Whether to stop."""


def check_cancelled(cancel: CancelToken | None, when: str) -> None:
    """Raises Cancelled where the token is set; `when` says how far the request got.

    A token may know `why`, in words to follow, and the `reason` that a Cancelled has.
    """
    if cancel is not None and cancel.is_set():
        raise Cancelled(f"request: cancelled {when}{getattr(cancel, 'why', '')}", getattr(cancel, "reason", "caller"))


class OneAtATime:
    """Requests take turns, in the order in which they came. Waiting ends when a request is cancelled."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._line: deque[threading.Event] = deque()  # the first has its turn
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
        mine = threading.Event()
        try:
            with self._lock:
                self._line.append(mine)
                self._line[0].set()
            while not mine.wait(POLL_SECONDS):
                check_cancelled(cancel, "while it waited for another")
            self._thread = me
            yield
        finally:
            with self._lock:
                if mine.is_set():
                    self._thread = None
                self._line.remove(mine)
                if self._line:
                    self._line[0].set()


class MemoryReservations:
    """The memory of a device, as far as the requests of this process share it: all its pipelines have one ledger.

    Free memory is read at every admission. What running requests have allocated is missing from it already, so only
    what they have still to take is kept back for them: what each was promised, less what free memory has fallen by
    since its phase began. What falls while nobody allocates was taken by others, and is counted for no request; what
    falls while one does is counted for the oldest first, up to its promise. Where memory came back meanwhile, less has
    fallen than was taken, and more is kept back than is needed. A new phase frees what the one before had taken.
    """

    def __init__(self, arrays: Arrays) -> None:
        self._arrays = arrays
        with _Ledger.lock:
            self._ledger = _Ledger.of_devices.setdefault(arrays.device, _Ledger())
            self._ledger.seen[arrays] = None

    @contextmanager
    def reserve(self, size: int, prompts: int) -> Iterator[Reservation]:
        """Promise a request `size` bytes. Raises OutOfMemory where they are not there beside what others may take."""
        ledger = self._ledger
        with ledger.lock:
            ledger.look()
            free, kept = ledger.seen[self._arrays], sum(promise.outstanding for promise in ledger.promises)
            if free is not None and kept + size > free:
                others = f" and {kept / MEBI:.0f} promised to {len(self._promised)} others" if kept else ""
                raise OutOfMemory(
                    f"request: got {free / MEBI:.0f} MiB of free memory on {self._arrays.device}{others}, "
                    f"expected {size / MEBI:.0f} for {prompts} prompts; send fewer at once, or use a smaller "
                    "cache_memory, or low_memory"
                )
            promise = Reservation(ledger, size)
            ledger.promises.append(promise)
        try:
            yield promise
        finally:
            with ledger.lock:
                ledger.look()
                ledger.promises.remove(promise)

    @property
    def _promised(self) -> list[int]:
        return [promise.size for promise in self._ledger.promises]


class Reservation:
    """What one request was promised; `outstanding` is what it has still to take of that, in bytes."""

    def __init__(self, ledger: _Ledger, size: int) -> None:
        self.size = size
        self.outstanding = size
        self.allocates = False
        self._ledger = ledger

    def begin_phase(self) -> None:
        """From now on the request allocates what it was promised; what an earlier phase had taken is free again."""
        with self._ledger.lock:
            self._ledger.look()
            self.outstanding, self.allocates = self.size, True

    def look(self) -> None:
        """Note what has been taken, while it is there."""
        with self._ledger.lock:
            self._ledger.look()


class _Ledger:
    """Of one device. `seen` is the free memory when it was last looked at, for the pools of each pipeline."""

    lock: ClassVar[threading.Lock] = threading.Lock()  # of all ledgers; held for as long as a look takes
    of_devices: ClassVar[dict[str, _Ledger]] = {}

    def __init__(self) -> None:
        self.promises: list[Reservation] = []
        self.seen: WeakKeyDictionary[Arrays, int | None] = WeakKeyDictionary()

    def look(self) -> None:
        """Read free memory; what it has fallen by was taken by the requests that allocate."""
        fallen = 0
        for arrays, before in list(self.seen.items()):
            free = arrays.free_bytes()
            if free is not None and before is not None:
                fallen = max(fallen, before - free)
            self.seen[arrays] = free
        for promise in self.promises:
            if promise.allocates:
                taken = min(fallen, promise.outstanding)
                promise.outstanding -= taken
                fallen -= taken


def _forget() -> None:
    """In a forked child: the requests of its parent are not its own."""
    _Ledger.lock = threading.Lock()
    _Ledger.of_devices = {}


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
