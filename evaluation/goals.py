"""What a setting is tuned for: a rule that it has to keep, and what is best among settings that keep it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from ..engines.errors import InvalidRequest, quoted
from .summary import Summary


class Goal(Protocol):
    """A goal; `words` say it to people, `slug` names it."""

    @property
    def words(self) -> str: ...

    @property
    def slug(self) -> str: ...

    @property
    def slack(self) -> float:
        """By how much it may be missed on pairs held out for a profile to be written."""
        ...

    def margin(self, summary: Summary) -> float:
        """By how much it is kept; below 0 it is not."""
        ...

    def foreseen(self, summary: Summary) -> float:
        """The margin that other videos are expected to have at least: settings are chosen by it."""
        ...

    def gain(self, summary: Summary) -> float:
        """How good a setting is that keeps it; 0 or more."""
        ...


def score(goal: Goal, summary: Summary) -> float:
    """What a search makes as large as it can: the gain, or how far the goal was missed, below 0."""
    margin = goal.foreseen(summary)
    return goal.gain(summary) if margin >= 0 else margin


@dataclass(frozen=True)
class Quality:
    """The worst video has a PSNR of `decibels` or more; the most block calls are skipped."""

    decibels: float

    def __post_init__(self) -> None:
        if not 0 < self.decibels < math.inf:
            raise InvalidRequest(f"psnr: got {quoted(self.decibels)}, expected a number of dB above 0, such as 40")

    @property
    def words(self) -> str:
        """See Goal."""
        return f"worst PSNR of {self.decibels:g} dB or more"

    @property
    def slug(self) -> str:
        """See Goal."""
        return f"psnr-{self.decibels:g}"

    @property
    def slack(self) -> float:
        """See Goal."""
        return 1.0

    def margin(self, summary: Summary) -> float:
        """See Goal."""
        return _worst(summary) - self.decibels

    def foreseen(self, summary: Summary) -> float:
        """See Goal."""
        return _or_identical(summary.foreseen_worst_psnr_db) - self.decibels

    def gain(self, summary: Summary) -> float:
        """See Goal."""
        return summary.share_skipped


@dataclass(frozen=True)
class Speedup:
    """Denoising is `times` as fast or faster; the worst video has the highest PSNR."""

    times: float

    def __post_init__(self) -> None:
        if not 1 < self.times < math.inf:
            raise InvalidRequest(f"speedup: got {quoted(self.times)}, expected a number above 1, such as 1.8")

    @property
    def words(self) -> str:
        """See Goal."""
        return f"{self.times:g} times as fast or faster"

    @property
    def slug(self) -> str:
        """See Goal."""
        return f"speedup-{self.times:g}"

    @property
    def slack(self) -> float:
        """See Goal."""
        return 0.05 * self.times

    def margin(self, summary: Summary) -> float:
        """See Goal."""
        assert summary.speed is not None
        return summary.speed.median - self.times

    def foreseen(self, summary: Summary) -> float:
        """See Goal. Of the middle half of videos the slowest one."""
        assert summary.speed is not None
        return summary.speed.low - self.times

    def gain(self, summary: Summary) -> float:
        """See Goal."""
        return _worst(summary)


def _worst(summary: Summary) -> float:
    return _or_identical(summary.worst_psnr_db)


def _or_identical(psnr_db: float | None) -> float:
    """Of identical videos a PSNR that is beyond what any others have."""
    return 200.0 if psnr_db is None else psnr_db
