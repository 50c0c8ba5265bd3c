"""What a server is told when it starts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..engines.errors import InvalidRequest
from ..engines.signatures import PublicKey
from ..runtime.limits import RequestLimits

DAY_SECONDS = 86400.0


@dataclass(frozen=True)
class WorkerSettings:
    """Of every process that makes videos. `bundles` are those it loads, by the names they are served under.

    With `signed_by`, one of these keys must have signed each of them.
    """

    bundles: Mapping[str, Path]
    backend: str | None = None
    device: str | None = None
    threads: int | None = None
    low_memory: bool = False
    cache_memory: int | None = None
    cuda_graphs: bool = False
    split_guidance: bool = False
    shared_weights: bool = False
    signed_by: tuple[PublicKey, ...] = ()


@dataclass(frozen=True)
class ServerSettings:
    """`data` is the folder of jobs and results. Seconds, bytes and counts are the most there may be.

    `keys` are the API keys; without any, everybody may do everything. `jobs_per_key` counts those that wait or run.
    Raises InvalidRequest for times that are none.
    """

    worker: WorkerSettings
    data: Path
    workers: int = 1
    waiting: int = 64
    jobs_per_key: int = 32
    body_bytes: int = 1 << 20
    limits: RequestLimits = field(default_factory=lambda: RequestLimits(steps=200, characters=4000))
    deadline: float | None = None
    retention: float = DAY_SECONDS
    drain: float = 30.0
    keys: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("deadline", "retention", "drain"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InvalidRequest(f"{name}: got {value:g} seconds, expected more than 0")
