"""Policies as one word."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foresight.engines.errors import InvalidRequest
from foresight.runtime.policies import POLICIES, FixedSchedule, Forecast, Foresight, NoReuse, Static
from foresight.runtime.policies.notation import policy_from_text, text_of


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("foresight", Foresight()),
        ("foresight:gamma=1,cache=residual", Foresight(gamma=1, cache="residual")),
        ("static:reuse-steps=2, interval = 3", Static(2, 3)),
        ("forecast:tolerance=1e-3,warmup=4", Forecast(0.001, 4)),
        ("none:", NoReuse()),
    ],
)
def test_text_is_read(text: str, policy: object) -> None:
    assert policy_from_text(text) == policy


@pytest.mark.parametrize("name", POLICIES)
def test_defaults_are_left_out(name: str) -> None:
    assert text_of(POLICIES[name]()) == name


@given(st.floats(0.001, 2), st.integers(1, 4), st.integers(5, 9), st.sampled_from(["output", "residual"]))
def test_what_was_written_is_read_again(gamma: float, reuse_steps: int, interval: int, cache: str) -> None:
    policy = Foresight(reuse_steps, interval, gamma=gamma, cache=cache)
    assert policy_from_text(text_of(policy)) == policy


def test_numbers_that_are_the_same_are_written_alike() -> None:
    assert text_of(Foresight(gamma=1.0)) == text_of(Foresight(gamma=1)) == "foresight:gamma=1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("abacus", "policy: got 'abacus', expected one of"),
        ("foresight:gamma", "policy: got 'foresight:gamma', expected a name and each setting once"),
        ("foresight:gamma=1,gamma=2", "policy: got 'foresight:gamma=1,gamma=2', expected"),
        ("foresight:tolerance=1", "tolerance: policy foresight has no such setting"),
        ("foresight:gamma=much", "gamma: got 'much', expected more than 0"),
        ("static:interval=2.5", "interval: got 2.5, expected a whole number"),
        ("foresight:cache=attic", "cache: got 'attic'"),
    ],
)
def test_what_is_no_policy_is_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        policy_from_text(text)
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize("name", POLICIES)
def test_every_rung_of_a_ladder_is_a_policy(name: str) -> None:
    policies = [POLICIES[name](**settings) for settings in POLICIES[name].ladder]
    assert len({text_of(policy) for policy in policies}) == len(policies)
    assert bool(policies) == (name not in (NoReuse.name, FixedSchedule.name))
