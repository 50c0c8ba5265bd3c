"""The policy `schedule`: what its text means, that it forecasts as `forecast` does, and that its paths are shortest."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foresight import InvalidRequest
from foresight.engines.arrays import HostArray
from foresight.evaluation.calibration import calibration_of
from foresight.evaluation.evaluate import Pair
from foresight.runtime.pipeline import VideoPipeline
from foresight.runtime.policies import Context, Decision, FixedSchedule, Forecast
from foresight.runtime.policies.base import Calibration
from foresight.runtime.policies.extrapolation import extrapolation
from foresight.runtime.policies.shortest import shortest_paths
from foresight.runtime.request import VideoRequest
from foresight.runtime.sampler import Schedule

PROMPT = "a red circle moving right"


def schedule_of(steps: int, scale: float = 0.5) -> Schedule:
    """A sampler of one step, x - m / 10."""
    column, nothing = np.ones((steps, 1)), np.zeros(steps)
    times = np.linspace(1000, 20, steps)
    return Schedule(times, nothing, nothing, column, -0.1 * column, np.full(steps, scale), 1.0)


def drive(policy: FixedSchedule, steps: int) -> str:
    """The steps of a request, C computed and f forecast."""
    decider, letters = policy.begin(Context(schedule_of(steps), ("block",) * 3)), ""
    for step in range(steps):
        if decider.forecast(step) is None:
            letters += "C"
            assert decider.expected(step) is None
        else:
            letters += "f"
    return letters


@pytest.mark.parametrize(
    ("text", "letters"),
    [("1-3 6 8-9", "CCCffCfCC"), ("1-3 5", "CCCfC"), ("1 2 3 10", "CCCffffffC"), ("1-4", "CCCC"), ("", "CCCCCCC")],
)
def test_the_steps_that_it_names_run(text: str, letters: str) -> None:
    assert drive(FixedSchedule(text), len(letters)) == letters


@pytest.mark.parametrize(
    "text", ["4-9", "1-2 5", "1-3 3", "1-3 7 5", "3-1", "1-3,5", "1-3 x", "0-3", "1-3 -5", "1-3 99999", "1-", None, 3]
)
def test_what_names_no_schedule_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="computed: got .*, expected rising numbers of steps"):
        FixedSchedule(text)


def test_a_schedule_is_for_its_number_of_steps(pipeline: VideoPipeline) -> None:
    with pytest.raises(InvalidRequest, match="computed: got a schedule for 6 steps, expected one for 7; tune one"):
        pipeline(PROMPT, steps=7, policy=FixedSchedule("1-3 6"))


def test_it_forecasts_as_forecast_does(pipeline: VideoPipeline) -> None:
    told = pipeline(PROMPT, policy=Forecast(tolerance=1e6, warmup=4), steps=9, seed=3, guidance=3.0)
    ran = [number for number, step in enumerate(told.trace.steps, 1) if Decision.COMPUTE.value in step.decisions]
    assert ran == [1, 2, 3, 4, 9]
    fixed = pipeline(PROMPT, policy=FixedSchedule("1-4 9"), steps=9, seed=3, guidance=3.0)
    assert fixed.latents.tobytes() == told.latents.tobytes()
    assert fixed.trace.blocks_forecast == told.trace.blocks_forecast > 0
    assert fixed.trace.cache_bytes == told.trace.cache_bytes


def test_it_tells_what_it_does() -> None:
    assert FixedSchedule("1-3 6").describe(6).startswith("schedule: 4 of 6 steps run, the others are forecast")
    assert FixedSchedule("1-3 6").may_reuse(6) and not FixedSchedule().may_reuse(6)


# What is recorded, and what is made of it


def test_products_tell_how_far_forecasts_would_have_been_off(pipeline: VideoPipeline) -> None:
    pairs, steps = [Pair(PROMPT, 0), Pair("a dog", 1)], 7
    recorded = calibration_of(pipeline, VideoRequest("", steps=steps), pairs, lambda progress: None)
    assert recorded.products.shape == (2, steps, steps)
    times = [float(time) for time in recorded.schedule.timesteps]
    for products, pair in zip(recorded.products, pairs, strict=True):
        policy = Forecast(warmup=steps)  # computes all steps, and measures what forecasts would have been off by
        trace = pipeline(pair.prompt, seed=pair.seed, steps=steps, policy=policy).trace
        for step in range(3, steps):
            places = [step, step - 1, step - 2, step - 3]
            weights = extrapolation([times[place] for place in places[1:]], times[step])
            assert weights is not None
            signed = np.array([1.0, *(-weight for weight in weights)])
            square = signed @ products[np.ix_(places, places)] @ signed
            assert np.sqrt(square) == pytest.approx(trace.steps[step].error, rel=1e-3)


def outputs_of(seed: int, steps: int, requests: int = 2, size: int = 5) -> HostArray:
    walk = np.random.default_rng(seed).standard_normal((requests, steps, size))
    return np.asarray(walk.cumsum(axis=1))


def plain_cost(outputs: HostArray, schedule: Schedule, path: tuple[int, ...]) -> float:
    """What a schedule costs, from the outputs themselves; infinite where steps that run lie too far apart."""
    if any(after - before > 8 for before, after in pairwise(path)):
        return np.inf
    sensitivities, times, total = schedule.sensitivities(), schedule.timesteps, 0.0
    for step in set(range(schedule.steps)) - set(path):
        newest = [place for place in path if place < step][-3:][::-1]
        weights = extrapolation([times[place] for place in newest], times[step])
        assert weights is not None
        foretold = sum(weight * outputs[:, place] for weight, place in zip(weights, newest, strict=True))
        total += sensitivities[step] * np.sqrt(((outputs[:, step] - foretold) ** 2).mean(axis=1)).max()
    return float(total)


@given(st.integers(0, 1000), st.integers(6, 10), st.integers(3, 5))
def test_no_other_schedule_with_as_many_steps_costs_less(seed: int, steps: int, warmup: int) -> None:
    outputs, schedule = outputs_of(seed, steps), schedule_of(steps)
    products = np.einsum("ptn,psn->pts", outputs, outputs) / outputs.shape[-1]
    found = {len(path): path for path in shortest_paths(Calibration(schedule, products), warmup)}
    for count in range(warmup + 1, steps + 1):
        every = [
            (*range(warmup), *between, steps - 1)
            for between in combinations(range(warmup, steps - 1), count - warmup - 1)
        ]
        least = min(plain_cost(outputs, schedule, path) for path in every)
        if np.isfinite(least):
            assert plain_cost(outputs, schedule, tuple(found[count])) == pytest.approx(least, abs=1e-6)
        else:
            assert count not in found


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_few_steps_all_run(steps: int) -> None:
    calibration = Calibration(schedule_of(steps), np.zeros((1, steps, steps)))
    assert shortest_paths(calibration) == [list(range(steps))]


def test_a_sampler_that_tells_no_signal_scales_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="does not tell how much signal"):
        shortest_paths(Calibration(schedule_of(6, scale=np.nan), np.zeros((1, 6, 6))))


def test_a_schedule_is_made_for_every_number_of_steps_that_run() -> None:
    outputs = outputs_of(1, 12)
    products = np.einsum("ptn,psn->pts", outputs, outputs) / outputs.shape[-1]
    made = FixedSchedule().calibrate(Calibration(schedule_of(12), products))
    assert made.keys() == set(range(5, 13))  # two gaps of eight at most
    for count, policy in made.items():
        assert isinstance(policy, FixedSchedule)
        assert drive(policy, 12).count("C") == count


def test_the_first_steps_run_in_every_schedule_with_a_warm_up() -> None:
    outputs = outputs_of(1, 12)
    products = np.einsum("ptn,psn->pts", outputs, outputs) / outputs.shape[-1]
    made = FixedSchedule().calibrate(Calibration(schedule_of(12), products), warmup=6)
    assert made.keys() == set(range(7, 13))
    assert all(drive(policy, 12).startswith("C" * 6) for policy in made.values() if isinstance(policy, FixedSchedule))
