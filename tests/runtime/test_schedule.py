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
from foresight.runtime.policies import Context, Decision, FixedSchedule, Forecast, Policy
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


def drive(policy: FixedSchedule, asked: int | Context) -> str:
    """The steps of a request, or of one turn, C computed and f forecast."""
    context = asked if isinstance(asked, Context) else Context(schedule_of(asked), ("block",) * 3)
    decider, letters = policy.begin(context), ""
    for step in range(context.steps):
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
            assert forecast_error(products, times, step) == pytest.approx(trace.steps[step].error, rel=1e-3)


def forecast_error(products: HostArray, times: list[float], step: int) -> float:
    """What a forecast of the step from the three before it is off by, from inner products of all outputs."""
    places = [step, step - 1, step - 2, step - 3]
    weights = extrapolation([times[place] for place in places[1:]], times[step])
    assert weights is not None
    signed = np.array([1.0, *(-weight for weight in weights)])
    return float(np.sqrt(signed @ products[np.ix_(places, places)] @ signed))


def outputs_of(seed: int, steps: int, requests: int = 2, size: int = 5) -> HostArray:
    walk = np.random.default_rng(seed).standard_normal((requests, steps, size))
    return np.asarray(walk.cumsum(axis=1))


def plain_cost(outputs: HostArray, schedule: Schedule, path: tuple[int, ...], turns: list[range]) -> float:
    """What a schedule costs, from the outputs themselves; infinite where steps that run lie too far apart."""
    starts = {turn.start for turn in turns}
    if any(after - before > 8 for before, after in pairwise(path)) or not starts < set(path):
        return np.inf
    sensitivities, times, total = schedule.sensitivities(), schedule.timesteps, 0.0
    for step in set(range(schedule.steps)) - set(path):
        (turn,) = (turn for turn in turns if step in turn)
        newest = [place for place in path if place in turn and place < step][-3:][::-1]
        if len(newest) < 3:
            return np.inf
        weights = extrapolation([times[place] for place in newest], times[step])
        assert weights is not None
        foretold = sum(weight * outputs[:, place] for weight, place in zip(weights, newest, strict=True))
        total += sensitivities[step] * np.sqrt(((outputs[:, step] - foretold) ** 2).mean(axis=1)).max()
    return float(total)


def recorded(outputs: HostArray, switches: tuple[int, ...] = ()) -> Calibration:
    """As if these were the outputs of requests; a forecast from another transformer's would seem to cost nothing."""
    products = np.einsum("ptn,psn->pts", outputs, outputs) / outputs.shape[-1]
    made = Calibration(schedule_of(outputs.shape[1]), products, switches)
    apart = np.full_like(products, 1e6)
    for turn in made.turns:
        own = slice(turn.start, turn.stop)
        apart[:, own, own] = products[:, own, own]
    return Calibration(made.schedule, apart, switches)


@given(st.integers(0, 1000), st.integers(6, 10), st.integers(3, 5), st.sets(st.integers(1, 9), max_size=2))
def test_no_other_schedule_with_as_many_steps_costs_less(
    seed: int, steps: int, warmup: int, switches: set[int]
) -> None:
    outputs, schedule = outputs_of(seed, steps), schedule_of(steps)
    calibration = recorded(outputs, tuple(sorted(step for step in switches if step < steps)))
    found = {len(path): path for path in shortest_paths(calibration, warmup)}
    for count in range(warmup + 1, steps + 1):
        every = [
            (*range(warmup), *between, steps - 1)
            for between in combinations(range(warmup, steps - 1), count - warmup - 1)
        ]
        least = min(plain_cost(outputs, schedule, path, calibration.turns) for path in every)
        if np.isfinite(least):
            cost = plain_cost(outputs, schedule, tuple(found[count]), calibration.turns)
            assert cost == pytest.approx(least, abs=1e-6)
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
    made = FixedSchedule().calibrate(recorded(outputs_of(1, 12)))
    assert made.keys() == set(range(5, 13))  # two gaps of eight at most
    for count, policy in made.items():
        assert isinstance(policy, FixedSchedule)
        assert drive(policy, 12).count("C") == count


def test_the_first_steps_run_in_every_schedule_with_a_warm_up() -> None:
    made = FixedSchedule().calibrate(recorded(outputs_of(1, 12)), warmup=6)
    assert made.keys() == set(range(7, 13))
    assert all(drive(policy, 12).startswith("C" * 6) for policy in made.values() if isinstance(policy, FixedSchedule))


def drive_turns(policy: Policy, calibration: Calibration) -> str:
    """The steps of a request whose transformers take turns, C computed and f forecast."""
    assert isinstance(policy, FixedSchedule)
    contexts = [Context(calibration.schedule, ("block",), 1, turn.start, len(turn)) for turn in calibration.turns]
    return "".join(drive(policy, context) for context in contexts)


@pytest.mark.parametrize(("switches", "least"), [((6,), 3 + 4), ((4, 8), 3 + 3 + 4), ((9,), 3 + 3), ((11,), 4 + 1)])
def test_turns_begin_with_steps_that_run_and_end_where_the_next_one_begins(
    switches: tuple[int, ...], least: int
) -> None:
    calibration = recorded(outputs_of(1, 12), switches)
    made = FixedSchedule().calibrate(calibration)
    assert made.keys() == set(range(least, 13))
    for count, policy in made.items():
        ran = drive_turns(policy, calibration)
        assert (len(ran), ran.count("C"), ran[-1]) == (12, count, "C")
        assert all(set(ran[turn.start : turn.stop][:3]) == {"C"} for turn in calibration.turns)


def test_a_warm_up_may_last_into_the_second_turn() -> None:
    calibration = recorded(outputs_of(1, 12), (4,))
    made = FixedSchedule().calibrate(calibration, warmup=8)
    assert made.keys() == set(range(9, 13))
    assert all(drive_turns(policy, calibration).startswith("C" * 8) for policy in made.values())
