"""A worker process whose engines fail when they are told to: real engines, in front of which a file is looked at.

FORESIGHT_TEST_FAULT names the file. A request reads it when its text is encoded, and removes it; what stands there is
the part, how often it is to have run by then, and one of KINDS. The worker writes down beside it what it has promised.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from foresight.engines.arrays import Array
from foresight.engines.backend import Engine, create_backend
from foresight.engines.bundle import Bundle
from foresight.engines.errors import Cancelled, EngineError
from foresight.engines.interrupt import stoppable
from foresight.engines.manifest import Part
from foresight.runtime.admission import MemoryReservations
from foresight.serving import worker
from foresight.serving.settings import WorkerSettings
from tests.support import BackendInFront

FAULT = "FORESIGHT_TEST_FAULT"
KINDS = ("raises", "is out of memory", "gives NaN")
HELD = "is held until it is stopped"
HELD_S = 60  # at most, so that a broken test ends


@dataclass
class Fault:
    """What is to happen, to which part, before which of its runs."""

    path: Path
    part: str = ""
    runs: int = 0
    kind: str = ""

    def begin(self, promised: list[int]) -> None:
        """A request begins."""
        self.path.with_suffix(".promised").write_text(str(len(promised)))
        try:
            self.part, runs, self.kind = self.path.read_text().split(maxsplit=2)
        except FileNotFoundError:
            self.part = ""
            return
        self.runs = int(runs)
        self.path.unlink()

    def is_due(self, part: str) -> bool:
        """Whether it happens in this run."""
        if part != self.part:
            return False
        self.runs -= 1
        return self.runs < 0

    def happen(self, part: Part, tensors: Mapping[str, Array]) -> None:
        """What an engine does instead of running."""
        self.part = ""
        if self.kind == "raises":
            raise EngineError(f"{part.name}: injected fault")
        if self.kind == "is out of memory":
            raise MemoryError("injected")
        if self.kind == HELD:
            stop = threading.Event()
            with stoppable(stop.set):
                self.path.with_suffix(".held").touch()
                assert stop.wait(HELD_S), "nobody has stopped it"
            raise Cancelled(f"request: cancelled while {part.name} ran")
        for spec in part.outputs:
            if tensors[spec.name].dtype == np.float32:
                tensors[spec.name][...] = np.nan


@dataclass(eq=False)
class FaultyEngine:
    """A real engine that a fault may strike."""

    engine: Engine
    part: Part
    fault: Fault
    promised: MemoryReservations

    def run(self, tensors: Mapping[str, Array]) -> None:
        if self.part.name == "text_encoder":
            self.fault.begin(self.promised._promised)
        due = self.fault.is_due(self.part.name)
        if not due or self.fault.kind == "gives NaN":
            self.engine.run(tensors)
        if due:
            self.fault.happen(self.part, tensors)


@dataclass
class FaultyBackend(BackendInFront):
    """A real backend of faulty engines."""

    fault: Fault = field(default_factory=lambda: Fault(Path(os.environ[FAULT])))

    def load(self, bundle: Bundle, part: Part) -> FaultyEngine:
        return FaultyEngine(self.backend.load(bundle, part), part, self.fault, MemoryReservations(self.arrays))


def main(connection: Connection, settings: WorkerSettings) -> None:
    """A worker's life with such a backend."""

    def create(*options: Any) -> FaultyBackend:
        return FaultyBackend(create_backend(*options))

    worker.main(connection, settings, create)
