"""What rules that spare whole steps share: warm-up, the value that stands in for a step, and a view of the sample.

They differ in `changes`: what a step adds to a sum, which is begun anew by every step that runs. While the sum stays
below the threshold, steps are skipped. Thresholds are all that is tuned; how many steps in a row may be skipped is not
limited, and the warm-up is that of `forecast`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from foresight.engines.arrays import Array, HostArray
from foresight.runtime.policies import Context, Decider, Policy
from foresight.runtime.policies.extrapolation import KEPT, extrapolation
from foresight.runtime.policies.forecast import WARMUP_SHARE


@dataclass(frozen=True)
class WholeSteps(Policy):
    """A policy that runs steps whole or not at all."""

    outputs: ClassVar[int] = KEPT

    def reusable(self, kinds: Sequence[str]) -> tuple[bool, ...]:
        """See Policy.reusable."""
        return (False,) * len(kinds)

    def warmup_steps(self, steps: int) -> int:
        """See Policy.warmup_steps."""
        return math.ceil(WARMUP_SHARE * steps)

    def describe(self, steps: int) -> str:
        """See Policy.describe."""
        return self.name


@dataclass(frozen=True)
class Accumulating(WholeSteps):
    """Steps are skipped while a sum stays below `threshold`; see `Sum`. `extrapolates`: what stands in for them."""

    threshold: float
    extrapolates: bool


@dataclass(frozen=True)
class OfSamples(Accumulating):
    """One whose rule looks at the samples, and so has to know the `noise` that they begin with, (latent shape)."""

    noise: HostArray = field(repr=False)


class Sum(Decider):
    """Adds up what a rule says of every step."""

    def __init__(self, policy: Accumulating, context: Context) -> None:
        super().__init__(context)
        self.policy = policy
        self.times = [float(time) for time in context.timesteps]
        self.computed: list[int] = []  # the last steps that ran, newest first
        self.outputs: list[HostArray] = []  # theirs
        self._sum = 0.0

    def changes(self, step: int) -> float:
        """What the step adds; asked for every step, before it runs or is skipped. Infinite: it has to run."""
        raise NotImplementedError

    def forecast(self, step: int) -> Sequence[float] | None:
        self._sum += self.changes(step)
        weights = stand_in(self.computed, step, self.times, self.policy.extrapolates)
        steps = self.context.steps
        if weights is None or not self.policy.warmup_steps(steps) <= step < steps - 1 or not self.is_small():
            return None
        self.skipped(step, np.tensordot(np.array(weights, np.float32), np.stack(self.outputs[: len(weights)]), axes=1))
        return weights

    def is_small(self) -> bool:
        """Whether the sum allows another step to be skipped."""
        return self._sum < self.policy.threshold

    def skipped(self, step: int, output: HostArray) -> None:
        """The step is skipped, and this stands in for its output."""

    def see(self, step: int, output: Array) -> None:
        self._sum = 0.0
        self.computed = [step, *self.computed][:KEPT]
        self.outputs = [np.asarray(output), *self.outputs][:KEPT]


class SumOfSamples(Sum):
    """One that follows the samples: it steps a sampler of its own with the outputs that it sees or has stand in."""

    def __init__(self, policy: OfSamples, context: Context) -> None:
        super().__init__(policy, context)
        self._sampler = context.schedule.begin(policy.noise[None], lambda: np.zeros_like(policy.noise[None]))

    @property
    def sample(self) -> HostArray:
        """What the step that is asked for begins with, (1, latent shape)."""
        return np.asarray(self._sampler.latents)

    def skipped(self, step: int, output: HostArray) -> None:
        self._sampler.advance(step, output)

    def see(self, step: int, output: Array) -> None:
        super().see(step, output)
        self._sampler.advance(step, self.outputs[0])


def stand_in(computed: Sequence[int], step: int, times: Sequence[float], extrapolates: bool) -> Sequence[float] | None:
    """The weights of the last computed outputs, newest first; None where there are too few."""
    if not extrapolates:
        return (1.0,) if computed else None
    return extrapolation([times[one] for one in computed], times[step])
