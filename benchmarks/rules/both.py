"""Whole steps by `forecast`, and in the steps that run, blocks by `foresight`, whose cycle counts these steps alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from foresight.runtime.policies import Context, Decider, Decision, Distance, Forecast, Foresight, Measure, Policy


@dataclass(frozen=True)
class Both(Policy):
    """Whole steps by forecast; blocks of the steps that run by foresight."""

    steps: Forecast
    blocks: Foresight
    name: ClassVar[str] = "both"
    outputs: ClassVar[int] = Forecast.outputs

    @property
    def cache(self) -> str:
        """See Policy.cache."""
        return self.blocks.cache

    def begin(self, context: Context) -> Decider:
        """See Policy.begin."""
        return _Both(self, context)


class _Both(Decider):
    def __init__(self, policy: Both, context: Context) -> None:
        super().__init__(context)
        self._steps = policy.steps.begin(context)
        self._blocks = policy.blocks.begin(context)
        self._places: dict[int, int] = {}  # of the steps that ran, among them

    def forecast(self, step: int) -> Sequence[float] | None:
        return self._steps.forecast(step)

    def estimate(self) -> Measure | None:
        return self._steps.estimate()

    def expected(self, step: int) -> Sequence[float] | None:
        return self._steps.expected(step)

    def observe_output(self, step: int, errors: Distance) -> None:
        self._steps.observe_output(step, errors)

    def plan(self, step: int) -> list[Decision]:
        self._places[step] = len(self._places)
        return super().plan(step) if step == self.context.steps - 1 else self._blocks.plan(self._places[step])

    def observe(self, step: int, distances: Sequence[Distance | None]) -> None:
        self._blocks.observe(self._places[step], distances)

    def measures(self) -> list[Measure | None]:
        return self._blocks.measures()
