"""What policies gain over `foresight`, from the rows of benchmarks/forecast_quality.py: computed, not measured.

A setting is chosen on the tuning half alone, between measured settings and never in between: at the quality of N1R2
the one that skips most of those that are at least as good in pooled, mean and worst PSNR; at the share of N2R3 the one
that skips least of those that skip at least as much. What it does is read off the held-out half.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.halves import HELD_OUT, TUNING

QUALITY, SHARE = "foresight N1R2", "foresight N2R3"
MEASURES = ("pooled_psnr_db", "mean_psnr_db", "worst_psnr_db")
TIMES, DECIBELS = 1.5, 8.0  # the goals: of the share skipped, and in mean and worst

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Gain:
    """A setting on the held-out half beside a setting of foresight: differences in dB are its own less the other's."""

    setting: str
    skipped_percent: float
    of_percent: float
    pooled_db: float
    mean_db: float
    worst_db: float

    @property
    def times(self) -> float:
        """How many times the share."""
        return self.skipped_percent / self.of_percent

    @property
    def keeps_quality(self) -> bool:
        """Whether it is at least as good in all three."""
        return min(self.pooled_db, self.mean_db, self.worst_db) >= 0

    @property
    def skips_more(self) -> bool:
        """Whether it reaches the goal at equal quality."""
        return self.keeps_quality and self.times >= TIMES

    @property
    def is_closer(self) -> bool:
        """Whether it reaches the goal at an equal share."""
        return self.times >= 1 and min(self.mean_db, self.worst_db) >= DECIBELS


def at_quality(condition: Mapping[str, Any], policy: str) -> Gain | None:
    """At the quality of N1R2; None where no setting of the policy keeps it on the tuning half."""
    tuning = _by_name(condition[TUNING])
    fitting = [row for row in _settings(condition, policy) if _is_as_good(tuning[row["setting"]], tuning[QUALITY])]
    if not fitting:
        return None
    chosen = max(fitting, key=lambda row: _share(tuning[row["setting"]]))
    return _gain(chosen, _by_name(condition[HELD_OUT])[QUALITY])


def at_share(condition: Mapping[str, Any], policy: str) -> Gain | None:
    """At the share of N2R3; None where no setting of the policy skips as much on the tuning half."""
    tuning = _by_name(condition[TUNING])
    wanted = _share(tuning[SHARE])
    fitting = [row for row in _settings(condition, policy) if _share(tuning[row["setting"]]) >= wanted]
    if not fitting:
        return None
    chosen = min(fitting, key=lambda row: _share(tuning[row["setting"]]))
    return _gain(chosen, _by_name(condition[HELD_OUT])[SHARE])


def _settings(condition: Mapping[str, Any], policy: str) -> list[Row]:
    return [row for row in condition[HELD_OUT] if row["setting"].partition(" ")[0] == policy]


def _by_name(rows: Sequence[Row]) -> dict[str, Row]:
    return {row["setting"]: row for row in rows}


def _share(row: Row) -> float:
    return float(row["skipped_percent"])


def _is_as_good(row: Row, other: Row) -> bool:
    return all(row[measure] >= other[measure] for measure in MEASURES)


def _gain(row: Row, other: Row) -> Gain:
    differences = [round(row[measure] - other[measure], 1) for measure in MEASURES]
    return Gain(row["setting"], _share(row), _share(other), *differences)
