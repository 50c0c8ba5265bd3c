"""SeaCache, arXiv 2602.18993: samples are compared by what of them is signal, not noise.

Natural videos have a power p that falls with the frequency f, as 1 / f^3 along every axis. With signal a and noise s in
the sample, a + s = 1, a filter of a p / (a^2 p + s^2) along each axis, scaled to a mean of 1, keeps what is video. A
step adds the mean absolute change of the filtered sample since the step before, relative to that one. Published is that
the residual of the block stack is held or extrapolated linearly; here the output is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import reduce
from typing import ClassVar

import numpy as np

from benchmarks.rules.steps import OfSamples, SumOfSamples
from foresight.engines.arrays import HostArray
from foresight.runtime.policies import Context, Decider
from foresight.runtime.sampler import Schedule

POWER = 3.0
CHANNELS = 4  # of all demo models' latents; the other axes are time, height and width
TINY = 1e-6


@dataclass(frozen=True)
class SeaCache(OfSamples):
    """The sum of the relative changes of the filtered sample."""

    name: ClassVar[str] = "seacache"

    def begin(self, context: Context) -> Decider:
        """See Policy.begin."""
        return _Filtered(self, context)


class _Filtered(SumOfSamples):
    def __init__(self, policy: OfSamples, context: Context) -> None:
        super().__init__(policy, context)
        self._noises = noise_shares(context.schedule)
        self._before: HostArray | None = None

    def changes(self, step: int) -> float:
        before, self._before = self._before, filtered(self.sample[0], float(self._noises[step]))
        if before is None:
            return math.inf
        return float(np.abs(self._before - before).mean() / np.abs(before).mean())


def noise_shares(schedule: Schedule) -> HostArray:
    """Of every step s / (a + s), (T,): s is 1 - a where samples are lines from noise to signal, else sqrt(1 - a^2)."""
    signal = np.clip(schedule.signal_scales, TINY, 1.0)
    is_line = np.allclose(schedule.sample_coefficients[:, 0], 1)
    noise = 1 - signal if is_line else np.sqrt(1 - signal**2)
    shares: HostArray = np.clip(noise / (signal + noise), TINY, 1 - TINY)
    return shares


def filtered(sample: HostArray, noise_share: float) -> HostArray:
    """The sample, (latent shape), with those frequencies that are mostly noise taken back."""
    axes = [axis for axis in range(sample.ndim) if axis != sample.shape.index(CHANNELS)]
    signal_share = 1 - noise_share
    gains = []
    for axis in axes:
        power = 1 / (np.abs(np.fft.fftfreq(sample.shape[axis])) ** POWER + 1e-16)
        gain = signal_share * power / (signal_share**2 * power + noise_share**2)
        gains.append(gain.reshape([-1 if other == axis else 1 for other in range(sample.ndim)]))
    gain = reduce(np.multiply, gains)
    kept: HostArray = np.fft.ifftn(np.fft.fftn(sample, axes=axes) * (gain / gain.mean()), axes=axes).real
    return kept
