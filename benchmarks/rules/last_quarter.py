"""Skipped steps run the last quarter of the blocks, on what the block before it last put out.

Once on the fixed beat of a cycle, and once in the steps that `forecast` would have foretold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from foresight.runtime.policies import Context, Cycle, Decider, Decision, Distance, Forecast, Measure, Policy


def _held(blocks: int) -> int:
    """The block whose output is held: all after it make up the last quarter, rounded up."""
    return blocks - -(-blocks // 4) - 1


def _partial(blocks: int) -> list[Decision]:
    """The blocks before the held one are dead, which the cache finds out."""
    return [Decision.REUSE if block == _held(blocks) else Decision.COMPUTE for block in range(blocks)]


@dataclass(frozen=True)
class LastQuarter(Cycle):
    """In every step that the cycle allows."""

    name: ClassVar[str] = "last quarter"

    def reusable(self, kinds: Sequence[str]) -> tuple[bool, ...]:
        """See Policy.reusable."""
        return tuple(block == _held(len(kinds)) for block in range(len(kinds)))

    def begin(self, context: Context) -> Decider:
        """See Policy.begin."""
        return _OnBeat(self, context)


class _OnBeat(Decider):
    def __init__(self, policy: LastQuarter, context: Context) -> None:
        super().__init__(context)
        self._policy = policy

    def plan(self, step: int) -> list[Decision]:
        allowed = self._policy.allows(step, self.context.steps)
        return _partial(self.context.blocks) if allowed else super().plan(step)


@dataclass(frozen=True)
class LastQuarterForecast(Policy):
    """In every step that `steps` would forecast; the steps that run whole are all it knows of."""

    steps: Forecast
    name: ClassVar[str] = "last quarter by forecast"
    outputs: ClassVar[int] = 64  # the loop keeps those of partial steps, too

    def reusable(self, kinds: Sequence[str]) -> tuple[bool, ...]:
        """See Policy.reusable."""
        return tuple(block == _held(len(kinds)) for block in range(len(kinds)))

    def warmup_steps(self, steps: int) -> int:
        """See Policy.warmup_steps."""
        return self.steps.warmup_steps(steps)

    def begin(self, context: Context) -> Decider:
        """See Policy.begin."""
        return _ByForecast(self, context)

    def describe(self, steps: int) -> str:
        """See Policy.describe."""
        return self.name


class _ByForecast(Decider):
    def __init__(self, policy: LastQuarterForecast, context: Context) -> None:
        super().__init__(context)
        self._steps = policy.steps.begin(context)
        self._is_partial = False
        self._partials: list[bool] = []  # of the outputs that are kept, newest first

    def forecast(self, step: int) -> Sequence[float] | None:
        self._is_partial = self._steps.forecast(step) is not None
        return None

    def plan(self, step: int) -> list[Decision]:
        return _partial(self.context.blocks) if self._is_partial else super().plan(step)

    def expected(self, step: int) -> Sequence[float] | None:
        kept = self._partials
        self._partials = [self._is_partial, *kept]
        weights = None if self._is_partial else self._steps.expected(step)
        if weights is None:
            return None
        left = iter(weights)
        spread = [0.0 if partial else next(left, 0.0) for partial in kept]
        return spread[: 1 + max(place for place, weight in enumerate(spread) if weight)]

    def observe_output(self, step: int, errors: Distance) -> None:
        self._steps.observe_output(step, errors)

    def estimate(self) -> Measure | None:
        return self._steps.estimate()
