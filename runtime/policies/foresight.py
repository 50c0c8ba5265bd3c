"""Foresight, arXiv 2506.00329: a block is reused where its output hardly changed since it last ran."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ...engines.errors import InvalidRequest, quoted
from ..decisions import Decision, Distance, Measure
from .base import Context, Decider, SearchRange, cache_setting
from .cycle import Cycle

LAMBDA_WEIGHTS = (1.0, 0.1, 0.01)  # of the last three warm-up changes, newest first


@dataclass(frozen=True)
class Foresight(Cycle):
    """A block is reused where its last change is at most `gamma` times what it changed during warm-up.

    arXiv 2506.00329: with MSE_t the change of the block's output from step t - 1 to t and W warm-up steps, the
    threshold is lambda = MSE_{W-1} + MSE_{W-2} / 10 + MSE_{W-3} / 100; a block is reused in an allowed step if its
    last measured change delta <= gamma lambda. `gamma` in (0, 2]: more is faster and less exact. In a batch a block
    is reused only where every prompt would reuse it.
    """

    name: ClassVar[str] = "foresight"
    ladder: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"reuse_steps": 2, "interval": 3})
    gamma: float = field(
        default=0.5,
        metadata={"help": "More is faster and less exact, up to 2.", "search": SearchRange(0.05, 2.0, log=True)},
    )
    cache: str = cache_setting()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.gamma, (int, float)) or not 0 < self.gamma <= 2:
            raise InvalidRequest(f"gamma: got {quoted(self.gamma)}, expected more than 0 and at most 2")

    def begin(self, context: Context) -> Decider:
        """See Policy.begin."""
        return _ByChange(self, context)

    @property
    def title(self) -> str:
        """See Cycle.title."""
        return f"{self.name}, γ = {self.gamma:g}"

    @property
    def reused(self) -> str:
        """See Cycle.reused."""
        return "the blocks whose last change is at most γ λ"


@dataclass
class _Change:
    """One block of one request: delta and lambda per prompt."""

    metric: tuple[float, ...] = ()
    threshold: tuple[float, ...] = ()
    warmup: list[tuple[float, ...]] = field(default_factory=list)


class _ByChange(Decider):
    def __init__(self, policy: Foresight, context: Context) -> None:
        super().__init__(context)
        self._policy = policy
        self._changes = [_Change() for _ in range(context.blocks)]

    def plan(self, step: int) -> list[Decision]:
        allowed = self._policy.allows(step, self.context.steps)
        return [
            Decision.REUSE if allowed and measure is not None and _within(measure) else Decision.COMPUTE
            for measure in self.measures()
        ]

    def observe(self, step: int, distances: Sequence[Distance | None]) -> None:
        last_warmup = self._policy.warmup_steps(self.context.steps) - 1
        for change, distance in zip(self._changes, distances, strict=True):
            if distance is None:
                continue
            change.metric = tuple(distance)
            if step <= last_warmup:
                change.warmup.append(change.metric)
            if step == last_warmup:
                change.threshold = _weighted_sum(change.warmup)
                change.warmup.clear()

    def measures(self) -> list[Measure | None]:
        return [self._worst(change) for change in self._changes]

    def _worst(self, change: _Change) -> Measure | None:
        if not change.metric or not change.threshold:
            return None
        pairs = zip(change.metric, change.threshold, strict=True)
        measures = [Measure(metric, self._policy.gamma * threshold) for metric, threshold in pairs]
        refused = [measure for measure in measures if not _within(measure)]
        return max(refused or measures, key=lambda measure: measure.metric - measure.limit)


def _within(measure: Measure) -> bool:
    """A change that is not finite is never a licence to reuse, nor is a limit that is not."""
    return math.isfinite(measure.limit) and measure.metric <= measure.limit


def _weighted_sum(changes: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    newest_first = list(reversed(changes))[: len(LAMBDA_WEIGHTS)]
    return tuple(
        sum(weight * change for weight, change in zip(LAMBDA_WEIGHTS, prompt, strict=False))
        for prompt in zip(*newest_first, strict=True)
    )
