"""The policy `forecast`: against the rule written out plainly, number by number, and in the pipeline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foresight import InvalidRequest, NoReuse, Trace
from foresight.runtime.pipeline import VideoPipeline
from foresight.runtime.policies import Context, Forecast
from foresight.runtime.sampler import Schedule
from tests.support import load_pipeline, watched_pipeline

PROMPT = "a red circle moving right"


def schedule_of(timesteps: Sequence[float], b: float = -0.1, scale: float = 0.5) -> Schedule:
    """A sampler of one step, x + b m, of samples that hold `scale` of the signal."""
    steps = len(timesteps)
    column, nothing = np.ones((steps, 1)), np.zeros(steps)
    return Schedule(np.array(timesteps, float), nothing, nothing, column, b * column, np.full(steps, scale), 1.0)


def drive(policy: Forecast, schedule: Schedule, errors: Sequence[Sequence[float]]) -> str:
    """The steps of a request, C computed and f forecast; `errors` has what a computed step measures, per prompt."""
    context = Context(schedule, ("block",) * 3, len(errors[0]))
    decider, letters = policy.begin(context), ""
    for step in range(schedule.steps):
        if decider.forecast(step) is not None:
            letters += "f"
            continue
        letters += "C"
        if decider.expected(step) is not None:
            decider.observe_output(step, errors[step])
    return letters


def plain(policy: Forecast, schedule: Schedule, errors: Sequence[float], sensitivities: Sequence[float]) -> str:
    """The rule as it is written in words."""
    letters, computed, rate, spent = "", list[int](), math.inf, 0.0
    steps, times = schedule.steps, schedule.timesteps
    first = policy.warmup if policy.warmup is not None else math.ceil(0.2 * steps)
    for step in range(steps):
        cost = spent + sensitivities[step] * rate * abs(times[step] - times[computed[-1]]) if computed else math.inf
        if first <= step < steps - 1 and len(computed) >= 3 and cost <= policy.tolerance:
            letters, spent = letters + "f", cost
            continue
        rate = errors[step] / abs(times[step] - times[computed[-1]]) if len(computed) >= 3 else math.inf
        letters, spent = letters + "C", 0.0
        computed.append(step)
    return letters


@given(
    steps=st.integers(1, 30),
    tolerance=st.floats(1e-4, 1.0),
    warmup=st.none() | st.integers(1, 12),
    data=st.data(),
)
def test_steps_are_forecast_as_the_rule_says(steps: int, tolerance: float, warmup: int | None, data: Any) -> None:
    gaps = data.draw(st.lists(st.floats(1, 60), min_size=steps, max_size=steps))
    errors = data.draw(st.lists(st.floats(0, 2) | st.just(math.inf), min_size=steps, max_size=steps))
    schedule, policy = schedule_of(list(1000 - np.cumsum(gaps))), Forecast(tolerance, warmup)
    # one step from each sample to the next: what is wrong with x is that much of the video, but at the last step
    sensitivities = [0.1 / 0.5] * (steps - 1) + [0.1]
    assert schedule.sensitivities() == pytest.approx(sensitivities)
    expected = plain(policy, schedule, errors, list(schedule.sensitivities()))
    assert drive(policy, schedule, [(error,) for error in errors]) == expected


@pytest.mark.parametrize(
    ("tolerance", "warmup", "error", "expected"),
    [
        # gaps of 10, sensitivity .2; the first r is that of the fourth computed step
        # over a gap of 10, .2 r x 1, 2, 3 … for the steps after a computed one; later ones are measured over more
        (0.1, 1, 0.1, "CCCCffCffffC"),
        (0.05, 1, 0.1, "CCCCfCffCffC"),
        (0.01, 1, 0.1, "CCCCCCCCCCCC"),
        (0.1, 6, 0.1, "CCCCCCffCffC"),
        (0.1, None, 0.0, "CCCCfffffffC"),
        (0.1, 1, math.nan, "CCCCCCCCCCCC"),
        (0.1, 1, math.inf, "CCCCCCCCCCCC"),
    ],
)
def test_decisions(tolerance: float, warmup: int | None, error: float, expected: str) -> None:
    schedule = schedule_of([1000 - 10 * step for step in range(12)])
    got = drive(Forecast(tolerance, warmup), schedule, [(error,)] * 12)
    assert got == expected


def test_the_worst_prompt_of_a_batch_decides() -> None:
    schedule = schedule_of([1000 - 10 * step for step in range(12)])
    policy, small, large = Forecast(0.1, 1), 0.01, 0.4
    alone = drive(policy, schedule, [(large,)] * 12)
    assert drive(policy, schedule, [(small, large)] * 12) == drive(policy, schedule, [(large, small)] * 12) == alone
    assert drive(policy, schedule, [(small, math.nan)] * 12) == "C" * 12


@given(st.lists(st.floats(0.5, 50), min_size=4, max_size=4), st.lists(st.floats(-3, 3), min_size=3, max_size=3))
def test_a_forecast_follows_a_line_and_half_of_a_curve(gaps: list[float], powers: list[float]) -> None:
    times = 100 - np.cumsum(gaps)
    decider = Forecast().begin(Context(schedule_of(list(times)), ("block",)))
    for step in range(3):
        assert decider.expected(step) is None
    weights = decider.expected(3)
    assert weights is not None and sum(weights) == pytest.approx(1)
    values = powers[0] + powers[1] * times + powers[2] * times**2
    line = values[2] + (times[3] - times[2]) * (values[2] - values[1]) / (times[2] - times[1])
    made = float(np.dot(weights, values[2::-1]))
    assert made == pytest.approx((line + values[3]) / 2, rel=1e-6, abs=1e-6 * (1 + np.abs(values).max() * max(gaps)))


def test_steps_at_one_timestep_are_computed() -> None:
    """As those that a warm-up of the sampler takes twice."""
    times = [100, 90, 90, 90, 80, 70, 60, 50, 40, 30]
    assert drive(Forecast(10.0, 1), schedule_of(times), [(0.0,)] * 10) == "CCCCCCCffC"


@pytest.mark.parametrize("tolerance", [0, -1, math.nan, math.inf, "much"])
def test_a_tolerance_that_makes_no_sense_is_refused(tolerance: Any) -> None:
    with pytest.raises(InvalidRequest, match="^tolerance: got .*, expected a number above 0"):
        Forecast(tolerance=tolerance)


@pytest.mark.parametrize("warmup", [0, -1, 1.5, "many"])
def test_a_warmup_that_makes_no_sense_is_refused(warmup: Any) -> None:
    with pytest.raises(InvalidRequest, match="^warmup: got .*, expected a whole number of 1 or more"):
        Forecast(warmup=warmup)


def test_a_sampler_that_tells_no_signal_is_refused() -> None:
    schedule = schedule_of([3, 2, 1], scale=math.nan)
    with pytest.raises(InvalidRequest, match="^policy: got forecast for a sampler that does not tell"):
        Forecast().begin(Context(schedule, ("block",)))


def test_forecast_steps_run_no_engine(bundle: Path) -> None:
    watched, backend = watched_pipeline(bundle)
    calls: list[str] = []
    backend.before = lambda name, tensors: calls.append(name)
    video = watched(PROMPT, steps=20, guidance=4.0, policy=Forecast(tolerance=0.5))
    forecast = [step for step, record in enumerate(video.trace.steps) if record.decisions[0] == "forecast"]
    assert forecast
    assert all(set(record.decisions) in ({"forecast"}, {"computed"}) for record in video.trace.steps)
    for name in ("prologue", "block.000", "block.003", "epilogue"):
        assert calls.count(name) == 20 - len(forecast)


def test_the_trace_tells_what_was_expected_and_what_came(pipeline: VideoPipeline) -> None:
    trace = pipeline(PROMPT, steps=20, guidance=4.0, policy=Forecast(tolerance=0.5)).trace
    for step, record in enumerate(trace.steps):
        if record.decisions[0] == "forecast":
            assert record.error is None and record.estimate is not None
            assert record.estimate <= 0.5 and record.estimate_limit == 0.5
        else:
            assert (record.error is None) == (step < 3)
            assert record.estimate is None or record.estimate > 0.5 or not math.isfinite(record.estimate)
    assert trace.policy == {"name": "forecast", "tolerance": 0.5, "warmup": None}


def test_nothing_is_forecast_without_tolerance(pipeline: VideoPipeline) -> None:
    least = pipeline(PROMPT, steps=9, policy=Forecast(tolerance=1e-30))
    assert least.trace.blocks_forecast == 0
    assert least.latents.tobytes() == pipeline(PROMPT, steps=9, policy=NoReuse()).latents.tobytes()


def test_it_takes_no_memory_for_blocks(bundle: Path, pipeline: VideoPipeline) -> None:
    latents = 4 * int(np.prod(pipeline.manifest.shape.latents))
    plan, without = pipeline.memory(policy=Forecast()), pipeline.memory(policy=NoReuse())
    stream = without.cache // (len(pipeline.manifest.blocks) + 2)
    assert plan.cache == 2 * stream
    assert without.denoise.arrays - plan.denoise.arrays == without.cache - plan.cache - 3 * latents
    small = load_pipeline(bundle, cache_memory=2 * stream)
    trace = small(PROMPT, steps=8, policy=Forecast(tolerance=0.5)).trace
    assert trace.cache_bytes == 2 * stream and trace.uncached == ()
    assert trace.blocks_forecast > 0


def test_in_a_batch_no_step_is_forecast_that_one_prompt_alone_would_compute(pipeline: VideoPipeline) -> None:
    """Up to there they are the same; what is measured later is measured over other gaps."""
    policy, prompts = Forecast(tolerance=0.05), [PROMPT, "a dog"]

    def first_computed(trace: Trace) -> int:
        return next(step for step in range(4, 16) if trace.steps[step].decisions[0] == "computed")

    together = pipeline(prompts, steps=16, seed=3, policy=policy)[0].trace
    alone = [pipeline(text, steps=16, seed=3 + place, policy=policy).trace for place, text in enumerate(prompts)]
    assert first_computed(together) == min(map(first_computed, alone))
