"""What is found, measured and told of a model whose two transformers take turns: a random Wan like the A14B."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from foresight.engines.bundle import open_bundle
from foresight.engines.profiles import write_profiles
from foresight.engines.progress import silent
from foresight.evaluation.calibration import calibration_of
from foresight.evaluation.evaluate import Evaluation, Pair, candidates_of, pairs_of, settings_of
from foresight.evaluation.goals import Quality
from foresight.evaluation.held_out import parts_of
from foresight.evaluation.lineup import BenchRequest, run_bench
from foresight.evaluation.metrics import PSNR, load_metrics
from foresight.evaluation.report import write_report
from foresight.evaluation.report.evaluation import write_evaluation
from foresight.evaluation.results import results_of
from foresight.evaluation.search import Calibrated, Settings
from foresight.evaluation.tune import InMemory, Tuning
from foresight.evaluation.tuned import profiles_of
from foresight.exporter.export import Export, ExportRequest
from foresight.runtime.pipeline import VideoPipeline
from foresight.runtime.policies import FixedSchedule, Forecast, Policy, Static
from foresight.runtime.policies.base import SearchRange
from foresight.runtime.request import VideoRequest
from tests.evaluation.page import Page
from tests.runtime.test_experts import named_steps
from tests.runtime.test_schedule import forecast_error, outputs_of, recorded
from tests.support import copy_bundle, load_pipeline
from zoo import wan

STEPS, BOUNDARY = 16, 0.8
PROMPTS = ["a dog", "a cat", "a fish", "a bird", "a cow", "a horse"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, bundles: Path) -> Path:
    folder = wan.write_random(
        tmp_path_factory.mktemp("checkpoints") / "wan",
        boundary=BOUNDARY,
        layers=1,
        scheduler_settings={"flow_shift": 3.0},
    )
    asked = ExportRequest(height=16, width=16, frames=1, max_batch=1)
    return Export("wan-a14b", asked, str(folder), bundles / "wan-turns").run().path


@pytest.fixture(scope="module")
def pipeline(bundle: Path) -> VideoPipeline:
    return load_pipeline(bundle)


def turns_of(pipeline: VideoPipeline) -> list[int]:
    return [len(turn) for turn in pipeline.turns(STEPS)]


def test_both_have_steps_enough_to_forecast_some(pipeline: VideoPipeline) -> None:
    assert min(turns_of(pipeline)) > 4 and sum(turns_of(pipeline)) == STEPS


def test_what_is_recorded_tells_how_far_forecasts_of_each_would_have_been_off(pipeline: VideoPipeline) -> None:
    pairs = [Pair(prompt, seed) for seed, prompt in enumerate(PROMPTS[:2])]
    calibration = calibration_of(pipeline, VideoRequest("", steps=STEPS), pairs, silent)
    assert calibration.turns == pipeline.turns(STEPS)
    times = [float(time) for time in calibration.schedule.timesteps]
    for products, pair in zip(calibration.products, pairs, strict=True):
        trace = pipeline(pair.prompt, seed=pair.seed, steps=STEPS, policy=Forecast(warmup=STEPS)).trace
        for turn in calibration.turns:
            assert {trace.steps[step].error for step in turn[:3]} == {None}
            for step in turn[3:]:
                assert forecast_error(products, times, step) == pytest.approx(trace.steps[step].error, rel=1e-2)


@pytest.fixture(scope="module")
def job(pipeline: VideoPipeline) -> Tuning:
    parts = parts_of(pairs_of(PROMPTS, 1))
    policies = [Forecast(), FixedSchedule()]
    return Tuning(pipeline, VideoRequest("", steps=STEPS), policies, {"some": Quality(3)}, parts, 3, InMemory())


@pytest.mark.parametrize("policy", [Forecast(tolerance=1.0), FixedSchedule()])
def test_what_a_profile_says_is_skipped_is_what_its_requests_skip(
    job: Tuning, bundle: Path, tmp_path: Path, policy: Policy
) -> None:
    job = replace(job, policies=[policy])
    (one,), tried = job.run()
    for found, summary in tried.items():
        if isinstance(found, FixedSchedule):
            assert summary.share_skipped == pytest.approx(1 - len(named_steps(found)) / STEPS)
    assert one.policy is not None
    folder = copy_bundle(bundle, tmp_path / "bundle")
    (profile,) = profiles_of(job, [one])
    write_profiles(open_bundle(folder), [profile])
    with load_pipeline(folder) as tuned:
        shares = [
            tuned(pair.prompt, seed=pair.seed, steps=STEPS, policy=tuned.profile("some", STEPS)).trace.share_skipped
            for pair in job.parts.held_out
        ]
        assert tuned.manifest.profiles[0].later_guidances == (3.0,)
    assert 0 < profile.held_out.share_skipped == pytest.approx(np.mean(shares), abs=1e-4)


def test_a_warm_up_is_looked_for_among_those_that_leave_a_turn_something_to_skip(job: Tuning) -> None:
    longest = max(turns_of(job.pipeline))
    space = job._space(Forecast(), silent, None)
    assert isinstance(space, Settings)
    found = space.ranges["warmup"]
    assert found == SearchRange(math.ceil(0.2 * longest), math.ceil(0.4 * longest))
    assert all(Forecast(warmup=number).may_reuse(longest) for number in (int(found.low), int(found.high)))


def test_schedules_are_looked_for_beyond_the_steps_that_begin_later_turns() -> None:
    calibration = recorded(outputs_of(1, 20), (12,))
    space = Calibrated(FixedSchedule(), calibration)
    for warmup, later in ((4, 2), (8, 3), (14, 2)):
        policy = space.policy({"warmup": warmup, "later": later})
        assert policy is not None
        begun = {4: 3, 8: 3, 14: 1}[warmup]
        assert len(named_steps(policy)) == warmup + begun + later


# What is told


def test_an_evaluation_tells_each_guidance_and_how_each_counts_its_steps(
    pipeline: VideoPipeline, tmp_path: Path
) -> None:
    request, policies = VideoRequest("", steps=STEPS), [Static(), FixedSchedule(f"1-10 {STEPS}")]
    assert settings_of(pipeline, request)["later_guidances"] == [3.0]
    assert settings_of(pipeline, replace(request, guidance=5.0))["later_guidances"] == [5.0]
    assert settings_of(pipeline, replace(request, guidance=5.0, guidance_2=2.0))["later_guidances"] == [2.0]
    kept = InMemory()
    job = Evaluation(pipeline, request, candidates_of(policies), [Pair("a dog", 0)], load_metrics([PSNR]), kept.videos)
    page = Page(write_evaluation(results_of(job, list(job.run())), kept.videos, tmp_path / "page.html"))
    first, second = turns_of(pipeline)
    assert "guidance 4, then 3" in page.words
    assert f"in turns of {first} and {second} steps" in page.words
    assert f"after {Static().warmup_steps(first)} warm-up steps" in page.words
    assert f"schedule: 11 of {STEPS} steps run" in page.words


def test_a_page_shows_the_warm_up_of_each_and_where_each_may_reuse(pipeline: VideoPipeline, tmp_path: Path) -> None:
    policy = Static(warmup=3)
    video = pipeline("a dog", steps=STEPS, policy=policy)
    page = Page(write_report(video, tmp_path / "page.html"))
    first, second = turns_of(pipeline)
    blocks = len(video.trace.blocks)
    assert page.paths("edge") == f"M3 0v{blocks}M{first + 3} 0v{blocks}"
    allowed = [
        start + step
        for start, count in ((0, first), (first, second))
        for step in range(count)
        if policy.allows(step, count)
    ]
    assert page.paths("allowed") == "".join(f"M{step + 0.1:g} 0h.8v1h-.8z" for step in allowed)
    assert page.html.count(">warm-up</span>") == 2


def test_peers_are_left_out_as_they_are_switched_on_in_one_transformer(pipeline: VideoPipeline) -> None:
    told = run_bench(pipeline, BenchRequest([Pair("a dog", 0)], "folder", steps=2, only=("pab",)))
    assert {one["reason"] for one in told["unavailable"]} == {
        "the model's transformers take turns, and peers are switched on in one"
    }
