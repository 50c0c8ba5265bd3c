"""Policies judged on prompts and seeds: what is made, what is kept, and what is not made twice."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from foresight.engines.arrays import HostArray
from foresight.engines.errors import Cancelled, InvalidRequest
from foresight.engines.progress import Progress
from foresight.evaluation.evaluate import (
    REFERENCE,
    Candidate,
    Evaluation,
    Pair,
    Row,
    VideoKey,
    candidates_of,
    ladder,
    pairs_of,
)
from foresight.evaluation.metrics import METRICS, PSNR, Metric, find_metrics, load_metrics
from foresight.evaluation.quality import psnr, ssim
from foresight.runtime.pipeline import VideoPipeline
from foresight.runtime.policies import POLICIES, Forecast, Foresight, NoReuse, Policy, Static
from foresight.runtime.policies.notation import text_of
from foresight.runtime.request import VideoRequest

STEPS = 4
PAIRS = [Pair("a dog", 0), Pair("a red circle", 1)]
POLICIES_TRIED = (Static(warmup=2), Foresight(gamma=2.0, warmup=2))


class Videos(dict[VideoKey, HostArray]):
    """Remembers in which order videos came."""

    def __init__(self) -> None:
        super().__init__()
        self.order: list[VideoKey] = []

    def __setitem__(self, key: VideoKey, frames: HostArray) -> None:
        self.order.append(key)
        super().__setitem__(key, frames)


def evaluation(
    pipeline: VideoPipeline, *policies: Policy, metrics: tuple[str, ...] = ("ssim",), videos: Videos | None = None
) -> Evaluation:
    loaded = load_metrics(find_metrics(metrics))
    kept = Videos() if videos is None else videos
    request = VideoRequest("", steps=STEPS)
    return Evaluation(pipeline, request, candidates_of(policies or POLICIES_TRIED), PAIRS, loaded, kept)


@pytest.fixture(scope="module")
def finished(pipeline: VideoPipeline) -> tuple[Evaluation, list[Row]]:
    job = evaluation(pipeline)
    return job, list(job.run())


def test_every_candidate_has_a_row_for_every_pair(finished: tuple[Evaluation, list[Row]]) -> None:
    job, rows = finished
    names = [REFERENCE, *(candidate.name for candidate in job.candidates)]
    assert sorted(row.key for row in rows) == sorted(VideoKey(name, pair) for name in names for pair in PAIRS)


def test_a_row_is_what_the_pipeline_makes(finished: tuple[Evaluation, list[Row]], pipeline: VideoPipeline) -> None:
    job, rows = finished
    (row,) = (row for row in rows if row.key == VideoKey("static:warmup=2", PAIRS[1]))
    video = pipeline("a red circle", seed=1, steps=STEPS, policy=Static(warmup=2))
    plain = pipeline("a red circle", seed=1, steps=STEPS, policy=NoReuse())
    assert job.videos[row.key].tobytes() == video.frames.tobytes()
    assert row.metrics == {"psnr": psnr(video.frames, plain.frames), "ssim": ssim(video.frames, plain.frames)}
    assert row.share_skipped == video.trace.share_skipped > 0
    assert row.share_steps_skipped == 0.25
    assert row.steps == STEPS and row.denoise_ms > 0 and row.reference_ms > 0
    assert row.ceiling == pytest.approx(1 / (1 - row.share_skipped))


def test_the_reference_goes_first_and_the_others_take_turns(finished: tuple[Evaluation, list[Row]]) -> None:
    job, _ = finished
    assert isinstance(job.videos, Videos)
    one, other = (candidate.name for candidate in job.candidates)
    assert [key.candidate for key in job.videos.order] == [REFERENCE, one, other, REFERENCE, other, one]


def test_what_is_known_is_not_made_again(finished: tuple[Evaluation, list[Row]]) -> None:
    job, rows = finished
    assert list(job.run(rows)) == []


def test_what_is_missing_is_made_beside_a_reference_of_its_own(pipeline: VideoPipeline) -> None:
    job = evaluation(pipeline)
    running = job.run()
    rows = [next(running) for _ in range(4)]  # of the second pair, the reference alone
    others = list(job.run(rows))
    assert [row.key.pair for row in others] == [PAIRS[1]] * 3
    assert {row.key for row in [*rows, *others]} == set(job.videos)  # type: ignore[call-overload]


def test_a_row_without_its_video_counts_for_nothing(pipeline: VideoPipeline) -> None:
    job = evaluation(pipeline, Static(warmup=2))
    rows = list(job.run())
    videos = Videos()
    videos.update({row.key: job.videos[row.key] for row in rows[:2]})
    assert {row.key.pair for row in evaluation(pipeline, Static(warmup=2), videos=videos).run(rows)} == {PAIRS[1]}


def test_a_metric_that_is_asked_for_later_needs_no_new_video(pipeline: VideoPipeline) -> None:
    job = evaluation(pipeline, metrics=())
    rows = list(job.run())
    later = replace(job, metrics=load_metrics(find_metrics(("ssim",))))
    told: list[Progress] = []
    measured = list(later.run(rows, told.append))
    assert not told
    assert len(measured) == 4 and all(row.metrics.keys() == {"psnr", "ssim"} for row in measured)
    assert [replace(row, metrics={}) for row in measured] == [
        replace(row, metrics={}) for row in rows if row.candidate != REFERENCE
    ]


def alone(name: str, of_set: bool = False) -> Metric:
    """How bright videos are, and how many."""

    def load() -> object:
        def measure(videos: Iterator[object]) -> float:
            means = [float(np.mean(video.frames)) for video in videos]  # type: ignore[attr-defined]
            return sum(means) if of_set else means[0]

        return measure

    return Metric(name, name, True, load, compares=False, of_set=of_set)  # type: ignore[arg-type]


def test_a_metric_that_compares_nothing_judges_the_reference_too(pipeline: VideoPipeline) -> None:
    job = replace(evaluation(pipeline, Static(warmup=2)), metrics=load_metrics([PSNR, alone("brightness")]))
    rows = {row.key: row for row in job.run()}
    key = VideoKey(REFERENCE, PAIRS[0])
    assert rows[key].metrics == {"brightness": pytest.approx(float(np.mean(job.videos[key])))}
    assert rows[VideoKey("static:warmup=2", PAIRS[0])].metrics.keys() == {"psnr", "brightness"}


def test_a_metric_of_sets_is_told_of_all_videos(pipeline: VideoPipeline) -> None:
    job = replace(evaluation(pipeline, Static(warmup=2)), metrics=load_metrics([PSNR, alone("sum", of_set=True)]))
    rows = list(job.run())
    assert all("sum" not in row.metrics for row in rows)
    (candidate,) = job.candidates
    expected = sum(float(np.mean(job.videos[VideoKey(candidate.name, pair)])) for pair in PAIRS)
    assert job.of_sets(candidate) == {"sum": pytest.approx(expected)}


def test_progress_counts_videos_and_steps(pipeline: VideoPipeline) -> None:
    told: list[Progress] = []
    list(evaluation(pipeline, Static(warmup=2)).run((), told.append))
    assert {(progress.phase, progress.total, progress.unit) for progress in told} == {("evaluating", 4, "videos")}
    done = [progress.done + progress.share for progress in told if not progress.detail.startswith("warming up")]
    assert done == sorted(done) and 0 < done[len(done) // 2] < 4
    assert told[0].detail.startswith("warming up: ")
    assert told[-1].detail == "static:warmup=2, seed 1: decoding"


def test_a_cancelled_evaluation_keeps_what_it_yielded(pipeline: VideoPipeline) -> None:
    class Token:
        def is_set(self) -> bool:
            return len(rows) >= 2

    rows: list[Row] = []
    running = evaluation(pipeline).run((), cancel=Token())
    rows += [next(running), next(running)]
    with pytest.raises(Cancelled):
        next(running)


def test_what_the_pipeline_would_refuse_is_refused_before(pipeline: VideoPipeline) -> None:
    with pytest.raises(InvalidRequest, match="steps: got 1000"):
        replace(evaluation(pipeline), request=VideoRequest("", steps=1000)).check()
    with pytest.raises(InvalidRequest, match="prompt: "):
        replace(evaluation(pipeline), pairs=[*PAIRS, Pair("", 3)]).check()
    evaluation(pipeline).check()


def test_candidates_are_told_apart() -> None:
    assert [candidate.name for candidate in candidates_of([Foresight(), Static(2, 3)])] == [
        "foresight",
        "static:reuse_steps=2,interval=3",
    ]
    with pytest.raises(InvalidRequest, match="policy: got foresight twice"):
        candidates_of([Foresight(), Foresight(gamma=0.5)])
    with pytest.raises(InvalidRequest, match="policy: got none, which the others are compared with"):
        candidates_of([NoReuse()])
    with pytest.raises(InvalidRequest, match="policy: got none, expected one at least"):
        candidates_of([])


def test_the_ladder_has_every_policy_that_reuses(pipeline: VideoPipeline) -> None:
    policies, notes = ladder(pipeline, VideoRequest("a dog"))
    assert {policy.name for policy in policies} == {name for name, kind in POLICIES.items() if kind.ladder}
    assert [candidate.name for candidate in candidates_of(policies)] == [text_of(policy) for policy in policies]
    assert not notes


def test_what_a_bundle_cannot_do_is_left_out_of_the_ladder(
    pipeline: VideoPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(request: VideoRequest) -> None:
        if isinstance(request.policy, Forecast):
            raise InvalidRequest("policy: got forecast for a sampler, expected others")

    monkeypatch.setattr(pipeline, "check", check)
    policies, notes = ladder(pipeline, VideoRequest("a dog"))
    assert {policy.name for policy in policies} == {"foresight", "static"}
    rungs = (text_of(Forecast(**settings)) for settings in Forecast.ladder)
    assert notes == [f"left out {rung}: policy: got forecast for a sampler, expected others" for rung in rungs]


def test_what_is_wrong_with_the_request_is_no_matter_of_the_ladder(pipeline: VideoPipeline) -> None:
    with pytest.raises(InvalidRequest, match="steps: got 1000"):
        ladder(pipeline, VideoRequest("a dog", steps=1000))


def test_seeds_of_all_videos_differ() -> None:
    assert pairs_of(["a", "b", "a"], 2) == [Pair("a", 0), Pair("b", 1), Pair("a", 2), Pair("b", 3)]
    with pytest.raises(InvalidRequest, match="seeds: got 0"):
        pairs_of(["a"], 0)


def test_an_identical_video_has_no_psnr(pipeline: VideoPipeline) -> None:
    job = replace(evaluation(pipeline), candidates=[Candidate("the same", NoReuse())])
    (row,) = (row for row in job.run() if row.key == VideoKey("the same", PAIRS[0]))
    assert row.metrics == {"psnr": None, "ssim": 1.0}
    assert row.ceiling == 1 and row.share_skipped == 0 and math.isfinite(row.speedup)


def test_metrics_are_those_of_the_registry() -> None:
    assert [metric.name for metric in find_metrics(["ssim", "ssim"])] == ["psnr", "ssim"]
    with pytest.raises(InvalidRequest, match=f"metrics: got 'beauty', expected some of {', '.join(METRICS)}"):
        find_metrics(["beauty"])
