"""All caches against plain ones that copy everything: the same bytes, in a fixed number of buffers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from foresight.engines.arrays import Arrays
from foresight.engines.bundle import open_bundle
from foresight.engines.manifest import TensorSpec
from foresight.runtime.caches import BlockCache, Layout, Pool, create_caches, find_mode
from foresight.runtime.caches.output import FixedOutputCache, OutputCache
from foresight.runtime.caches.residual import ResidualCache
from foresight.runtime.policies import Decision, Foresight
from tests.support import is_block, layout_of, watched_pipeline

C, R, D = Decision.COMPUTE, Decision.REUSE, Decision.DEAD
STREAMS = ("video", "text")
SHAPES: dict[str, tuple[int | str, ...]] = {"video": ("batch", 5), "text": ("batch", 2, 3)}
ARRAYS = Arrays()
Stream = dict[str, Any]
FEW = settings(max_examples=30)  # of many blocks and steps each


Kind = type[OutputCache] | type[FixedOutputCache] | type[ResidualCache]
OUTPUTS: list[Kind] = [OutputCache, FixedOutputCache]
KINDS: list[Kind] = [*OUTPUTS, ResidualCache]
LAYOUTS = {OutputCache: layout_of(), FixedOutputCache: layout_of(fixed=True), ResidualCache: layout_of("residual")}
ONE_BUFFER = 4 * (2 * 5 + 2 * 2 * 3)


def make(kind: Kind, cached: Sequence[bool]) -> BlockCache:
    specs = {name: TensorSpec(name=f"new_{name}", dtype="fp32", shape=SHAPES[name]) for name in STREAMS}
    return kind(Pool(ARRAYS, specs, {"batch": 2}), cached)


def entering(step: int) -> Stream:
    """What the prologue hands to the first block."""
    draw = np.random.default_rng(step)
    return {"video": draw.random((2, 5), np.float32), "text": draw.random((2, 2, 3), np.float32)}


def transform(block: int, step: int, values: Any) -> Any:
    """A block: something that differs by block and step and depends on its input."""
    return np.sin(values * np.float32(1 + block) + np.float32(step)) + values


def run_cache(cache: BlockCache, plans: Sequence[Sequence[Decision]]) -> list[list[Stream]]:
    """The stream after every block that was not dead, copied; blocks write through the given buffers as engines do."""
    return [run_step(cache, plan, step) for step, plan in enumerate(plans)]


def run_step(cache: BlockCache, plan: Sequence[Decision], step: int) -> list[Stream]:
    """One step of `run_cache`."""
    for name, array in cache.enter(step).items():
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
    return seen


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


@dataclass(frozen=True)
class Case:
    """Decisions, and which blocks are cached."""

    plans: list[list[Decision]]
    cached: tuple[bool, ...]


@st.composite
def cases(draw: st.DrawFn, dead: bool) -> Case:
    """Any decisions a request may see: everything is computed first, nothing is reused that was not cached."""
    blocks, steps = draw(st.integers(1, 6)), draw(st.integers(1, 8))
    cached = tuple(draw(st.lists(st.booleans(), min_size=blocks, max_size=blocks) | st.just([True] * blocks)))
    plans = [[C] * blocks]
    for _ in range(steps):
        wanted = draw(st.lists(st.sampled_from([C, R]), min_size=blocks, max_size=blocks))
        plan = [decision if kept else C for decision, kept in zip(wanted, cached, strict=True)]
        plans.append(find_mode("output").eliminate_dead(plan) if dead else plan)
    return Case(plans, cached)


def same(got: list[list[Stream]], expected: list[list[Stream]]) -> bool:
    return all(
        a[name].tobytes() == b[name].tobytes()
        for step_a, step_b in zip(got, expected, strict=True)
        for a, b in zip(step_a, step_b, strict=True)
        for name in STREAMS
    )


@pytest.mark.parametrize("kind", OUTPUTS)
@FEW
@given(case=cases(dead=True) | cases(dead=False))
def test_rotating_outputs_give_the_bytes_of_copied_ones(kind: Kind, case: Case) -> None:
    assert same(run_cache(make(kind, case.cached), case.plans), run_plain(case.plans, residual=False))


@FEW
@given(case=cases(dead=False))
def test_residuals_give_the_bytes_of_copied_ones(case: Case) -> None:
    assert same(run_cache(make(ResidualCache, case.cached), case.plans), run_plain(case.plans, residual=True))


@pytest.mark.parametrize("kind", KINDS)
@FEW
@given(case=cases(dead=False))
def test_two_passes_share_what_no_slot_holds(kind: Kind, case: Case) -> None:
    specs = {name: TensorSpec(name=f"new_{name}", dtype="fp32", shape=SHAPES[name]) for name in STREAMS}
    pool = Pool(ARRAYS, specs, {"batch": 2})
    caches = [kind(pool, case.cached) for _ in range(2)]
    results: list[list[list[Stream]]] = [[], []]
    for step, plan in enumerate(case.plans):
        for cache, seen in zip(caches, results, strict=True):
            seen.append(run_step(cache, plan, step))
            cache.leave()
    expected = run_plain(case.plans, residual=kind is ResidualCache)
    assert same(results[0], expected) and same(results[1], expected)
    layout = replace(LAYOUTS[kind], passes=2)
    assert caches[-1].nbytes == layout.buffers(len(case.cached), sum(case.cached)) * ONE_BUFFER


@dataclass
class Seen:
    """The addresses of one stream tensor that a cache handed out: all, and per block every (input, cached, new)."""

    buffers: set[int] = field(default_factory=set)
    bindings: dict[int, set[tuple[int, ...]]] = field(default_factory=dict)


def watch(cache: BlockCache, case: Case) -> Seen:
    """Run a case and note every address; no block may write to what it reads or to what another has cached."""
    seen, kept = Seen(), dict[int, int]()
    for step, plan in enumerate(case.plans):
        entered = cache.enter(step)
        seen.buffers.add(entered["video"].ctypes.data)
        for array in entered.values():
            array[...] = 0
        for block, decision in enumerate(plan):
            if decision is C:
                tensors, _ = cache.bind(block)
                read, cached, new = (tensors[f"{prefix}video"].ctypes.data for prefix in ("", "cached_", "new_"))
                assert new not in (read, cached)
                assert new not in kept.values(), "a block writes to what is cached"
                seen.bindings.setdefault(block, set()).add((read, cached, new))
                for name in STREAMS:
                    tensors[f"new_{name}"][...] = 0
                cache.commit(block)
                if case.cached[block] and not isinstance(cache, ResidualCache):
                    kept[block] = new
            elif decision is R:
                cache.reuse(block)
            seen.buffers.add(cache.stream["video"].ctypes.data)
    seen.buffers |= {address for bindings in seen.bindings.values() for binding in bindings for address in binding}
    return seen


@pytest.mark.parametrize("kind", KINDS)
@FEW
@given(case=cases(dead=False))
def test_a_block_never_writes_to_what_it_reads_or_to_what_is_cached(kind: Kind, case: Case) -> None:
    seen = watch(make(kind, case.cached), case)
    assert len(seen.buffers) <= LAYOUTS[kind].buffers(len(case.cached), sum(case.cached))


@pytest.mark.parametrize("kind", OUTPUTS)
@FEW
@given(case=cases(dead=True))
def test_outputs_of_dead_blocks_stay_cached(kind: Kind, case: Case) -> None:
    seen = watch(make(kind, case.cached), case)
    assert len(seen.buffers) <= LAYOUTS[kind].buffers(len(case.cached), sum(case.cached))


@FEW
@given(case=cases(dead=True) | cases(dead=False))
def test_with_fixed_slots_a_block_meets_few_addresses(case: Case) -> None:
    """Two inputs times two outputs, and the first run, which has nothing cached."""
    assume(all(case.cached))
    bindings = watch(make(FixedOutputCache, case.cached), case).bindings
    assert max(map(len, bindings.values())) <= 5


@pytest.mark.parametrize("kind", KINDS)
@given(cached=st.lists(st.booleans(), min_size=1, max_size=8))
@settings(max_examples=40)
def test_memory_is_what_the_layout_says(kind: Kind, cached: list[bool]) -> None:
    assert make(kind, cached).nbytes == LAYOUTS[kind].buffers(len(cached), sum(cached)) * ONE_BUFFER


@pytest.mark.parametrize(
    ("layout", "buffers"),
    [(layout_of(), 6), (layout_of(fixed=True), 9), (layout_of("residual"), 7), (layout_of("residual", fixed=True), 7)],
)
def test_four_cached_blocks_need_so_many_buffers(layout: Layout, buffers: int) -> None:
    assert layout.buffers(4, 4) == buffers


@pytest.mark.parametrize("layout", LAYOUTS.values())
@pytest.mark.parametrize("blocks", [1, 4])
def test_slots_are_as_many_as_fit(layout: Layout, blocks: int) -> None:
    for buffers in range(20):
        slots = layout.slots(blocks, buffers)
        assert slots == -1 or layout.buffers(blocks, slots) <= buffers
        assert slots == blocks or layout.buffers(blocks, slots + 1) > buffers


def test_reusing_an_output_is_pointing_at_it() -> None:
    cache = make(OutputCache, (True, True))
    cache.enter(0)
    for block in (0, 1):
        cache.bind(block)
        cache.commit(block)
        cached = cache.stream["video"].ctypes.data
    cache.enter(0)
    cache.reuse(1)
    assert cache.stream["video"].ctypes.data == cached


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_distance_of_a_block_means_nothing(kind: Kind) -> None:
    cache = make(kind, (True,))
    known = []
    for step in range(3):
        for name, array in cache.enter(0).items():
            array[...] = entering(step)[name]
        tensors, meant = cache.bind(0)
        known.append(meant)
        for name in STREAMS:
            tensors[f"new_{name}"][...] = 0
        cache.commit(0)
    assert known == [False, True, True]


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_that_never_ran_is_given_its_own_input(kind: Kind) -> None:
    cache = make(kind, (True,))
    cache.enter(0)
    tensors, _ = cache.bind(0)
    assert tensors["cached_video"] is tensors["video"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_never_computed_cannot_be_reused(kind: Kind) -> None:
    cache = make(kind, (True, True))
    cache.enter(0)
    with pytest.raises(AssertionError, match="must have run"):
        cache.reuse(0)


def test_a_residual_block_is_measured_against_what_reusing_it_would_give() -> None:
    cache = make(ResidualCache, (True,))
    run_cache(cache, [[C]])
    residual = cache.stream["video"] - entering(0)["video"]
    for name, array in cache.enter(0).items():
        array[...] = entering(1)[name]
    tensors, _ = cache.bind(0)
    assert tensors["cached_video"].tobytes() == (entering(1)["video"] + residual).tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_is_made_for_a_bundle_and_a_number_of_rows(bundle: Path, kind: Kind) -> None:
    manifest = open_bundle(bundle).manifest
    (cache,) = create_caches(LAYOUTS[kind], manifest, ARRAYS, 3, [True] * len(manifest.blocks))
    assert type(cache) is kind
    assert cache.enter(0)["hidden"].shape == (3, 3, 16, 40)


def test_a_request_binds_no_more_stream_buffers_than_its_cache_holds(bundle: Path) -> None:
    pipeline, backend = watched_pipeline(bundle)
    addresses: set[int] = set()

    def before(part: str, tensors: Any) -> None:
        if is_block(part):
            addresses.update(tensors[name].ctypes.data for name in ("hidden", "cached_hidden", "new_hidden"))

    backend.before = before
    pipeline("a red circle", steps=12, policy=Foresight(gamma=2))
    assert len(addresses) == len(pipeline.manifest.blocks) + 2
