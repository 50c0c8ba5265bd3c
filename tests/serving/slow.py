"""A worker process in which a step takes some time, so that a request of many can be met at work on any machine."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from foresight.engines.arrays import Array
from foresight.engines.backend import Engine, create_backend
from foresight.engines.bundle import Bundle
from foresight.engines.manifest import Part
from foresight.serving import worker
from foresight.serving.settings import WorkerSettings
from tests.support import BackendInFront

STEP_S = 0.03


@dataclass(eq=False)
class SlowEngine:
    """A real engine that is not in a hurry."""

    engine: Engine

    def run(self, tensors: Mapping[str, Array]) -> None:
        time.sleep(STEP_S)
        self.engine.run(tensors)


class SlowBackend(BackendInFront):
    """A real backend whose prologues are slow."""

    def load(self, bundle: Bundle, part: Part) -> Engine:
        engine = self.backend.load(bundle, part)
        return SlowEngine(engine) if part.name == "prologue" else engine


def main(connection: Connection, settings: WorkerSettings) -> None:
    """A worker's life with such a backend."""

    def create(*options: Any) -> SlowBackend:
        return SlowBackend(create_backend(*options))

    worker.main(connection, settings, create)
