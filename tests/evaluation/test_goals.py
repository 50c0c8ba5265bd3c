"""Goals: what keeps them, and what is better."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from foresight.engines.errors import InvalidRequest
from foresight.evaluation.goals import Goal, Quality, Speedup, score
from tests.evaluation.summaries import summary


def test_quality_is_that_of_the_worst_video() -> None:
    goal = Quality(40)
    assert goal.margin(summary(worst=41.5)) == 1.5
    assert goal.margin(summary(worst=39.0)) == -1.0
    assert goal.margin(summary(worst=None)) > 0


def test_of_two_that_keep_the_quality_the_one_that_skips_more_is_better() -> None:
    assert score(Quality(40), summary(worst=40, skipped=0.5)) > score(Quality(40), summary(worst=60, skipped=0.25))


def test_speed_is_the_median_of_denoising() -> None:
    assert Speedup(1.5).margin(summary(speedup=1.75)) == 0.25
    assert Speedup(1.5).margin(summary(speedup=1.25)) == -0.25


def test_of_two_that_are_fast_enough_the_one_with_the_better_worst_video_is_better() -> None:
    goal = Speedup(1.5)
    assert score(goal, summary(worst=50, speedup=1.5)) > score(goal, summary(worst=40, speedup=2.5))
    assert score(goal, summary(worst=None, speedup=1.5)) > score(goal, summary(worst=90, speedup=1.5))


@pytest.mark.parametrize("goal", [Quality(40), Speedup(1.5)])
def test_whatever_keeps_a_goal_is_better_than_whatever_does_not(goal: Goal) -> None:
    keeps, misses = summary(worst=40, skipped=0.0, speedup=1.5), summary(worst=39.9, skipped=1.0, speedup=1.4)
    assert score(goal, keeps) >= 0 > score(goal, misses)
    assert score(goal, misses) > score(goal, summary(worst=20, skipped=1.0, speedup=1.0))


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
@pytest.mark.parametrize(("kind", "name"), [(Quality, "psnr"), (Speedup, "speedup")])
def test_goals_that_nothing_can_keep_are_refused(kind: Callable[[float], Goal], name: str, value: float) -> None:
    with pytest.raises(InvalidRequest, match=f"{name}: got {value}, expected a number"):
        kind(value)


def test_goals_tell_what_they_are() -> None:
    assert (Quality(40).words, Quality(40).slug) == ("worst PSNR of 40 dB or more", "psnr-40")
    assert (Speedup(1.8).words, Speedup(1.8).slug) == ("1.8 times as fast or faster", "speedup-1.8")
