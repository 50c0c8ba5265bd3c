"""Which engines are loaded when: all of them for good, or those of a phase while it lasts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

from ..engines.backend import Backend, Engine
from ..engines.bundle import Bundle, Unchanged
from ..engines.manifest import Part, part_files
from ..engines.progress import Counter, OnProgress
from .admission import CancelToken, OneAtATime, check_cancelled


class Residency:
    """The engines of one bundle on one backend; with `low_memory` a request has those of one phase at a time.

    `engines` are those that stay loaded, by their parts' names. Only files that are still as they were verified are
    loaded, and served.
    """

    def __init__(self, bundle: Bundle, backend: Backend, low_memory: bool) -> None:
        self.bundle = bundle
        self.backend = backend
        self.low_memory = low_memory
        self.files = Unchanged(bundle)
        self.engines: dict[str, Engine] = {}
        self._turns = OneAtATime() if low_memory else None

    def load(self, cancel: CancelToken, on_progress: OnProgress) -> None:
        """Load what stays loaded. Raises EngineError, IntegrityError, Cancelled."""
        parts = () if self.low_memory else self.bundle.manifest.parts
        for part, engine in zip(parts, self._loaded(parts, cancel, on_progress), strict=True):
            self.engines[part.name] = engine

    @contextmanager
    def turn(self, cancel: CancelToken | None) -> Iterator[None]:
        """A request's time on the device: with `low_memory` requests have it one after the other, as they came."""
        turn = nullcontext() if self._turns is None else self._turns.turn(cancel)
        with turn, self.backend.arrays.active():
            try:
                yield
            finally:
                if self.low_memory:
                    self.backend.trim()

    @contextmanager
    def phase(self, parts: Sequence[Part], cancel: CancelToken, on_progress: OnProgress) -> Iterator[list[Engine]]:
        """The engines of a phase, in the parts' order; with `low_memory` they are there only for it.

        The list is empty afterwards. `cancel` is looked at before each that has to be loaded.
        """
        engines: list[Engine] = []
        if self.low_memory:
            self.backend.trim()
        try:
            found = self._loaded(parts, cancel, on_progress) if self.low_memory else self._resident(parts)
            engines.extend(found)
            yield engines
        finally:
            if self.low_memory:
                self.backend.arrays.synchronize()
            engines.clear()

    def _resident(self, parts: Sequence[Part]) -> Iterator[Engine]:
        return (self.engines[part.name] for part in parts)

    def _loaded(self, parts: Sequence[Part], cancel: CancelToken, on_progress: OnProgress) -> Iterator[Engine]:
        total = sum(map(self._bytes, parts))
        loaded = Counter("loading", total, "bytes", on_progress if parts else None)
        for part in parts:
            check_cancelled(cancel, "while its engines were loaded")
            self.files.check(*part_files(part))
            engine = self.backend.load(self.bundle, part)
            self.files.check(*part_files(part))
            loaded.advance(self._bytes(part))
            yield engine
            del engine

    def _bytes(self, part: Part) -> int:
        return sum(self.bundle.manifest.files[name].bytes for name in part_files(part))
