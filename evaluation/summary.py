"""What the rows of a candidate say together."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from .comparison import STEADY
from .evaluate import REFERENCE, Row
from .metrics import PSNR, Metric
from .quality import PEAK

WORST = 3  # videos that are named
RESAMPLED = 8  # chosen on other pairs than any that a result is reported of
OUTER = 4  # one in so many is left out at either end of what is called the middle


@dataclass(frozen=True)
class Numbers:
    """One metric over all videos of a candidate, less those that have none: a PSNR has none where a video is identical.

    None where no video has one.
    """

    mean: float | None
    worst: float | None


@dataclass(frozen=True)
class Speed:
    """Of denoising, against the same request without reuse: the median of `pairs` ratios, and where most of them lie.

    `ceiling` is what the blocks that did not run can have saved at most, None where no block ran. `noisy` says that the
    times cannot be trusted: ratios lie further apart than what was skipped, or the median is beyond what can be.
    """

    median: float
    low: float
    high: float
    pairs: int
    ceiling: float | None
    noisy: bool


@dataclass(frozen=True)
class Summary:
    """A candidate. Shares are 0 to 1.

    `psnr_db` is pooled: that of the mean squared error of all videos, None where all of them are identical. `worst` are
    the few rows with the lowest PSNR, the worst one first. `speed` is None for the reference.
    `foreseen_worst_psnr_db` is what the worst of other videos is not expected to fall below.
    """

    candidate: str
    videos: int
    identical: int
    share_skipped: float
    share_steps_skipped: float
    psnr_db: float | None
    metrics: dict[str, Numbers]
    sets: dict[str, float | None]
    speed: Speed | None
    worst: tuple[Row, ...]
    foreseen_worst_psnr_db: float | None

    def value(self, metric: Metric) -> float | None:
        """What a metric says of all videos: of a set, or the mean; None where it says nothing."""
        return self.sets.get(metric.name) if metric.of_set else self.metrics[metric.name].mean

    @property
    def mean_psnr_db(self) -> float | None:
        """The mean over videos; None where all are identical."""
        return self.metrics[PSNR.name].mean

    @property
    def worst_psnr_db(self) -> float | None:
        """Of the worst video; None where all are identical."""
        return self.metrics[PSNR.name].worst


def summarise(rows: Sequence[Row], metrics: Sequence[Metric], sets: dict[str, float | None] | None = None) -> Summary:
    """Of one candidate's rows, of which there is at least one; `sets` is what `Evaluation.of_sets` found."""
    candidate = rows[0].candidate
    ordered = by_quality(rows)
    is_reference = candidate == REFERENCE
    return Summary(
        candidate=candidate,
        videos=len(rows),
        identical=len(rows) if is_reference else sum(row.metrics[PSNR.name] is None for row in rows),
        share_skipped=statistics.fmean(row.share_skipped for row in rows),
        share_steps_skipped=statistics.fmean(row.share_steps_skipped for row in rows),
        psnr_db=None if is_reference else pooled_psnr(rows),
        metrics={metric.name: _numbers(rows, metric) for metric in metrics if not metric.of_set},
        sets=dict(sets or {}),
        speed=None if is_reference else speed_of(rows),
        worst=() if is_reference else tuple(row for row in ordered[:WORST] if row.metrics[PSNR.name] is not None),
        foreseen_worst_psnr_db=foreseen_worst([row.metrics.get(PSNR.name) for row in rows]),
    )


def foreseen_worst(decibels: Sequence[float | None]) -> float | None:
    """As far below the worst PSNR as that lies below what the worst of one video in `RESAMPLED` is, on average.

    The worst of a few videos says little of the worst of others; how much it falls from small parts of the videos to
    all of them does. The average is that over all parts of that size, so nothing is drawn. None where all videos are
    identical; those that are have no say.
    """
    ordered = sorted(value for value in decibels if value is not None)
    if not ordered:
        return None
    count, size = len(ordered), max(1, round(len(ordered) / RESAMPLED))
    parts = math.comb(count, size)
    # the nth worst is the worst of a part if the others of the part are among those that are better
    usual = sum(value * math.comb(count - place, size - 1) / parts for place, value in enumerate(ordered, 1))
    return 2 * ordered[0] - usual


def by_quality(rows: Sequence[Row]) -> list[Row]:
    """The row with the lowest PSNR first; those of identical videos last."""
    return sorted(rows, key=lambda row: math.inf if (value := row.metrics.get(PSNR.name)) is None else value)


def pooled_psnr(rows: Sequence[Row]) -> float | None:
    """The PSNR of the mean squared error of all videos, which are of one size; None where all are identical."""
    values = (row.metrics[PSNR.name] for row in rows)
    error = statistics.fmean(0.0 if value is None else PEAK**2 * 10 ** (-value / 10) for value in values)
    return 10 * math.log10(PEAK**2 / error) if error else None


def speed_of(rows: Sequence[Row]) -> Speed:
    """How much faster, and whether the times can be trusted.

    What is skipped differs from prompt to prompt, and so does the speed-up: times agree where each video comes equally
    close to its own ceiling.
    """
    median = statistics.median(row.speedup for row in rows)
    low, high = _middle([row.speedup for row in rows])
    ceiling = statistics.median(row.ceiling for row in rows)
    reached = [row.speedup / row.ceiling for row in rows if math.isfinite(row.ceiling)]
    near, far = _middle(reached) if reached else (1.0, 1.0)
    spread = (far - near) / statistics.median(reached) if reached else 0.0
    noisy = spread > 2 * STEADY or median > (1 + STEADY) * ceiling
    return Speed(median, low, high, len(rows), ceiling if math.isfinite(ceiling) else None, noisy)


def _middle(values: Sequence[float]) -> tuple[float, float]:
    """The ends of all but the outer quarters; of three values or fewer, of all."""
    outer = len(values) // OUTER
    kept = sorted(values)[outer : len(values) - outer]
    return kept[0], kept[-1]


def _numbers(rows: Sequence[Row], metric: Metric) -> Numbers:
    values = [value for row in rows if (value := row.metrics.get(metric.name)) is not None]
    if not values:
        return Numbers(None, None)
    return Numbers(statistics.fmean(values), min(values) if metric.more_is_better else max(values))
