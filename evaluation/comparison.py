"""How much faster a request is with reuse than without: both run in turns, since one pair of runs tells little."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from ..runtime.video import Video
from .quality import psnr, ssim

MOST_PAIRS = 5
ENOUGH_SECONDS = 60.0  # of measuring, after which no further pair begins
LONG_SECONDS = 300.0  # that a pair may take and still have a second one
STEADY = 0.1  # how far pairs may lie apart, as a share of their median, and still agree

Generate = Callable[[], Video]


@dataclass(frozen=True)
class Comparison:
    """A request with reuse and the same without, each run once a pair.

    `speedups` are the ratios of their denoising times, one a pair; `video` and `reference` those of the pair whose
    ratio is `speedup`, the (lower) median. `ceiling` is what the ratio would be if all blocks took the same time and
    nothing else took any: infinite where no block ran. What else a step takes, which only whole forecast steps spare
    too, lowers the ratio and never raises it; what is measured beyond the ceiling is noise.
    """

    video: Video
    reference: Video
    speedups: tuple[float, ...]

    @property
    def speedup(self) -> float:
        """The median ratio."""
        return statistics.median_low(self.speedups)

    @property
    def ceiling(self) -> float:
        """The most that the blocks which did not run can have saved."""
        trace = self.video.trace
        return trace.blocks_possible / trace.blocks_computed if trace.blocks_computed else math.inf

    @property
    def spread(self) -> float:
        """How far the pairs lie apart, as a share of the median; 0 for a single one."""
        return (max(self.speedups) - min(self.speedups)) / self.speedup

    @property
    def noisy(self) -> bool:
        """Whether the times cannot be trusted: pairs disagree, or the median is beyond what can be."""
        return self.spread > 2 * STEADY or self.speedup > (1 + STEADY) * self.ceiling

    @property
    def psnr_db(self) -> float:
        """Against the reference, infinite where they are identical."""
        return psnr(self.video.frames, self.reference.frames)

    @property
    def ssim(self) -> float:
        """Against the reference."""
        return ssim(self.video.frames, self.reference.frames)


def compare_in_turns(
    with_reuse: Generate, without: Generate, clock: Callable[[], float] = time.perf_counter
) -> Comparison:
    """Run both in turns, each first in every other pair, until the pairs agree or time is up; two pairs at least.

    Only where a pair takes over five minutes is one enough. Neither should be the pipeline's first request, which
    pays for what no later one does.
    """
    began = clock()
    pairs: list[tuple[Video, Video]] = []
    speedups: list[float] = []
    while not _is_enough(speedups, clock() - began):
        if len(pairs) % 2:
            video, reference = with_reuse(), without()
        else:
            reference, video = without(), with_reuse()
        pairs.append((video, reference))
        speedups.append(reference.trace.denoise_ms / video.trace.denoise_ms)
    middle = speedups.index(statistics.median_low(speedups))
    return Comparison(*pairs[middle], tuple(speedups))


def _is_enough(speedups: list[float], seconds: float) -> bool:
    if len(speedups) < 2:
        return bool(speedups) and seconds > LONG_SECONDS
    spread = (max(speedups) - min(speedups)) / statistics.median_low(speedups)
    return len(speedups) == MOST_PAIRS or seconds > ENOUGH_SECONDS or spread <= STEADY
