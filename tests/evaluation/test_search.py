"""The search for a setting, on policies whose effect is known."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import pytest

from foresight.engines.errors import InvalidRequest
from foresight.evaluation.goals import Quality, Speedup
from foresight.evaluation.search import Calibrated, Search, Settings, check_optuna, check_tunable, searched
from foresight.evaluation.summary import Summary
from foresight.runtime.policies import POLICIES, Cycle, Forecast, Foresight, NoReuse, Policy, Static
from foresight.runtime.policies.base import Calibration, SearchRange
from tests.evaluation.summaries import summary
from tests.runtime.test_schedule import schedule_of

pytest.importorskip("optuna")


@dataclass(frozen=True)
class Dial(Policy):
    """A policy with one number that costs quality, and one that does nothing."""

    name: ClassVar[str] = "dial"
    dial: float = field(default=1.0, metadata={"help": "", "search": SearchRange(0.1, 100.0, log=True)})
    colour: str = "red"


class Measured:
    """What a dial does, and how often that was asked."""

    def __init__(self) -> None:
        self.asked: list[Policy] = []

    def __call__(self, policy: Policy) -> Summary:
        self.asked.append(policy)
        assert isinstance(policy, Dial)
        return summary(worst=60 - policy.dial, skipped=policy.dial / 100, speedup=1 + policy.dial / 100)


def best(search: Search, goal: Quality | Speedup) -> float:
    keeping = {policy: done for policy, done in search.tried.items() if goal.margin(done) >= 0}
    policy = max(keeping, key=lambda policy: goal.gain(keeping[policy]))
    assert isinstance(policy, Dial)
    return policy.dial


def test_it_comes_close_to_the_best_setting() -> None:
    search = Search(Settings(Dial(), 50), Measured())
    search.run(Quality(40), 25)
    assert 15 < best(search, Quality(40)) <= 20
    fast = Search(Settings(Dial(), 50), Measured())
    fast.run(Speedup(1.5), 25)
    assert 50 <= best(fast, Speedup(1.5)) < 65


def test_the_same_search_tries_the_same_settings() -> None:
    one, other = Measured(), Measured()
    for measured in (one, other):
        Search(Settings(Dial(), 50), measured).run(Quality(40), 8)
    assert one.asked == other.asked and len(one.asked) == 8


def test_what_was_given_is_tried_first_and_other_settings_stay() -> None:
    measured = Measured()
    Search(Settings(Dial(dial=7.0, colour="blue"), 50), measured).run(Quality(40), 5)
    assert measured.asked[0] == Dial(dial=7.0, colour="blue")
    assert {policy.colour for policy in measured.asked if isinstance(policy, Dial)} == {"blue"}


def test_a_second_goal_knows_what_was_tried_for_the_first() -> None:
    measured = Measured()
    search = Search(Settings(Dial(), 50), measured)
    search.run(Quality(40), 12)
    search.run(Quality(50), 6)
    assert len(measured.asked) == len(set(measured.asked)) <= 18
    assert set(measured.asked) == search.tried.keys()
    assert 5 < best(search, Quality(50)) <= 10


def test_settings_are_short_numbers_within_their_range() -> None:
    measured = Measured()
    Search(Settings(Dial(), 50), measured).run(Quality(40), 20)
    for policy in measured.asked:
        assert isinstance(policy, Dial)
        assert 0.1 <= policy.dial <= 100 and policy.dial == float(f"{policy.dial:.3g}")


def test_settings_that_no_policy_can_have_are_passed_over() -> None:
    tried: list[Cycle] = []

    def measure(policy: Policy) -> Summary:
        assert isinstance(policy, Cycle)
        tried.append(policy)
        return summary(worst=50 - policy.reuse_steps, skipped=policy.reuse_steps / policy.interval)

    Search(Settings(Static(cache="residual"), 50), measure).run(Quality(30), 20)
    assert len(tried) == len(set(tried)) > 2
    assert all(policy.reuse_steps < policy.interval and policy.cache == "residual" for policy in tried)


@pytest.mark.parametrize("kind", POLICIES.values(), ids=list(POLICIES))
def test_what_policies_recommend_lies_in_what_is_searched(kind: type[Policy]) -> None:
    if kind is NoReuse:
        with pytest.raises(InvalidRequest, match="policy: got none, which has nothing to tune"):
            check_tunable(kind())
        return
    check_tunable(kind())
    for settings in ({}, *kind.ladder):
        policy = kind(**settings)
        for name, wanted in searched(policy, 50).items():
            assert wanted.low <= getattr(policy.spelled_out(50), name) <= wanted.high


def test_what_is_searched_is_said_by_the_policy() -> None:
    assert searched(Forecast(), 50).keys() == {"tolerance", "warmup"}
    assert searched(Foresight(), 50).keys() == {"gamma", "reuse_steps", "interval"}


@pytest.mark.parametrize("steps", [1, 2, 5, 30, 50, 100])
def test_a_number_of_steps_is_searched_as_a_share_of_them(steps: int) -> None:
    wanted = searched(Forecast(), steps)["warmup"]
    assert 1 <= wanted.low <= Forecast().warmup_steps(steps) <= wanted.high <= steps
    assert isinstance(wanted.low, int) and isinstance(wanted.high, int)


def test_what_follows_from_the_number_of_steps_is_spelled_out() -> None:
    (first, *_) = Settings(Forecast(), 50).first
    assert first == {"tolerance": Forecast().tolerance, "warmup": 10}
    made = Settings(Forecast(), 50).policy(first)
    assert made == Forecast(warmup=10)


def test_what_users_ask_for_is_searched_beyond_the_usual_range() -> None:
    space = Settings(Forecast(tolerance=0.5, warmup=40), 50)
    assert (space.ranges["tolerance"].high, space.ranges["warmup"].high) == (0.5, 40)
    search = Search(space, lambda policy: summary(worst=30.0))
    search.run(Quality(40), 3)
    search.run(Quality(50), 3)
    assert len(search.tried) == 6


@dataclass(frozen=True)
class Planned(Dial):
    """Made of what was recorded: a dial that says how many steps do not run, and how late the first of them is."""

    name: ClassVar[str] = "planned"
    calibrates: ClassVar[bool] = True
    warmup: int = 0

    def calibrate(self, calibration: Calibration, warmup: int) -> dict[int, Policy]:
        steps = calibration.schedule.steps
        return {run: Planned(dial=float(steps - run), warmup=warmup) for run in range(warmup + 2, steps + 1)}


def test_policies_that_are_calibrated_are_searched_by_how_many_steps_run_first_and_later() -> None:
    recorded = Calibration(schedule_of(50), np.zeros((1, 50, 50)))
    measured = Measured()
    search = Search(Calibrated(Planned(), recorded), measured)
    search.run(Quality(30), 20)
    search.run(Quality(40), 5)
    found = [policy for policy in measured.asked if isinstance(policy, Planned)]
    assert [(policy.warmup, 50 - policy.dial - policy.warmup) for policy in found[:2]] == [(15, 8), (10, 10)]
    assert len(set(found)) == len(found) == 25
    assert 25 <= best(search, Quality(30)) <= 30


def test_without_optuna_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(InvalidRequest, match=r"needs optuna, .*pip install .foresight-engines\[tune\]"):
        check_optuna()
