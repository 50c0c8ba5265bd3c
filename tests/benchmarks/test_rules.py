"""Rules that were tried: what each sees and decides, and that schedules are the best there are."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import pytest

from benchmarks.halves import held_out_pairs, tuning_pairs
from benchmarks.rules.easycache import EasyCache
from benchmarks.rules.last_quarter import LastQuarter, LastQuarterForecast
from benchmarks.rules.lemica import LeMiCa, minimax_schedules
from benchmarks.rules.magcache import MagCache, ratios_of
from benchmarks.rules.seacache import SeaCache, filtered
from benchmarks.rules.steps import OfSamples, SumOfSamples
from foresight.evaluation.lineup import noise_of
from foresight.runtime.decisions import Decision
from foresight.runtime.pipeline import VideoPipeline
from foresight.runtime.policies import Context, Forecast
from foresight.runtime.policies.base import Calibration
from tests.support import context_of

STEPS, SEED = 10, 3


class SeventhStep(SumOfSamples):
    """Skips the seventh step; the last that was begun is kept."""

    begun: SumOfSamples

    def changes(self, step: int) -> float:
        SeventhStep.begun = self
        return 0.0 if step == 6 else 1.0


class Seventh(OfSamples):
    name = "seventh"

    def begin(self, context: Context) -> SeventhStep:
        return SeventhStep(self, context)


@pytest.mark.parametrize("extrapolates", [False, True])
def test_a_rule_follows_the_samples_of_the_loop(pipeline: VideoPipeline, extrapolates: bool) -> None:
    video = pipeline("a dog", seed=SEED, steps=STEPS, policy=Seventh(0.5, extrapolates, noise_of(pipeline, SEED)))
    assert video.trace.blocks_forecast == len(video.trace.blocks)
    np.testing.assert_allclose(SeventhStep.begun.sample[0], video.latents, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rule", [EasyCache, SeaCache])
@pytest.mark.parametrize("extrapolates", [False, True])
def test_a_higher_threshold_skips_more_and_none_skips_nothing(
    pipeline: VideoPipeline, rule: type[EasyCache | SeaCache], extrapolates: bool
) -> None:
    noise = noise_of(pipeline, SEED)
    shares = [
        pipeline("a dog", seed=SEED, steps=STEPS, policy=rule(threshold, extrapolates, noise)).trace.share_skipped
        for threshold in (1e-9, 0.3, 1e9)
    ]
    warm_up, last = 3 if extrapolates else 2, 1
    assert shares[0] == 0 <= shares[1] <= shares[2] == pytest.approx(1 - (warm_up + last) / STEPS)


def test_the_filter_keeps_what_does_not_change_and_takes_noise_back() -> None:
    rng = np.random.default_rng(0)
    still, noise = np.ones((4, 3, 8, 8)), rng.standard_normal((4, 3, 8, 8))
    for noise_share in (0.1, 0.5, 0.9):
        gain = filtered(still, noise_share).mean()
        np.testing.assert_allclose(filtered(still, noise_share), gain * still)
        assert filtered(noise, noise_share).std() < gain * noise.std()
    clear, noisy = (filtered(noise, share).std() / filtered(still, share).mean() for share in (0.1, 0.9))
    assert noisy < clear / 2, "the more noise there is, the more is taken back"


def random_calibration(seed: int, steps: int = 8) -> Calibration:
    outputs = np.cumsum(np.random.default_rng(seed).standard_normal((2, steps, 30)), axis=1)
    schedule = context_of(steps, 1).schedule
    flat = np.ones(steps)
    schedule = replace(
        schedule, sample_coefficients=flat[:, None], output_coefficients=-flat[:, None] / steps, signal_scales=flat
    )
    return Calibration(schedule, outputs @ outputs.transpose(0, 2, 1) / outputs.shape[2])


def stretches(calibration: Calibration, computed: tuple[int, ...]) -> list[float]:
    """What holding the output costs between two steps that run, the worst first."""
    weights = calibration.schedule.sensitivities()
    products = calibration.products
    costs = [
        sum(
            weights[step]
            * np.sqrt(products[:, step, step] - 2 * products[:, step, first] + products[:, first, first]).mean()
            for step in range(first + 1, second)
        )
        for first, second in pairwise(computed)
    ]
    return sorted(costs, reverse=True)


@pytest.mark.parametrize("seed", range(3))
def test_no_schedule_has_a_cheaper_worst_stretch(seed: int) -> None:
    calibration = random_calibration(seed)
    found = minimax_schedules(calibration, extrapolates=False)
    for count, schedule in found.items():
        others = [(0, 1, 2, *middle, 7) for middle in combinations(range(3, 7), count - 4)]
        best = min(stretches(calibration, other) for other in others)
        np.testing.assert_allclose(stretches(calibration, schedule.computed), best)
    assert sorted(found) == list(range(4, 9))


def test_a_schedule_runs_its_steps_and_no_others(pipeline: VideoPipeline) -> None:
    video = pipeline("a dog", steps=6, policy=LeMiCa((0, 1, 2, 5), extrapolates=True))
    assert [step.decisions[0] == Decision.FORECAST.value for step in video.trace.steps] == [False] * 3 + [True] * 2 + [
        False
    ]


def test_ratios_of_sizes_are_those_of_root_mean_squares() -> None:
    products = np.diag([4.0, 16.0, 1.0])[None]
    assert ratios_of(Calibration(context_of(3, 1).schedule, products)) == pytest.approx((1, 2, 0.25))


def test_where_sizes_stay_the_same_magcache_skips_all_it_may(pipeline: VideoPipeline) -> None:
    video = pipeline("a dog", steps=STEPS, policy=MagCache(0.1, False, (1.0,) * STEPS))
    assert video.trace.share_skipped == pytest.approx(0.7)


def test_the_last_quarter_runs_on_what_is_held(pipeline: VideoPipeline) -> None:
    fixed = pipeline("a dog", steps=6, policy=LastQuarter(warmup=2))
    told = pipeline("a dog", steps=6, policy=LastQuarterForecast(Forecast(1e9)))
    blocks = len(fixed.trace.blocks)
    run = -(-blocks // 4)
    partial = ["dead"] * (blocks - run - 1) + ["reused"] + ["computed"] * run
    assert [[*step.decisions] == partial for step in fixed.trace.steps] == [False, False, True, False, True, False]
    assert [[*step.decisions] == partial for step in told.trace.steps] == [False] * 4 + [True, False]


def test_the_forecast_that_decides_is_made_of_steps_that_ran_whole(pipeline: VideoPipeline) -> None:
    """Until a step is skipped the errors are those of `forecast`, and afterwards whole steps alone have any."""
    video = pipeline("a dog", steps=STEPS, policy=LastQuarterForecast(Forecast(1e9)))
    plain = pipeline("a dog", steps=STEPS, policy=Forecast(1e9))
    partial = ["reused" in step.decisions for step in video.trace.steps]
    first = partial.index(True)
    assert [step.error for step in video.trace.steps[:first]] == [step.error for step in plain.trace.steps[:first]]
    assert all((step.error is None) for step, skipped in zip(video.trace.steps, partial, strict=True) if skipped)


def test_no_pair_is_in_both_halves() -> None:
    held_out = held_out_pairs(50)
    assert len(set(held_out)) == 50 and len({pair.prompt for pair in held_out}) == 48
    assert not {pair.seed for pair in held_out} & {pair.seed for pair in tuning_pairs("latte")}
