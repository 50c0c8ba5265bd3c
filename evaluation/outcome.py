"""What a benchmark found: a row a contender, how far the references agree, and who did not run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class Whose(Protocol):
    """Of a contender, what its row repeats."""

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> str: ...

    @property
    def adapted(self) -> str: ...

    @property
    def reference(self) -> str: ...


@dataclass(frozen=True)
class Sample:
    """A contender's video of one pair against its reference's, made in the same round. Identical: `psnr_db` None."""

    psnr_db: float | None
    cpu_ms: float
    wall_ms: float
    reference_cpu_ms: float
    reference_wall_ms: float
    block_work: int = 0
    reference_block_work: int = 0


@dataclass(frozen=True)
class Ratio:
    """A median over pairs, and the outermost."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Ratio:
        """Of one value at least."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class AfterAbort:
    """A request made before and after another one was aborted, with the cache on all the time.

    `repeats` is whether it gave the same bytes as in its round before anything was aborted; `same` whether it did
    afterwards, and `psnr_db` how far off it was, None where its frames are the same.
    """

    repeats: bool
    same: bool
    psnr_db: float | None


@dataclass(frozen=True)
class Row:
    """A contender's results.

    PSNR is against its reference: of the mean squared error of all videos (`psnr_db`), the mean and the worst of those
    that differ; None where all are identical. Times are medians of the loop alone. `block_work_saved` is the share of
    the reference's work that its blocks were spared, None where nothing was counted: what counts here is which blocks
    ran on how much, not what is cached inside of one.
    """

    name: str
    kind: str
    adapted: str
    reference: str
    pairs: int
    identical: int
    psnr_db: float | None
    mean_psnr_db: float | None
    worst_psnr_db: float | None
    cpu_ms: float
    wall_ms: float
    cpu_speedup: Ratio
    wall_speedup: Ratio
    after_abort: AfterAbort | None
    block_work_saved: float | None = None

    @classmethod
    def of(cls, who: Whose, samples: Sequence[Sample], after_abort: AfterAbort | None) -> Row:
        """Of the samples of a contender, of which there is one at least."""
        decibels = [sample.psnr_db for sample in samples]
        different = [decibel for decibel in decibels if decibel is not None]
        return cls(
            name=who.name,
            kind=who.kind,
            adapted=who.adapted,
            reference=who.reference,
            pairs=len(samples),
            identical=decibels.count(None),
            psnr_db=pooled_psnr(decibels),
            mean_psnr_db=statistics.fmean(different) if different else None,
            worst_psnr_db=min(different, default=None),
            cpu_ms=statistics.median(sample.cpu_ms for sample in samples),
            wall_ms=statistics.median(sample.wall_ms for sample in samples),
            cpu_speedup=Ratio.of([sample.reference_cpu_ms / sample.cpu_ms for sample in samples]),
            wall_speedup=Ratio.of([sample.reference_wall_ms / sample.wall_ms for sample in samples]),
            after_abort=after_abort,
            block_work_saved=_saved(samples),
        )


@dataclass(frozen=True)
class Agreement:
    """Two references, which should make the same videos.

    Of their frames the pooled and the worst PSNR, None where all are identical; of their final latents the largest
    difference.
    """

    one: str
    other: str
    identical: int
    psnr_db: float | None
    worst_psnr_db: float | None
    latents_max_abs: float

    @classmethod
    def of(cls, one: str, other: str, found: Sequence[tuple[float | None, float]]) -> Agreement:
        """Of a PSNR, None where identical, and the latents' largest difference, of one video each at least."""
        decibels = [decibel for decibel, _ in found]
        return cls(
            one=one,
            other=other,
            identical=decibels.count(None),
            psnr_db=pooled_psnr(decibels),
            worst_psnr_db=min((decibel for decibel in decibels if decibel is not None), default=None),
            latents_max_abs=max(difference for _, difference in found),
        )


@dataclass(frozen=True)
class Unavailable:
    """A contender that did not run, and why, in one line."""

    name: str
    reason: str


@dataclass(frozen=True)
class Outcome:
    """Everything that was measured."""

    rows: list[Row]
    agreements: list[Agreement]
    unavailable: list[Unavailable]


def _saved(samples: Sequence[Sample]) -> float | None:
    work = sum(sample.block_work for sample in samples)
    whole = sum(sample.reference_block_work for sample in samples)
    return 1 - work / whole if work and whole else None


def pooled_psnr(values: Sequence[float | None]) -> float | None:
    """The PSNR of the mean squared error of videos of one size, by their own; None is an identical one, or all."""
    error = statistics.fmean(0.0 if value is None else 10 ** (-value / 10) for value in values)
    return -10 * math.log10(error) if error else None
