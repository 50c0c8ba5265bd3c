"""What rows say together: pooled, mean and worst; and which times can be trusted."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foresight.evaluation.evaluate import REFERENCE, Evaluation, Pair, Row, candidates_of
from foresight.evaluation.metrics import METRICS, PSNR, load_metrics
from foresight.evaluation.quality import psnr
from foresight.evaluation.results import results_of
from foresight.evaluation.summary import (
    RESAMPLED,
    Numbers,
    by_quality,
    foreseen_worst,
    pooled_psnr,
    speed_of,
    summarise,
)
from foresight.runtime.pipeline import VideoPipeline
from foresight.runtime.policies import Static
from foresight.runtime.request import VideoRequest

BOTH = [PSNR, METRICS["ssim"]]


def row(seed: int = 0, psnr: float | None = 40.0, speedup: float = 2.0, ran: int = 10, ssim: float = 0.9) -> Row:
    """Of 20 block calls in 4 steps."""
    return Row("static", "a dog", seed, ran, 20, 4, 1, 100.0, 100.0 * speedup, metrics={"psnr": psnr, "ssim": ssim})


def test_pooled_psnr_is_that_of_all_frames_together() -> None:
    generator = np.random.default_rng(0)
    frames = generator.integers(0, 256, (3, 2, 8, 8, 3), dtype=np.uint8)
    reference = np.stack([frames[0], frames[1] ^ 1, frames[2] ^ 12])
    values = [psnr(video, other) for video, other in zip(frames, reference, strict=True)]
    rows = [row(psnr=value if math.isfinite(value) else None) for value in values]
    assert values[0] == math.inf
    assert pooled_psnr(rows) == pytest.approx(psnr(frames.reshape(-1, 8, 8, 3), reference.reshape(-1, 8, 8, 3)))


def test_a_summary_has_mean_and_worst() -> None:
    rows = [row(0, 50.0, ssim=0.99), row(1, 30.0, ran=20, ssim=0.7), row(2, None, ssim=1.0)]
    summary = summarise(rows, BOTH, {"fvd": 3.0})
    assert summary.metrics["psnr"] == Numbers(40.0, 30.0)
    assert summary.metrics["ssim"] == Numbers(pytest.approx((0.99 + 0.7 + 1) / 3), 0.7)  # type: ignore[arg-type]
    assert (summary.videos, summary.identical, summary.worst_psnr_db) == (3, 1, 30.0)
    assert summary.share_skipped == pytest.approx((0.5 + 0 + 0.5) / 3)
    assert summary.share_steps_skipped == 0.25
    assert [worst.seed for worst in summary.worst] == [1, 0]
    assert summary.sets == {"fvd": 3.0}


def test_the_worst_of_what_should_be_small_is_the_largest() -> None:
    rows = [replace(row(seed), metrics={"psnr": 40.0, "far": float(seed)}) for seed in range(3)]
    metric = replace(METRICS["ssim"], name="far", more_is_better=False)
    assert summarise(rows, [PSNR, metric]).metrics["far"] == Numbers(1.0, 2.0)


def test_where_all_are_identical_nothing_is_worst() -> None:
    summary = summarise([row(psnr=None), row(1, None)], BOTH)
    assert (summary.psnr_db, summary.worst_psnr_db, summary.identical, summary.worst) == (None, None, 2, ())


def test_a_reference_has_no_speed_and_no_quality() -> None:
    summary = summarise([replace(row(ran=20), candidate=REFERENCE, metrics={})], BOTH)
    assert summary.speed is None and summary.psnr_db is None and summary.metrics["psnr"] == Numbers(None, None)


def test_identical_videos_come_last() -> None:
    rows = [row(0, None), row(1, 40.0), row(2, 30.0)]
    assert [found.seed for found in by_quality(rows)] == [2, 1, 0]


def test_speed_is_the_median_with_its_middle_half() -> None:
    ratios = [1.0, 1.49, 1.5, 1.51, 1.52, 1.53, 1.54, 9.0]
    speed = speed_of([row(speedup=ratio) for ratio in ratios])
    assert speed.median == pytest.approx(1.515)
    assert (speed.low, speed.high, speed.pairs) == (1.5, 1.53, 8)
    assert speed.ceiling == 2 and not speed.noisy


def test_ratios_that_differ_as_what_was_skipped_does_are_no_noise() -> None:
    assert not speed_of([row(speedup=1.9), row(speedup=3.8, ran=5)]).noisy


@pytest.mark.parametrize("ratios", [(2.3,), (1.0, 1.3, 1.6)])
def test_what_cannot_be_is_called_noise(ratios: tuple[float, ...]) -> None:
    assert speed_of([row(speedup=ratio) for ratio in ratios]).noisy


def test_where_no_block_ran_there_is_no_ceiling() -> None:
    speed = speed_of([row(ran=0, speedup=30.0)])
    assert speed.ceiling is None and not speed.noisy


def test_results_are_one_document(pipeline: VideoPipeline) -> None:
    pairs = [Pair("a dog", 0), Pair("a dog", 1)]
    job = Evaluation(
        pipeline, VideoRequest("", steps=3), candidates_of([Static(warmup=2)]), pairs, load_metrics(BOTH), {}
    )
    rows = list(job.run())
    document = json.loads(json.dumps(results_of(job, rows, ["said before"]).to_dict(), allow_nan=False))
    (policy,) = document["policies"]
    assert policy["settings"] == {"name": "static", "reuse_steps": 1, "interval": 2, "warmup": 2, "cache": "output"}
    assert policy["metrics"].keys() == {"psnr", "ssim"}
    assert (document["prompts"], document["seeds"], document["steps"]) == (["a dog"], 2, 3)
    assert document["reference"]["candidate"] == REFERENCE
    assert len(document["rows"]) == 4
    assert document["notes"][0] == "said before"
    assert document["notes"][1].startswith("prompts: 2 videos of a single prompt tell little")


def test_prompts_that_were_cut_are_counted(pipeline: VideoPipeline) -> None:
    pairs = [Pair("a dog " * 200, 0), Pair("a dog", 1)]
    job = Evaluation(
        pipeline, VideoRequest("", steps=3), candidates_of([Static(warmup=2)]), pairs, load_metrics([PSNR]), {}
    )
    notes = results_of(job, list(job.run())).notes
    assert "prompts: 1 of 2 were longer than the text encoder takes, and were cut" in notes


def worst_of_parts(values: list[float]) -> float:
    """The mean over every part of its size, one by one."""
    parts = list(combinations(values, max(1, round(len(values) / RESAMPLED))))
    return sum(map(min, parts)) / len(parts)


@given(st.lists(st.floats(20, 80), min_size=1, max_size=18))
def test_the_worst_is_foreseen_to_fall_as_far_again_as_from_small_parts_to_all(values: list[float]) -> None:
    expected = min(values) - (worst_of_parts(values) - min(values))
    assert foreseen_worst([*values, None]) == pytest.approx(expected)


def test_nothing_is_foreseen_of_identical_videos() -> None:
    assert foreseen_worst([None, None]) is None
    assert summarise([row(psnr=40.0), row(1, 44.0), row(2, None)], BOTH).foreseen_worst_psnr_db == 38.0


def test_one_outlier_lowers_what_is_foreseen() -> None:
    steady, single = [45.0 + place for place in range(16)], [35.0, *(46.0 + place for place in range(15))]
    assert foreseen_worst(single) < foreseen_worst(steady) - 10  # type: ignore[operator]
