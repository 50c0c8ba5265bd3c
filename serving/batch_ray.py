"""A batch by Ray Data: a block a row, so that none is made twice, and workers that have the bundle loaded.

What was made is known by its file alone: Ray's own checkpoints begin anew where a run has ended before its first block
was written.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import msgspec
import ray
import ray.data
from ray.exceptions import RayError

from ..engines.errors import EngineError, InvalidRequest, one_line
from .batch import BatchFolder, Outcome, Row
from .settings import WorkerSettings
from .worker import Failure, load_pipelines

LOCAL = "local"
CONNECT_SECONDS = 10.0
SPARE_CPUS = 8  # slots of Ray's, not cores: with the two of a small machine alone it waits for ever
LOST = Failure(error="EngineError", message="worker: ended while it made the video; see Ray's logs", reason="worker")


@dataclass(frozen=True)
class RayWorkers:
    """The cluster's address, `local` for one that ends with this process, and what is asked of it."""

    address: str = LOCAL
    count: int = 1
    gpus: float = 0.0


class _Maker:
    """A worker: it makes the rows that it is given, one at a time."""

    def __init__(self, folder: BatchFolder, settings: WorkerSettings) -> None:
        self._folder = folder
        (self._pipeline,) = dict(load_pipelines(settings)).values()

    def __call__(self, block: dict[str, Any]) -> dict[str, Any]:
        outcomes = [self._folder.make(self._pipeline, _decoded(row)) for row in block["row"]]
        return {"outcome": [msgspec.json.encode(outcome) for outcome in outcomes]}


def make_rows(
    folder: BatchFolder, rows: Sequence[Row], settings: WorkerSettings, workers: RayWorkers
) -> Iterator[Outcome]:
    """The outcome of every row, in the order in which they are made. The folder is the same for all workers.

    Rows whose worker has died, or could not write, have failed. Raises EngineError where no worker can be started,
    InvalidRequest for a cluster that is not there.
    """
    _connect(workers)
    seen: set[Row] = set()
    try:
        for outcome in _on_stderr(_outcomes(folder, rows, settings, workers)):
            seen.add(outcome.row)
            yield outcome
        for row in rows:
            if row not in seen:
                there = folder.file(row).is_file()
                yield folder.outcome(row, "made") if there else folder.failed(row, LOST)
    except RayError as error:
        raise EngineError(f"ray: {one_line(error)[-300:]}; see its logs") from error
    finally:
        ray.shutdown()


def _connect(workers: RayWorkers) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    if workers.address == LOCAL:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        cpus = workers.count + SPARE_CPUS
        ray.init(address=LOCAL, num_cpus=cpus, include_dashboard=False, **quiet)
        return
    host, _, port = workers.address.rpartition(":")
    try:
        if host and port.isdecimal() and "/" not in host:  # else Ray itself tries for two minutes
            socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
        ray.init(address=workers.address, **quiet)
    except (OSError, ValueError) as error:
        raise InvalidRequest(
            f"ray: got {workers.address!r}, where no cluster answers ({one_line(error)[:200]}), expected an address, "
            "'auto' or 'local'"
        ) from error


def _outcomes(
    folder: BatchFolder, rows: Sequence[Row], settings: WorkerSettings, workers: RayWorkers
) -> Iterator[Outcome]:
    context = ray.data.DataContext.get_current()
    context.max_errored_blocks = -1
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = -1  # one video may take hours
    made = (
        ray.data.from_items([{"row": msgspec.json.encode(row)} for row in rows])
        .repartition(target_num_rows_per_block=1)
        .map_batches(
            _Maker,
            batch_size=1,
            fn_constructor_args=(folder, settings),
            compute=ray.data.ActorPoolStrategy(size=workers.count),
            num_gpus=workers.gpus,
        )
    )
    for found in made.iter_rows():
        yield msgspec.json.decode(found["outcome"], type=Outcome)


def _on_stderr(outcomes: Iterator[Outcome]) -> Iterator[Outcome]:
    """The same; what Ray prints meanwhile, from threads of its own, is no part of a result."""
    while True:
        with redirect_stdout(sys.stderr):
            outcome = next(outcomes, None)
        if outcome is None:
            return
        yield outcome


def _decoded(row: bytes) -> Row:
    return msgspec.json.decode(row, type=Row)
