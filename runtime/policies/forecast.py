"""Forecast: whole steps whose model output can be foretold from those before are not run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from ...engines.errors import InvalidRequest, quoted
from ...engines.wording import plural
from ..decisions import Distance, Measure
from .base import Context, Decider, Policy, SearchRange
from .extrapolation import KEPT, extrapolation

WARMUP_SHARE = 0.2  # of all steps


@dataclass(frozen=True)
class Forecast(Policy):
    """A step is forecast while what that is expected to cost stays within `tolerance`.

    The model's output m is forecast from the last three that were computed, m0, m1, m2 at the timesteps u0, u1, u2, by
    Newton's divided differences f01 and f012, half of the second order: m0 + (u - u0) f01 + (u - u0)(u - u1) f012 / 2.
    Where a step is computed, how far its forecast would have been off is known: r, root mean square. A forecast that
    far away in time, compared with the gap H that r was measured over, is expected to cost
    e = w r |u - u0| / H, with w what an error of that step's output does to the last sample
    (`Schedule.sensitivities`). As long as the sum E of all e since the last computed step is at most `tolerance`, no
    engine runs. The first `warmup` steps (None: 20 % of all) and the last one are computed. In a batch the worst
    prompt decides. Cached are three arrays of the latents' size, and no block.
    """

    name: ClassVar[str] = "forecast"
    outputs: ClassVar[int] = KEPT
    ladder: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"tolerance": 0.003},
        {},
        {"tolerance": 0.01},
        {"tolerance": 0.02},
    )
    tolerance: float = field(
        default=0.005, metadata={"help": "More is faster and less exact.", "search": SearchRange(0.0005, 0.1, log=True)}
    )
    warmup: int | None = field(
        default=None,
        metadata={
            "help": "Steps before any reuse.",
            "default": f"{100 * WARMUP_SHARE:.0f} % of all",
            "search": SearchRange(WARMUP_SHARE, 0.4, of_steps=True),  # a shorter one made videos fall far
        },
    )

    def __post_init__(self) -> None:
        if not isinstance(self.tolerance, (int, float)) or not 0 < self.tolerance < math.inf:
            raise InvalidRequest(f"tolerance: got {quoted(self.tolerance)}, expected a number above 0")
        if self.warmup is not None and not (isinstance(self.warmup, int) and self.warmup >= 1):
            raise InvalidRequest(f"warmup: got {quoted(self.warmup)}, expected a whole number of 1 or more")

    def reusable(self, kinds: Sequence[str]) -> tuple[bool, ...]:
        """See Policy.reusable."""
        return (False,) * len(kinds)

    def warmup_steps(self, steps: int) -> int:
        """See Policy.warmup_steps."""
        return self.warmup if self.warmup is not None else math.ceil(WARMUP_SHARE * steps)

    def spelled_out(self, steps: int) -> Forecast:
        """See Policy.spelled_out."""
        return replace(self, warmup=self.warmup_steps(steps))

    def begin(self, context: Context) -> Decider:
        """See Policy.begin. Raises InvalidRequest where a sampler does not tell how much signal its samples hold."""
        if not all(map(math.isfinite, context.signal_scales)):
            raise InvalidRequest(
                f"policy: got {self.name} for a sampler that does not tell how much signal its samples hold, expected "
                "another; choose one that reuses blocks"
            )
        return _Forecaster(self, context)

    def describe(self, steps: int) -> str:
        """See Policy.describe."""
        return (
            f"{self.name}: after {plural(self.warmup_steps(steps), 'warm-up step')}, a step is forecast while its "
            f"expected cost stays within {self.tolerance:g}; the last three model outputs are cached"
        )


class _Forecaster(Decider):
    def __init__(self, policy: Forecast, context: Context) -> None:
        super().__init__(context)
        self._policy = policy
        self._times = [float(time) for time in context.timesteps]
        self._sensitivities = [float(number) for number in context.sensitivities()]
        self._computed: list[int] = []  # the last three steps, newest first
        self._error = math.inf  # r over H
        self._spent = 0.0  # E
        self._estimate: Measure | None = None

    def forecast(self, step: int) -> Sequence[float] | None:
        self._estimate = None
        weights = self._weights(step)
        last = step == self.context.steps - 1
        if weights is None or last or step < self._policy.warmup_steps(self.context.steps):
            return None
        gap = abs(self._times[step] - self._times[self._computed[0]])
        cost = self._spent + self._sensitivities[step] * self._error * gap
        self._estimate = Measure(cost, self._policy.tolerance)
        if not cost <= self._policy.tolerance:
            return None
        self._spent = cost
        return weights

    def estimate(self) -> Measure | None:
        return self._estimate

    def expected(self, step: int) -> Sequence[float] | None:
        weights = self._weights(step)
        self._gap = abs(self._times[step] - self._times[self._computed[0]]) if self._computed else 0.0
        self._computed = [step, *self._computed][: self._policy.outputs]
        self._spent, self._error = 0.0, math.inf
        return weights

    def observe_output(self, step: int, errors: Distance) -> None:
        worst = max(error if math.isfinite(error) else math.inf for error in errors)
        self._error = worst / self._gap

    def _weights(self, step: int) -> tuple[float, ...] | None:
        """Of the last three computed outputs, newest first; None where there are fewer, or two at one timestep."""
        return extrapolation([self._times[computed] for computed in self._computed], self._times[step])
