"""Decisions by hand, and the rules that hold for any distances whatever."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foresight.engines.errors import InvalidRequest
from foresight.runtime.caches import find_mode
from foresight.runtime.policies import (
    POLICIES,
    Cycle,
    Decider,
    Decision,
    Distance,
    Foresight,
    NoReuse,
    Policy,
    Static,
    policy_from_settings,
    policy_settings,
)
from tests.support import context_of

OUTPUT = find_mode("output")
C, R, D = Decision.COMPUTE, Decision.REUSE, Decision.DEAD
LETTERS = {C: "C", R: "r", D: "d"}
Table = Sequence[Sequence[Distance]]  # [step][block][prompt]: the change if the block is computed in that step


def drive(policy: Policy, table: Table, drop_dead: bool = False) -> list[list[Decision]]:
    """The decisions of a request whose blocks, where they are computed, change as `table` says."""
    blocks = len(table[0])
    decider = policy.begin(context_of(len(table), blocks))
    plans = []
    for step, row in enumerate(table):
        plan = decider.plan(step)
        plans.append(OUTPUT.eliminate_dead(plan) if drop_dead else plan)
        known = [plans[-1][block] is C and step > 0 for block in range(blocks)]
        decider.observe(step, [row[block] if known[block] else None for block in range(blocks)])
    return plans


def one_block(policy: Policy, changes: Sequence[float]) -> str:
    """The decisions for a single block and prompt, a letter a step."""
    return "".join(LETTERS[plan[0]] for plan in drive(policy, [[(change,)] for change in changes]))


# The cycle


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (Static(warmup=3), "CCCrCrCrCC"),
        (Static(warmup=2), "CCrCrCrCrC"),
        (Static(warmup=3, reuse_steps=2, interval=3), "CCCrrCrrCC"),
        (Static(warmup=2, reuse_steps=2, interval=3), "CCrrCrrCrC"),
        (Static(warmup=4, reuse_steps=1, interval=4), "CCCCrCCCrC"),
        (Static(warmup=9), "CCCCCCCCCC"),
        (Static(warmup=50), "CCCCCCCCCC"),
        (Static(), "CCrCrCrCrC"),
    ],
)
def test_static_reuses_the_first_steps_of_every_cycle_but_never_the_last_step(policy: Static, expected: str) -> None:
    assert one_block(policy, [1.0] * 10) == expected


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_request_too_short_for_reuse_computes_everything(steps: int) -> None:
    assert one_block(Static(warmup=2), [1.0] * steps) == "C" * steps


def test_static_asks_nothing_of_the_measurements() -> None:
    assert one_block(Static(warmup=3), [math.nan] * 6) == "CCCrCC"


@pytest.mark.parametrize(("steps", "warmup"), [(50, 8), (30, 5), (100, 15), (20, 3), (10, 2), (1, 2)])
def test_warmup_is_fifteen_percent_of_the_steps_rounded_up(steps: int, warmup: int) -> None:
    assert Cycle().warmup_steps(steps) == warmup


@given(steps=st.integers(1, 100))
def test_warmup_is_exact_for_every_number_of_steps(steps: int) -> None:
    assert Cycle().warmup_steps(steps) == max(2, -(-15 * steps // 100))


def test_none_computes_everything() -> None:
    assert one_block(NoReuse(), [0.0] * 8) == "CCCCCCCC"


# Foresight


def test_a_block_is_reused_where_its_last_change_is_within_gamma_lambda() -> None:
    # lambda = 4 + 3/10 + 2/100 = 4.32, limit 2.16; step 5 measures 2.15
    assert one_block(Foresight(warmup=4, gamma=0.5), [0, 2, 3, 4, 9, 2.15, 9, 9]) == "CCCCCCrC"


def test_a_change_beyond_the_limit_is_computed() -> None:
    assert one_block(Foresight(warmup=4, gamma=0.5), [0, 2, 3, 4, 9, 2.17, 9, 9]) == "CCCCCCCC"


@pytest.mark.parametrize(
    ("changes", "limit"),
    [
        ([0, 5.0], 5.0),
        ([0, 5.0, 2.0], 2.5),
        ([0, 5.0, 2.0, 1.0], 1.25),
        ([0, 7.0, 5.0, 2.0, 1.0], 1.25),
    ],
)
def test_lambda_weighs_the_last_three_warmup_changes_newest_first(changes: list[float], limit: float) -> None:
    decider = Foresight(warmup=len(changes), gamma=1.0).begin(context_of(20, 1))
    for step, change in enumerate(changes):
        decider.observe(step, [(change,) if step else None])
    measure = decider.measures()[0]
    assert measure is not None
    assert measure.limit == pytest.approx(limit, rel=1e-12)


def test_the_metric_starts_as_the_last_warmup_change() -> None:
    decider = Foresight(warmup=3).begin(context_of(20, 1))
    for step, change in enumerate([None, (3.0,), (2.0,)]):
        decider.observe(step, [change])
    measure = decider.measures()[0]
    assert measure is not None and measure.metric == 2.0


def test_a_metric_stays_as_it_is_while_its_block_is_reused() -> None:
    # N2R3: reused at 3 and 4 on the same metric, whatever the change would have been
    assert one_block(Foresight(warmup=3, gamma=2, reuse_steps=2, interval=3), [0, 1, 1, 9, 9, 1, 9, 9]) == "CCCrrCrC"


def test_a_block_computed_in_an_eligible_step_may_be_reused_in_the_next() -> None:
    # limit 1.1; step 3 measures at most 1, but is itself decided on the 1.2 that warm-up ended with
    policy = Foresight(warmup=3, gamma=0.5, reuse_steps=2, interval=3)
    assert one_block(policy, [0, 10, 1.2, 1.0, 9, 9, 9, 9]) == "CCCCrCCC"


def test_a_recompute_step_renews_the_metric() -> None:
    assert one_block(Foresight(warmup=3, gamma=1), [0, 1, 1, 9, 5, 9, 1, 9, 9, 9]) == "CCCrCCCrCC"


def test_blocks_are_decided_on_their_own() -> None:
    # at step 3 the limits are 0.5 * (1 + 0.2) and 0.5 * (0.1 + 0.2), the metrics 1 and 0.1
    table = [[(0.0,), (0.0,)], [(2.0,), (2.0,)], [(1.0,), (0.1,)], [(9.0,), (9.0,)], [(9.0,), (9.0,)]]
    assert drive(Foresight(warmup=3, gamma=0.5), table)[3] == [C, R]


def test_a_batch_reuses_only_where_every_prompt_would() -> None:
    # the same block as above, of two prompts at once
    table = [[(0.0, 0.0)], [(2.0, 2.0)], [(1.0, 0.1)], [(9.0, 9.0)], [(9.0, 9.0)]]
    assert drive(Foresight(warmup=3, gamma=0.5), table)[3] == [C]


def test_the_measure_shown_for_a_batch_is_that_of_the_prompt_that_refused() -> None:
    decider = Foresight(warmup=2, gamma=0.5).begin(context_of(10, 1))
    decider.observe(1, [(1.0, 4.0)])
    decider.observe(2, [(100.0, 1.0)])
    measure = decider.measures()[0]
    assert measure is not None and (measure.metric, measure.limit) == (100.0, 0.5)


# What holds for any distances

CHANGES = st.one_of(
    st.just(0.0), st.just(math.inf), st.just(math.nan), st.floats(0, width=32, allow_infinity=False), st.floats(0, 2)
)
CYCLES = st.integers(1, 4).flatmap(
    lambda reuse: st.tuples(st.just(reuse), st.integers(reuse + 1, reuse + 4), st.none() | st.integers(2, 30))
)


@st.composite
def tables(draw: st.DrawFn, changes: st.SearchStrategy[float] = CHANGES) -> Table:
    steps, blocks, prompts = draw(st.integers(1, 24)), draw(st.integers(1, 5)), draw(st.integers(1, 3))
    flat = draw(st.lists(changes, min_size=steps * blocks * prompts, max_size=steps * blocks * prompts))
    values = iter(flat)
    return [[tuple(next(values) for _ in range(prompts)) for _ in range(blocks)] for _ in range(steps)]


@given(table=tables(), cycle=CYCLES, gamma=st.floats(0, 2, exclude_min=True), drop_dead=st.booleans())
def test_never_reuses_in_warmup_in_recompute_steps_or_in_the_last_step(
    table: Table, cycle: tuple[int, int, int | None], gamma: float, drop_dead: bool
) -> None:
    reuse, interval, warmup = cycle
    policy = Foresight(reuse_steps=reuse, interval=interval, warmup=warmup, gamma=gamma)
    first = policy.warmup_steps(len(table))
    for step, plan in enumerate(drive(policy, table, drop_dead)):
        if step < first or step == len(table) - 1 or (step - first) % interval >= reuse:
            assert plan == [C] * len(plan)


@given(table=tables(), cycle=CYCLES, gamma=st.floats(0, 2, exclude_min=True))
def test_reuses_exactly_where_the_paper_says(table: Table, cycle: tuple[int, int, int | None], gamma: float) -> None:
    reuse, interval, warmup = cycle
    policy = Foresight(reuse_steps=reuse, interval=interval, warmup=warmup, gamma=gamma)
    assert drive(policy, table) == plain_foresight(table, reuse, interval, policy.warmup_steps(len(table)), gamma)


def plain_foresight(table: Table, reuse: int, interval: int, warmup: int, gamma: float) -> list[list[Decision]]:
    """The algorithm of FORESIGHT's paper on one table, written down once more and without any state to share."""
    steps, blocks, prompts = len(table), len(table[0]), len(table[0][0])
    decisions = [[C] * blocks for _ in range(steps)]
    for block in range(blocks):
        limits: list[float] = []
        deltas = [math.nan] * prompts
        for step in range(steps):
            eligible = warmup <= step < steps - 1 and (step - warmup) % interval < reuse
            if eligible and all(
                math.isfinite(limit) and delta <= limit for limit, delta in zip(limits, deltas, strict=True)
            ):
                decisions[step][block] = R
                continue
            if step:
                deltas = list(table[step][block])
            if step == warmup - 1:
                known = [table[t][block] for t in range(max(1, warmup - 3), warmup)][::-1]
                weighted = [list(zip((1, 0.1, 0.01), known, strict=False))] * prompts
                limits = [gamma * sum(w * change[p] for w, change in pairs) for p, pairs in enumerate(weighted)]
    return decisions


@given(table=tables(), cycle=CYCLES, bad=st.sampled_from([math.nan, math.inf]), data=st.data())
def test_a_change_that_is_not_finite_never_licenses_reuse(
    table: Table, cycle: tuple[int, int, int | None], bad: float, data: st.DataObject
) -> None:
    reuse, interval, warmup = cycle
    policy = Foresight(reuse_steps=reuse, interval=interval, warmup=warmup, gamma=2)
    block = data.draw(st.integers(0, len(table[0]) - 1))
    prompt = data.draw(st.integers(0, len(table[0][0]) - 1))
    spoilt = [[list(change) for change in row] for row in table]
    for row in spoilt:
        row[block][prompt] = bad
    assert all(plan[block] is C for plan in drive(policy, spoilt))


@given(
    table=tables(),
    cycle=CYCLES,
    gammas=st.tuples(st.floats(0.01, 2), st.floats(0.01, 2)).map(sorted),
    drop_dead=st.booleans(),
)
def test_a_larger_gamma_never_computes_a_block_more_in_any_step(
    table: Table, cycle: tuple[int, int, int | None], gammas: list[float], drop_dead: bool
) -> None:
    """Given what each block would measure in each step, whatever was decided before.

    Within a cycle a reused block stays reused, because its metric stands still, so by induction the larger gamma
    reuses whatever the smaller one does; the recompute step that ends a cycle gives both the same metric again. Dead
    blocks keep their metric too, and the deepest reused block of the larger gamma is never the shallower one. In a
    real request the changes depend on the decisions, and there it is a tendency and not a law.
    """
    reuse, interval, warmup = cycle
    small, large = (
        drive(Foresight(reuse_steps=reuse, interval=interval, warmup=warmup, gamma=gamma), table, drop_dead)
        for gamma in gammas
    )
    for step_small, step_large in zip(small, large, strict=True):
        assert all(b is not C or a is C for a, b in zip(step_small, step_large, strict=True))


@given(table=tables(), cycle=CYCLES, gamma=st.floats(0.01, 2))
def test_a_batch_reuses_a_block_only_if_each_prompt_alone_would(
    table: Table, cycle: tuple[int, int, int | None], gamma: float
) -> None:
    """In the first eligible step, where all have computed the same steps so far."""
    reuse, interval, warmup = cycle
    policy = Foresight(reuse_steps=reuse, interval=interval, warmup=warmup, gamma=gamma)
    first = policy.warmup_steps(len(table))
    if first >= len(table):
        return
    together = drive(policy, table)[first]
    alone = [
        drive(policy, [[(change[prompt],) for change in row] for row in table])[first]
        for prompt in range(len(table[0][0]))
    ]
    assert together == [R if all(plan[block] is R for plan in alone) else C for block in range(len(together))]


def test_requests_of_one_policy_share_nothing() -> None:
    policy = Foresight(warmup=2)
    first, second = policy.begin(context_of(10, 2)), policy.begin(context_of(10, 2))
    first.observe(1, [(1.0,), (1.0,)])
    assert second.measures() == [None, None]


# Dead blocks


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        ("CCCC", "CCCC"),
        ("rCCC", "rCCC"),
        ("CrCC", "drCC"),
        ("rrCC", "drCC"),
        ("CCCr", "dddr"),
        ("rCrC", "ddrC"),
        ("rrrr", "dddr"),
        ("C", "C"),
        ("r", "r"),
        ("", ""),
    ],
)
def test_blocks_before_the_deepest_reused_one_are_dead(plan: str, expected: str) -> None:
    named = {letter: decision for decision, letter in LETTERS.items()}
    assert "".join(LETTERS[d] for d in OUTPUT.eliminate_dead([named[letter] for letter in plan])) == expected


@given(plan=st.lists(st.sampled_from([C, R])))
def test_eliminating_dead_blocks_twice_changes_nothing_more(plan: list[Decision]) -> None:
    once = OUTPUT.eliminate_dead(plan)
    assert OUTPUT.eliminate_dead(once) == once


# Settings


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("foresight", {"reuse_steps": 2, "interval": 2}, "interval: got 2, expected more than reuse_steps"),
        ("foresight", {"reuse_steps": 3}, "interval: got 2"),
        ("static", {"reuse_steps": 2, "interval": 1}, "interval: got 1"),
        ("foresight", {"reuse_steps": 0}, "reuse_steps: got 0"),
        ("static", {"reuse_steps": -1}, "reuse_steps: got -1"),
        ("foresight", {"warmup": 1}, "warmup: got 1, expected 2 or more"),
        ("foresight", {"warmup": 0}, "warmup: got 0"),
        ("static", {"warmup": -5}, "warmup: got -5"),
        ("foresight", {"warmup": 2.5}, "warmup: got 2.5, expected a whole number"),
        ("static", {"interval": 2.5}, "interval: got 2.5, expected a whole number"),
        ("foresight", {"reuse_steps": "1"}, "reuse_steps: got '1', expected a whole number"),
        ("foresight", {"gamma": "x"}, "gamma: got 'x', expected more than 0"),
        ("foresight", {"gamma": 0.0}, "gamma: got 0.0"),
        ("foresight", {"gamma": -1.0}, "gamma: got -1.0"),
        ("foresight", {"gamma": 2.1}, "gamma: got 2.1"),
        ("foresight", {"gamma": math.nan}, "gamma: got nan"),
        ("foresight", {"gamma": math.inf}, "gamma: got inf"),
        ("foresight", {"cache": "input"}, "cache: got 'input', expected output or residual"),
        ("static", {"cache": "input"}, "cache: got 'input'"),
        ("none", {"cache": "input"}, "cache: got 'input'"),
        ("static", {"gamma": 0.5}, "gamma: policy static has no such setting"),
        ("none", {"gamma": 0.5}, "gamma: policy none has no such setting"),
        ("none", {"warmup": 3}, "warmup: policy none has no such setting"),
        ("foresight", {"speed": 2}, "speed: policy foresight has no such setting"),
        ("teacache", {}, f"policy: got 'teacache', expected one of {', '.join(POLICIES)}"),
        ("", {}, "policy: got ''"),
    ],
)
def test_settings_that_make_no_sense_are_refused(name: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        policy_from_settings(name, **settings)


@pytest.mark.parametrize("name", ["foresight", "static", "none"])
def test_settings_left_at_none_are_the_defaults(name: str) -> None:
    policy = policy_from_settings(name, gamma=None, warmup=None, cache=None, reuse_steps=None, interval=None)
    assert policy.name == name and policy == type(policy)()


@pytest.mark.parametrize("gamma", [0.001, 2.0])
def test_gamma_may_be_anything_up_to_two(gamma: float) -> None:
    assert Foresight(gamma=gamma).gamma == gamma


def test_the_defaults_are_the_papers() -> None:
    assert policy_settings(Foresight()) == {
        "name": "foresight",
        "reuse_steps": 1,
        "interval": 2,
        "warmup": None,
        "gamma": 0.5,
        "cache": "output",
    }


@pytest.mark.parametrize("policy", [NoReuse(), Static(), Foresight()])
def test_policies_are_immutable(policy: Policy) -> None:
    with pytest.raises(AttributeError):
        policy.cache = "residual"  # type: ignore[misc]


@settings(max_examples=20)
@given(blocks=st.integers(1, 9), cache=st.sampled_from(["output", "residual"]))
def test_a_plan_has_one_decision_per_block(blocks: int, cache: str) -> None:
    policies: list[Policy] = [NoReuse(cache), Static(), Foresight()]
    deciders: list[Decider] = [policy.begin(context_of(4, blocks)) for policy in policies]
    assert all(len(decider.plan(0)) == len(decider.measures()) == blocks for decider in deciders)
