"""Which blocks get a slot where not all fit, and what a request with few slots does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foresight.engines.errors import InvalidRequest
from foresight.runtime.budget import Profile, choose_cached, rank_blocks
from foresight.runtime.caches import Layout, find_mode
from foresight.runtime.pipeline import VideoPipeline
from foresight.runtime.policies import Context, Decider, Decision, Foresight, NoReuse, Policy, Static
from tests.support import layout_of, load_pipeline

PROMPT = "a red circle moving right"
ALL = (True,) * 4


def profile(blocks: int, *wanted: set[int]) -> Profile:
    return Profile(blocks, tuple(map(frozenset, wanted)))


@pytest.mark.parametrize(
    ("mode", "wanted", "ranked"),
    [
        ("output", None, [3, 2, 1, 0]),
        ("residual", None, [3, 2, 1, 0]),
        # reusing block 2 twice saves 3 + 3 calls, block 3 once saves 4; with 2 cached, 3 adds 4 and 1 adds 2
        ("output", [{2}, {2}, {3}, {1}], [2, 3, 1, 0]),
        # with 3 cached, 2 adds nothing: whenever it could be reused, so could 3
        ("output", [{2, 3}, {2, 3}, {1}, {0, 1}], [3, 1, 2, 0]),
        ("residual", [{2, 3}, {2}, {2, 0}, {0}], [2, 0, 3, 1]),
    ],
)
def test_slots_go_where_they_save_most(mode: Any, wanted: list[set[int]] | None, ranked: list[int]) -> None:
    assert rank_blocks(find_mode(mode), 4, None if wanted is None else profile(4, *wanted)) == ranked


@pytest.mark.parametrize(
    ("buffers", "cached"),
    [
        (2, (False, False, False, False)),
        (3, (False, False, False, True)),
        (5, (False, True, True, True)),
        (6, (True, True, True, True)),
        (99, (True, True, True, True)),
    ],
)
def test_as_many_blocks_are_cached_as_fit(buffers: int, cached: tuple[bool, ...]) -> None:
    assert choose_cached(layout_of(), ALL, 100, buffers * 100 + 99) == cached


def test_without_a_limit_all_blocks_are_cached() -> None:
    assert choose_cached(layout_of(), ALL[:3], 100) == (True, True, True)


@pytest.mark.parametrize(
    ("layout", "least"), [(layout_of(), 2), (layout_of(fixed=True), 2), (layout_of("residual"), 2)]
)
def test_less_than_a_request_without_slots_needs_is_refused(layout: Layout, least: int) -> None:
    mebi = 2**20
    assert choose_cached(layout, ALL, mebi, least * mebi) == (False,) * 4
    with pytest.raises(InvalidRequest, match=r"cache_memory: got 1\.999999 MiB, expected at least 2\.000000"):
        choose_cached(layout, ALL, mebi, least * mebi - 1)


def test_a_profile_of_another_model_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="cache_profile: got a trace of 5 blocks, this bundle has 4"):
        choose_cached(layout_of(), ALL, 100, 400, profile(5, {1}))


@pytest.mark.parametrize(
    "document", [None, [], {}, {"blocks": [1]}, {"blocks": [1], "steps": [{}]}, {"blocks": 3, "steps": 4}]
)
def test_what_is_no_trace_is_no_profile(document: Any) -> None:
    with pytest.raises(InvalidRequest, match="cache_profile: got no trace"):
        Profile.from_trace(document)


def test_a_profile_knows_what_dead_blocks_would_have_done() -> None:
    step = {
        "decisions": ["dead", "dead", "reused", "computed"],
        "metrics": [1.0, 3.0, 1.0, 5.0],
        "limits": [2.0, 2.0, 2.0, 2.0],
    }
    idle = {"decisions": ["computed"] * 4, "metrics": [1.0] * 4, "limits": [2.0] * 4}
    assert Profile.from_trace({"blocks": list("abcd"), "steps": [step, idle]}) == profile(4, {0, 2}, set())


@given(
    wanted=st.lists(st.sets(st.integers(0, 4)), min_size=1, max_size=6),
    slots=st.integers(1, 4),
)
def test_a_greedy_choice_saves_nearly_what_the_best_one_does(wanted: list[set[int]], slots: int) -> None:
    """Greedy choice of a monotone submodular gain is within 1 - 1/e of the best."""
    from itertools import combinations

    def saved(kept: tuple[int, ...]) -> int:
        return sum(max(step & set(kept), default=-1) + 1 for step in wanted)

    chosen = tuple(rank_blocks(find_mode("output"), 5, profile(5, *wanted))[:slots])
    best = max(saved(kept) for kept in combinations(range(5), slots))
    assert saved(chosen) >= 0.63 * best


class Never(Policy):
    """A policy that is asked as another is, but never reuses some blocks."""

    def __init__(self, policy: Policy, kept: tuple[bool, ...]) -> None:
        self.policy, self.kept = policy, kept

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.policy.name

    @property
    def cache(self) -> str:
        return self.policy.cache

    def begin(self, context: Context) -> Decider:
        return _NeverDecider(self.policy.begin(context), self.kept)


class _NeverDecider(Decider):
    def __init__(self, decider: Decider, kept: tuple[bool, ...]) -> None:
        super().__init__(decider.context)
        self.decider, self.kept = decider, kept

    def plan(self, step: int) -> list[Decision]:
        planned = zip(self.decider.plan(step), self.kept, strict=True)
        return [decision if kept else Decision.COMPUTE for decision, kept in planned]

    def observe(self, step: int, distances: Any) -> None:
        self.decider.observe(step, distances)

    def measures(self) -> Any:
        return self.decider.measures()


def buffer_bytes(pipeline: VideoPipeline) -> int:
    return pipeline.manifest.cache_bytes_per_row[pipeline.manifest.blocks[0].name] * 2


@pytest.mark.parametrize(
    "policy",
    [
        Foresight(gamma=2, warmup=3),
        Foresight(gamma=2, warmup=3, cache="residual"),
        Static(1, 2, warmup=2),
        Static(2, 3, warmup=2, cache="residual"),
        NoReuse(),
    ],
    ids=str,
)
@pytest.mark.parametrize("slots", [0, 1, 3])
def test_few_slots_give_the_bytes_of_a_policy_that_never_reuses_the_others(
    pipeline: VideoPipeline, bundle: Path, policy: Policy, slots: int
) -> None:
    layout, blocks = layout_of(policy.cache), len(pipeline.manifest.blocks)
    small = load_pipeline(bundle, cache_memory=layout.buffers(blocks, slots) * buffer_bytes(pipeline))
    video = small(PROMPT, steps=12, guidance=4.0, policy=policy)
    kept = (False,) * (blocks - slots) + (True,) * slots
    expected = pipeline(PROMPT, steps=12, guidance=4.0, policy=Never(policy, kept))
    assert video.latents.tobytes() == expected.latents.tobytes()
    assert [step.decisions for step in video.trace.steps] == [step.decisions for step in expected.trace.steps]
    assert video.trace.uncached == tuple(block.name for block in pipeline.manifest.blocks[: blocks - slots])
    assert video.trace.cache_bytes == layout.buffers(blocks, slots) * buffer_bytes(pipeline)
    if slots and not isinstance(policy, NoReuse):
        assert video.trace.blocks_reused


def test_a_profile_chooses_the_slots(pipeline: VideoPipeline, bundle: Path) -> None:
    trace = pipeline(PROMPT, steps=12, policy=Static(1, 2, warmup=2)).trace.to_dict()
    for step in trace["steps"]:  # as if only the first block had ever been worth reusing
        step["decisions"] = ["reused" if d == "reused" or d == "dead" else d for d in step["decisions"]][:1] + [
            "computed"
        ] * 3
        step["metrics"], step["limits"] = [None] * 4, [None] * 4
    small = load_pipeline(bundle, cache_memory=3 * buffer_bytes(pipeline), cache_profile=Profile.from_trace(trace))
    video = small(PROMPT, steps=6, policy=NoReuse())
    assert video.trace.uncached == tuple(block.name for block in pipeline.manifest.blocks[1:])


def test_too_little_for_a_request_is_refused_and_leaves_the_pipeline_usable(
    pipeline: VideoPipeline, bundle: Path
) -> None:
    small = load_pipeline(bundle, cache_memory=buffer_bytes(pipeline))  # two for one row, one for two rows
    with pytest.raises(InvalidRequest, match="cache_memory: got"):
        small(PROMPT, steps=2, guidance=4.0)
    assert (
        small(PROMPT, steps=2, guidance=1.0).latents.tobytes()
        == pipeline(PROMPT, steps=2, guidance=1.0, policy=NoReuse()).latents.tobytes()
    )


def test_eliminating_dead_blocks_comes_after_masking(pipeline: VideoPipeline, bundle: Path) -> None:
    """A block that may not be reused must not make those before it dead."""
    blocks = len(pipeline.manifest.blocks)
    small = load_pipeline(bundle, cache_memory=3 * buffer_bytes(pipeline))
    trace = small(PROMPT, steps=4, guidance=4.0, policy=Static(1, 2, warmup=2)).trace
    expected = find_mode("output").eliminate_dead([Decision.COMPUTE] * (blocks - 1) + [Decision.REUSE])
    assert trace.steps[2].decisions == tuple(decision.value for decision in expected)
