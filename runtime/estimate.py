"""What a request is expected to take: memory by its plan, time by how long those before it took."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from .policies import policy_settings
from .request import CheckedRequest
from .trace import Trace

NEWEST_SHARE = 0.5  # of the newest request in what is held of its kind
MOST_KINDS = 256  # of requests that are told apart


@dataclass(frozen=True)
class Estimate:
    """Of a request that was checked, and did not run.

    `bytes` is what it takes of the device's memory beside what is loaded, as far as it is planned. `seconds` is how
    long it takes once it has its turn, at the pace of the pipeline's requests so far; None before the first. Where none
    was of that policy and number of steps, nothing is taken to be skipped.
    """

    bytes: int
    seconds: float | None


class Pace:
    """How fast a pipeline's requests were lately. Thread-safe; the requests themselves look at none of it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._text = self._block = self._decode = 0.0  # seconds of: a request, a block on one row, a video
        self._seen = False
        self._shares: dict[str, float] = {}  # of block calls that run, by policy and steps; the oldest kind goes first

    def record(self, request: CheckedRequest, trace: Trace) -> None:
        """A request has finished."""
        if not trace.blocks_computed:
            return
        kind, share = _kind(request), 1 - trace.share_skipped
        with self._lock:
            new = NEWEST_SHARE if self._seen else 1.0
            block = trace.denoise_ms / 1e3 / trace.blocks_computed / request.rows
            self._text += new * (trace.text_ms / 1e3 - self._text)
            self._block += new * (block - self._block)
            self._decode += new * (trace.decode_ms / 1e3 / len(request.prompts) - self._decode)
            self._seen = True
            before = self._shares.pop(kind, share)
            self._shares[kind] = before + NEWEST_SHARE * (share - before)
            if len(self._shares) > MOST_KINDS:
                del self._shares[next(iter(self._shares))]

    def seconds(self, batches: Sequence[CheckedRequest], blocks: int) -> float | None:
        """How long a request on a model of that many blocks is expected to take; None where none has finished."""
        with self._lock:
            return sum(self._seconds(batch, blocks) for batch in batches) if self._seen else None

    def _seconds(self, batch: CheckedRequest, blocks: int) -> float:
        calls = batch.schedule.steps * blocks * self._shares.get(_kind(batch), 1.0)
        return self._text + calls * batch.rows * self._block + len(batch.prompts) * self._decode


def _kind(request: CheckedRequest) -> str:
    return json.dumps([policy_settings(request.policy), request.schedule.steps], sort_keys=True, default=str)
