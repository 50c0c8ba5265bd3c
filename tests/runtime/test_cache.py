"""Both caches against plain ones that copy everything: the same bytes, in a fixed number of buffers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foresight.engines.arrays import Arrays
from foresight.engines.bundle import open_bundle
from foresight.engines.manifest import TensorSpec
from foresight.runtime.cache import BlockCache, OutputCache, ResidualCache, create_cache
from foresight.runtime.policies import Decision, Foresight, eliminate_dead
from tests.support import is_block, watched_pipeline

C, R, D = Decision.COMPUTE, Decision.REUSE, Decision.DEAD
STREAMS = ("video", "text")
SHAPES: dict[str, tuple[int | str, ...]] = {"video": ("batch", 5), "text": ("batch", 2, 3)}
ARRAYS = Arrays("cpu")
Stream = dict[str, Any]


def make(kind: type[OutputCache] | type[ResidualCache], blocks: int, streams: Sequence[str] = STREAMS) -> BlockCache:
    specs = [TensorSpec(name=f"new_{name}", dtype="fp32", shape=SHAPES[name]) for name in streams]
    return kind(ARRAYS, streams, specs, {"batch": 2}, blocks)


def entering(step: int) -> Stream:
    """What the prologue hands to the first block."""
    draw = np.random.default_rng(step)
    return {"video": draw.random((2, 5), np.float32), "text": draw.random((2, 2, 3), np.float32)}


def transform(block: int, step: int, values: Any) -> Any:
    """A block: something that differs by block and step and depends on its input."""
    return np.sin(values * np.float32(1 + block) + np.float32(step)) + values


def run_cache(cache: BlockCache, plans: Sequence[Sequence[Decision]]) -> list[list[Stream]]:
    """The stream after every block that was not dead, copied; blocks write through the given buffers as engines do."""
    results = []
    for step, plan in enumerate(plans):
        for name, array in cache.enter().items():
            array[...] = entering(step)[name]
        seen = []
        for block, decision in enumerate(plan):
            if decision is C:
                tensors, _ = cache.bind(block)
                for name in STREAMS:
                    tensors[f"new_{name}"][...] = transform(block, step, tensors[name])
                cache.commit(block)
            elif decision is R:
                cache.reuse(block)
            if decision is not D:
                seen.append({name: array.copy() for name, array in cache.stream.items()})
        results.append(seen)
    return results


def run_plain(plans: Sequence[Sequence[Decision]], residual: bool) -> list[list[Stream]]:
    """The same with a dictionary and copies."""
    cached: dict[int, Stream] = {}
    results = []
    for step, plan in enumerate(plans):
        stream, seen = entering(step), []
        for block, decision in enumerate(plan):
            if decision is C:
                new = {name: transform(block, step, stream[name]) for name in STREAMS}
                cached[block] = {name: new[name] - stream[name] for name in STREAMS} if residual else new
                stream = new
            elif decision is R:
                kept = cached[block]
                stream = {name: stream[name] + kept[name] if residual else kept[name] for name in STREAMS}
            if decision is not D:
                seen.append({name: array.copy() for name, array in stream.items()})
        results.append(seen)
    return results


@st.composite
def decisions(draw: st.DrawFn, dead: bool) -> list[list[Decision]]:
    """Any decisions a request may see: everything is computed first, nothing is reused that never ran."""
    blocks, steps = draw(st.integers(1, 6)), draw(st.integers(1, 8))
    plans = [[C] * blocks]
    for _ in range(steps):
        plan = draw(st.lists(st.sampled_from([C, R]), min_size=blocks, max_size=blocks))
        plans.append(eliminate_dead(plan) if dead else plan)
    return plans


def same(got: list[list[Stream]], expected: list[list[Stream]]) -> bool:
    return all(
        a[name].tobytes() == b[name].tobytes()
        for step_a, step_b in zip(got, expected, strict=True)
        for a, b in zip(step_a, step_b, strict=True)
        for name in STREAMS
    )


@given(plans=decisions(dead=True) | decisions(dead=False))
def test_rotating_outputs_give_the_bytes_of_copied_ones(plans: list[list[Decision]]) -> None:
    assert same(run_cache(make(OutputCache, len(plans[0])), plans), run_plain(plans, residual=False))


@given(plans=decisions(dead=False))
def test_rotating_residuals_give_the_bytes_of_copied_ones(plans: list[list[Decision]]) -> None:
    assert same(run_cache(make(ResidualCache, len(plans[0])), plans), run_plain(plans, residual=True))


@given(plans=decisions(dead=True))
def test_skipping_dead_blocks_leaves_the_stream_as_if_they_had_run(plans: list[list[Decision]]) -> None:
    whole = make(OutputCache, len(plans[0]))
    results = []
    for step, plan in enumerate(plans):
        stream: Stream = entering(step)
        for name, array in whole.enter().items():
            array[...] = stream[name]
        for block, decision in enumerate(plan):
            if decision is C:
                tensors, _ = whole.bind(block)
                for name in STREAMS:
                    tensors[f"new_{name}"][...] = transform(block, step, tensors[name])
                whole.commit(block)
            elif decision is R:
                whole.reuse(block)
        results.append([{name: array.copy() for name, array in whole.stream.items()}])
    last = [[step[-1]] for step in run_plain(plans, residual=False)]
    assert same(results, last)


@given(plans=decisions(dead=True) | decisions(dead=False), kind=st.sampled_from([OutputCache, ResidualCache]))
def test_a_block_never_writes_to_what_it_reads_or_to_what_is_cached(
    plans: list[list[Decision]], kind: type[OutputCache] | type[ResidualCache]
) -> None:
    if kind is ResidualCache:
        plans = [[C if decision is D else decision for decision in plan] for plan in plans]
    cache = make(kind, len(plans[0]))
    for step, plan in enumerate(plans):
        for name, array in cache.enter().items():
            array[...] = entering(step)[name]
        outputs_of: dict[int, int] = {}
        for block, decision in enumerate(plan):
            if decision is C:
                tensors, _ = cache.bind(block)
                for name in STREAMS:
                    new, read, cached = (tensors[f"{prefix}{name}"] for prefix in ("new_", "", "cached_"))
                    assert not np.shares_memory(new, read)
                    assert not np.shares_memory(new, cached)
                    new[...] = 0
                cache.commit(block)
                if kind is OutputCache:
                    address = cache.stream["video"].ctypes.data
                    assert address not in outputs_of.values(), "two blocks of a step share a slot"
                    outputs_of[block] = address
            elif decision is R:
                cache.reuse(block)


@given(plans=decisions(dead=True) | decisions(dead=False))
@settings(max_examples=50)
def test_outputs_live_in_two_buffers_more_than_there_are_blocks(plans: list[list[Decision]]) -> None:
    blocks = len(plans[0])
    cache = make(OutputCache, blocks)
    addresses = set()
    for plan in plans:
        addresses.add(cache.enter()["video"].ctypes.data)
        for block, decision in enumerate(plan):
            if decision is C:
                tensors, _ = cache.bind(block)
                addresses |= {tensors[name].ctypes.data for name in ("video", "cached_video", "new_video")}
                cache.commit(block)
            elif decision is R:
                cache.reuse(block)
            addresses.add(cache.stream["video"].ctypes.data)
    assert len(addresses) <= blocks + 2


@pytest.mark.parametrize(("kind", "extra"), [(OutputCache, 2), (ResidualCache, 3)])
@pytest.mark.parametrize("blocks", [1, 4])
def test_memory_is_a_buffer_per_block_and_a_few_more(
    kind: type[OutputCache] | type[ResidualCache], extra: int, blocks: int
) -> None:
    one = 4 * (2 * 5 + 2 * 2 * 3)
    assert make(kind, blocks).nbytes == (blocks + extra) * one


def test_reusing_an_output_is_pointing_at_it() -> None:
    cache = make(OutputCache, 2)
    cache.enter()
    for block in (0, 1):
        cache.bind(block)
        cache.commit(block)
        cached = cache.stream["video"].ctypes.data
    cache.enter()
    cache.reuse(1)
    assert cache.stream["video"].ctypes.data == cached


@pytest.mark.parametrize("kind", [OutputCache, ResidualCache])
def test_the_first_distance_of_a_block_means_nothing(kind: type[OutputCache] | type[ResidualCache]) -> None:
    cache = make(kind, 1)
    known = []
    for step in range(3):
        for name, array in cache.enter().items():
            array[...] = entering(step)[name]
        tensors, meant = cache.bind(0)
        known.append(meant)
        for name in STREAMS:
            tensors[f"new_{name}"][...] = 0
        cache.commit(0)
    assert known == [False, True, True]


@pytest.mark.parametrize("kind", [OutputCache, ResidualCache])
def test_a_block_that_never_ran_is_given_its_own_input(kind: type[OutputCache] | type[ResidualCache]) -> None:
    cache = make(kind, 1)
    cache.enter()
    tensors, _ = cache.bind(0)
    assert tensors["cached_video"] is tensors["video"]


@pytest.mark.parametrize("kind", [OutputCache, ResidualCache])
def test_what_was_never_computed_cannot_be_reused(kind: type[OutputCache] | type[ResidualCache]) -> None:
    cache = make(kind, 2)
    cache.enter()
    with pytest.raises(AssertionError, match="must have run"):
        cache.reuse(0)


def test_a_residual_block_is_measured_against_what_reusing_it_would_give() -> None:
    cache = make(ResidualCache, 1)
    run_cache(cache, [[C]])
    residual = cache.stream["video"] - entering(0)["video"]
    for name, array in cache.enter().items():
        array[...] = entering(1)[name]
    tensors, _ = cache.bind(0)
    assert tensors["cached_video"].tobytes() == (entering(1)["video"] + residual).tobytes()


@pytest.mark.parametrize(("mode", "kind"), [("output", OutputCache), ("residual", ResidualCache)])
def test_a_cache_is_made_for_a_bundle_and_a_number_of_rows(bundle: Path, mode: Any, kind: type[object]) -> None:
    cache = create_cache(mode, open_bundle(bundle).manifest, ARRAYS, rows=3)
    assert type(cache) is kind
    assert cache.enter()["hidden"].shape == (3, 3, 16, 40)


def test_a_request_binds_no_more_stream_buffers_than_its_cache_holds(bundle: Path) -> None:
    pipeline, backend = watched_pipeline(bundle)
    addresses: set[int] = set()

    def before(part: str, tensors: Any) -> None:
        if is_block(part):
            addresses.update(tensors[name].ctypes.data for name in ("hidden", "cached_hidden", "new_hidden"))

    backend.before = before
    pipeline("a red circle", steps=12, policy=Foresight(gamma=2))
    assert len(addresses) == len(pipeline.manifest.blocks) + 2
