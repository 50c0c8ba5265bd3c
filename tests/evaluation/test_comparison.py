"""A speed-up is measured in turns, as often as it takes to tell, and never shown without what bounds it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from foresight.evaluation.comparison import ENOUGH_SECONDS, LONG_SECONDS, MOST_PAIRS, Comparison, compare_in_turns
from foresight.runtime.pipeline import VideoPipeline
from foresight.runtime.policies import NoReuse, Static
from foresight.runtime.video import Video


@pytest.fixture(scope="module")
def made(pipeline: VideoPipeline) -> tuple[Video, Video]:
    """With reuse, half of all block calls skipped or nearly so, and without."""
    return pipeline("a dog", steps=8, policy=Static(warmup=2)), pipeline("a dog", steps=8, policy=NoReuse())


def timed(video: Video, milliseconds: float) -> Video:
    return replace(video, trace=replace(video.trace, denoise_ms=milliseconds))


def measure(
    made: tuple[Video, Video], ratios: list[float], seconds_a_pair: float = 1.0
) -> tuple[Comparison, list[str]]:
    """A comparison of pairs with those ratios, and the order of its runs."""
    order: list[str] = []
    now = [0.0]
    waiting: Iterator[float] = iter(ratios)
    ratio = [0.0]

    def run(which: str) -> Video:
        if len(order) % 2 == 0:
            ratio[0] = next(waiting)
        order.append(which)
        now[0] += seconds_a_pair / 2
        return timed(made[0], 100.0) if which == "with" else timed(made[1], 100.0 * ratio[0])

    return compare_in_turns(lambda: run("with"), lambda: run("without"), clock=lambda: now[0]), order


def test_pairs_that_agree_are_two_and_each_side_begins_one(made: tuple[Video, Video]) -> None:
    comparison, order = measure(made, [1.5, 1.52])
    assert order == ["without", "with", "with", "without"]
    assert comparison.speedups == (1.5, 1.52)
    assert comparison.speedup == 1.5


def test_pairs_that_disagree_are_followed_by_others_but_not_for_ever(made: tuple[Video, Video]) -> None:
    settled, _ = measure(made, [1.0, 1.5, 1.5, 1.5, 1.5])
    assert len(settled.speedups) == MOST_PAIRS
    assert settled.speedup == 1.5
    slow, _ = measure(made, [1.0, 1.5, 1.5], seconds_a_pair=ENOUGH_SECONDS / 1.9)
    assert len(slow.speedups) == 2


def test_a_pair_of_many_minutes_is_enough(made: tuple[Video, Video]) -> None:
    comparison, _ = measure(made, [1.5], seconds_a_pair=LONG_SECONDS + 1)
    assert comparison.speedups == (1.5,)
    assert comparison.spread == 0


def test_the_videos_are_those_of_the_median(made: tuple[Video, Video]) -> None:
    comparison, _ = measure(made, [1.0, 1.9, 1.5, 1.4, 1.6])
    assert comparison.reference.trace.denoise_ms / comparison.video.trace.denoise_ms == comparison.speedup == 1.5


def test_the_ceiling_is_what_the_blocks_that_ran_leave(made: tuple[Video, Video]) -> None:
    trace = made[0].trace
    comparison = Comparison(timed(made[0], 1.0), timed(made[1], 1.2), (1.2,))
    assert (
        comparison.ceiling
        == trace.blocks_possible / trace.blocks_computed
        == pytest.approx(1 / (1 - trace.share_skipped))
    )
    assert not comparison.noisy


@pytest.mark.parametrize("speedups", [(5.13,), (1.0, 1.2, 1.4)])
def test_what_cannot_be_is_called_noise(made: tuple[Video, Video], speedups: tuple[float, ...]) -> None:
    assert Comparison(*made, speedups).noisy


def test_quality_is_that_of_the_frames(made: tuple[Video, Video]) -> None:
    video, reference = made
    assert math.isfinite(Comparison(video, reference, (1.0,)).psnr_db)
    assert Comparison(reference, reference, (1.0,)).psnr_db == math.inf
    assert Comparison(reference, reference, (1.0,)).ssim == 1
    assert not np.array_equal(video.frames, reference.frames)
