"""EasyCache, arXiv 2507.02860: how fast outputs change with samples is taken to stay what it was.

k = |m_i - m_j| / |x_i - x_j| of the last two steps that ran, |.| being the mean of absolute values; a step adds
k |x_t - x_(t-1)| / |m_i|. Published is that output minus input is held; here the output itself is, since what the loop
lets a policy replace is the output, by outputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from benchmarks.rules.steps import OfSamples, SumOfSamples
from foresight.engines.arrays import Array, HostArray
from foresight.runtime.policies import Context, Decider


@dataclass(frozen=True)
class EasyCache(OfSamples):
    """The sum of the changes of the output that are expected, relative to it."""

    name: ClassVar[str] = "easycache"

    def begin(self, context: Context) -> Decider:
        """See Policy.begin."""
        return _Rate(self, context)


class _Rate(SumOfSamples):
    def __init__(self, policy: OfSamples, context: Context) -> None:
        super().__init__(policy, context)
        self._before: HostArray | None = None  # the sample of the step before
        self._ran: HostArray | None = None  # the sample of the last step that ran
        self._rate = math.inf

    def changes(self, step: int) -> float:
        before, self._before = self._before, self.sample
        if before is None or not math.isfinite(self._rate):
            return math.inf
        return self._rate * _size(self.sample - before) / _size(self.outputs[0])

    def see(self, step: int, output: Array) -> None:
        if self._ran is not None:
            self._rate = _size(np.asarray(output) - self.outputs[0]) / _size(self.sample - self._ran)
        self._ran = self.sample
        super().see(step, output)


def _size(values: HostArray) -> float:
    return float(np.abs(values).mean())
