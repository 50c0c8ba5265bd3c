"""MagCache, arXiv 2506.09045: how the size of what the model adds changes from step to step is alike for all prompts.

The ratios of sizes are measured beforehand. Since the last step that ran their product is how much the size has changed
since; a step adds how far that is from 1. Published is the ratio of the block stack's residuals; here it is that of the
outputs, root mean squares, which is what the loop shows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from benchmarks.rules.steps import Accumulating, Sum
from foresight.engines.arrays import Array
from foresight.runtime.policies import Context, Decider
from foresight.runtime.policies.base import Calibration


@dataclass(frozen=True)
class MagCache(Accumulating):
    """`ratios` has one number a step: the size of its output over that of the step before."""

    ratios: tuple[float, ...]
    name: ClassVar[str] = "magcache"

    def begin(self, context: Context) -> Decider:
        """See Policy.begin."""
        return _Magnitudes(self, context)


class _Magnitudes(Sum):
    def __init__(self, policy: MagCache, context: Context) -> None:
        super().__init__(policy, context)
        self._ratios = policy.ratios
        self._product = 1.0

    def changes(self, step: int) -> float:
        self._product *= self._ratios[step]
        return abs(1 - self._product)

    def see(self, step: int, output: Array) -> None:
        super().see(step, output)
        self._product = 1.0


def ratios_of(calibration: Calibration) -> tuple[float, ...]:
    """The means over the recorded requests."""
    sizes = np.sqrt(np.diagonal(calibration.products, axis1=1, axis2=2))
    return 1.0, *map(float, (sizes[:, 1:] / sizes[:, :-1]).mean(axis=0))
