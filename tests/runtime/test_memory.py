"""What a request takes: planned from the bundle, compared with what it took; phases loaded one at a time."""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foresight.engines.arrays import Arrays, _available_memory
from foresight.engines.build import build_engines
from foresight.engines.bundle import Bundle, open_bundle
from foresight.engines.errors import Cancelled, EngineError, IntegrityError, InvalidRequest, OutOfMemory
from foresight.engines.manifest import Part, part_files
from foresight.runtime.admission import MemoryReservations, OneAtATime
from foresight.runtime.caches import Layout
from foresight.runtime.memory import plan_memory
from foresight.runtime.pipeline import VideoPipeline
from foresight.runtime.policies import Foresight, NoReuse, Static
from tests.support import (
    CancelAt,
    WatchedEngine,
    copy_bundle,
    fail_at,
    is_block,
    layout_of,
    load_pipeline,
    watched_pipeline,
)

PROMPT = "a red circle moving right"


def test_weights_are_those_of_all_graphs(bundle: Path) -> None:
    manifest = open_bundle(bundle).manifest
    plan = plan_memory(manifest)
    assert plan.weights == sum((bundle / part_files(part)[1]).stat().st_size for part in manifest.parts)
    assert plan.scratch is None


@pytest.mark.parametrize("layout", [layout_of(), layout_of(fixed=True), layout_of("residual")], ids=str)
@pytest.mark.parametrize(("prompts", "guided"), [(1, False), (1, True), (3, True)])
def test_the_cache_is_planned_as_it_is_allocated(bundle: Path, layout: Layout, prompts: int, guided: bool) -> None:
    pipeline = load_pipeline(bundle, fixed_slots=layout.fixed)
    policy = NoReuse(layout.mode.name)
    plan = pipeline.memory(prompts, guided, policy)
    trace = pipeline([PROMPT] * prompts, steps=1, guidance=4.0 if guided else 1.0, policy=policy)[0].trace
    assert plan.cache == trace.cache_bytes
    assert trace.planned_bytes == plan.total
    assert plan.rows == prompts * (2 if guided else 1)


def test_what_is_planned_for_the_arrays_covers_what_they_take(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every array that a request allocates through the seam, as if none were ever freed within a phase."""
    pipeline = load_pipeline(bundle)
    taken: list[int] = []
    empty = Arrays.empty

    def counted(self: Arrays, shape: tuple[int, ...], dtype: str) -> Any:
        made = empty(self, shape, dtype)
        taken.append(made.nbytes)
        return made

    monkeypatch.setattr(Arrays, "empty", counted)
    plan = pipeline.memory(1, True)
    pipeline(PROMPT, steps=3, guidance=4.0)
    assert plan.cache < sum(taken) <= sum(phase.arrays for phase in plan.phases)


def test_a_plan_of_engines_takes_their_own_numbers(wide_bundle: Path, tmp_path: Path) -> None:
    opened = open_bundle(copy_bundle(wide_bundle, tmp_path / "copy"))
    compiled = build_engines(opened, "tensorrt-rtx")
    plan = plan_memory(opened.manifest, compiled=compiled)
    assert plan.weights == compiled.plan_bytes
    assert plan.scratch == compiled.scratch_bytes
    low = plan_memory(opened.manifest, compiled=compiled, low_memory=True)
    assert low.total == max(phase.total for phase in low.phases) < plan.total


def test_with_low_memory_one_phase_is_there_at_a_time(bundle: Path) -> None:
    pipeline, backend = watched_pipeline(bundle, low_memory=True)
    phases = [
        {"text_encoder", "condition"},
        {"prologue", "epilogue", *(block.name for block in pipeline.manifest.blocks)},
        {"vae_decoder"},
    ]
    seen: list[set[str]] = []

    def before(part: str, tensors: Any) -> None:
        alive = {engine.part.name for engine in backend.alive}
        assert part in alive
        if alive not in seen:
            seen.append(alive)

    assert not backend.alive
    backend.before = before
    pipeline(PROMPT, steps=2)
    assert seen == phases
    assert not backend.alive


def test_with_low_memory_the_video_is_the_same(pipeline: VideoPipeline, bundle: Path) -> None:
    settings: dict[str, Any] = {"steps": 8, "policy": Foresight(gamma=2, warmup=2)}
    low = load_pipeline(bundle, low_memory=True)
    for _ in range(2):
        assert low(PROMPT, **settings).frames.tobytes() == pipeline(PROMPT, **settings).frames.tobytes()


def test_with_low_memory_requests_take_turns(pipeline: VideoPipeline, bundle: Path) -> None:
    low, backend = watched_pipeline(bundle, low_memory=True)
    most = len(low.manifest.blocks) + 2

    def before(part: str, tensors: Any) -> None:
        assert len(backend.alive) <= most

    backend.before = before
    expected = [pipeline(PROMPT, steps=3, seed=seed).latents.tobytes() for seed in range(3)]
    got: dict[int, bytes] = {}

    def work(seed: int) -> None:
        got[seed] = low(PROMPT, steps=3, seed=seed).latents.tobytes()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[seed] for seed in range(3)] == expected


def test_with_low_memory_a_request_can_be_cancelled_while_it_waits(pipeline: VideoPipeline, bundle: Path) -> None:
    low, token = load_pipeline(bundle, low_memory=True), threading.Event()
    outcome: list[BaseException] = []

    def wait() -> None:
        try:
            low(PROMPT, steps=3, cancel=token)
        except Cancelled as error:
            outcome.append(error)

    waiting = threading.Thread(target=wait)

    def cancel_the_other(done: int, steps: int, trace: Any) -> None:
        if done == 1:
            waiting.start()
        if done == 2:
            token.set()
            waiting.join()  # ends, though this request still has its turn

    expected = pipeline(PROMPT, steps=3).latents.tobytes()
    assert low(PROMPT, steps=3, on_step=cancel_the_other).latents.tobytes() == expected
    assert "cancelled" in str(outcome[0])


def test_turns_are_taken_in_the_order_in_which_they_were_asked_for() -> None:
    turns, order = OneAtATime(), []
    tokens = [threading.Event() for _ in range(6)]

    def wait(place: int) -> None:
        with suppress(Cancelled), turns.turn(tokens[place]):
            order.append(place)

    threads = [threading.Thread(target=wait, args=(place,)) for place in range(6)]
    with turns.turn(None):
        for place, thread in enumerate(threads):
            thread.start()
            while len(turns._line) < place + 2:
                thread.join(0.001)
        for place in (2, 5):
            tokens[place].set()
            threads[place].join()
    for thread in threads:
        thread.join()
    assert order == [0, 1, 3, 4]
    assert not turns._line


@pytest.mark.parametrize(
    "settings",
    [
        {"latents": np.zeros((4, 3, 8, 9), np.float32)},
        {"latents": np.zeros((4, 3, 8, 8))},
        {"latents": np.full((4, 3, 8, 8), np.nan, np.float32)},
        {"latents": [0.0]},
        {"prompt": "a" * 10**6},
        {"steps": 1000},
    ],
    ids=["shape", "dtype", "finite", "kind", "prompt", "steps"],
)
def test_with_low_memory_what_makes_no_sense_is_refused_before_it_waits(bundle: Path, settings: dict[str, Any]) -> None:
    low, refused = load_pipeline(bundle, low_memory=True), []

    def ask() -> None:
        try:
            wanted: dict[str, Any] = {"prompt": PROMPT, "steps": 1} | settings
            low(**wanted)
        except InvalidRequest as error:
            refused.append(error)

    turns = low._loaded.residency._turns
    assert turns is not None
    thread = threading.Thread(target=ask, daemon=True)
    with turns.turn(None):
        thread.start()
        thread.join(60)
    assert refused


def test_with_low_memory_no_more_engines_are_loaded_once_a_request_is_cancelled(bundle: Path) -> None:
    low, backend = watched_pipeline(bundle, low_memory=True)
    token, load, loaded = threading.Event(), backend.load, []

    def load_and_cancel(bundle: Bundle, part: Part) -> WatchedEngine:
        loaded.append(part.name)
        if part.name == "block.001":
            token.set()
        return load(bundle, part)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "load", load_and_cancel)
        with pytest.raises(Cancelled, match="cancelled while its engines were loaded"):
            low(PROMPT, steps=1, cancel=token)
    assert loaded[-1] == "block.001"
    assert not backend.alive


def test_with_low_memory_a_request_from_inside_another_is_refused(bundle: Path) -> None:
    low = load_pipeline(bundle, low_memory=True)

    def again(done: int, steps: int, trace: Any) -> None:
        with pytest.raises(InvalidRequest, match="request: came from inside another of the same pipeline"):
            low(PROMPT, steps=1)

    low(PROMPT, steps=1, on_step=again)


def test_with_low_memory_files_that_changed_after_loading_are_not_run(bundle: Path, tmp_path: Path) -> None:
    low = load_pipeline(copy_bundle(bundle, tmp_path / "bundle"), low_memory=True)
    low(PROMPT, steps=1)
    weights = low.bundle.file("block.001.data")
    weights.write_bytes(bytes(weights.stat().st_size))
    with pytest.raises(
        IntegrityError, match=r"block\.001\.data was changed or removed after it was verified; load the bundle again"
    ):
        low(PROMPT, steps=1)


class Free(Arrays):
    """A device of which a test says how much is free, in MiB."""

    def __init__(self, free: int, device: str) -> None:
        super().__init__()
        self.device = device
        self.free = free

    def free_bytes(self) -> int:
        return self.free << 20


def admits(memory: MemoryReservations, size: int) -> bool:
    try:
        with memory.reserve(size << 20, 1):
            return True
    except OutOfMemory:
        return False


def test_requests_at_once_are_promised_no_more_memory_than_there_is() -> None:
    memory = MemoryReservations(Free(10, "cpu"))
    with memory.reserve(6 << 20, 1):
        with pytest.raises(
            OutOfMemory, match="got 10 MiB of free memory on cpu and 6 promised to 1 others, expected 5"
        ):
            memory.reserve(5 << 20, 1).__enter__()
        with memory.reserve(4 << 20, 1):
            pass
    with memory.reserve(10 << 20, 1):
        pass


@pytest.mark.parametrize(
    ("allocates", "free_then", "fits"),
    [
        (False, 10, 4),  # has taken nothing yet
        (False, 4, 0),  # others have taken it
        (True, 10, 4),
        (True, 7, 4),  # has taken 3, and will take 3 more
        (True, 4, 4),  # has taken all
        (True, 2, 2),  # has taken all, and others 2
        (True, 0, 0),
        (True, 100, 94),  # memory came back
    ],
)
def test_free_memory_is_read_at_every_admission_and_what_is_taken_is_not_kept_back(
    allocates: bool, free_then: int, fits: int
) -> None:
    arrays = Free(10, "of one pipeline")
    memory = MemoryReservations(arrays)
    with memory.reserve(6 << 20, 1) as running:
        if allocates:
            running.begin_phase()
        arrays.free = free_then
        assert fits == 0 or admits(memory, fits)
        assert not admits(memory, fits + 1)


def test_pipelines_of_one_device_share_its_memory_and_those_of_others_do_not() -> None:
    one, same, other = (MemoryReservations(Free(10, device)) for device in ("shared", "shared", "another"))
    with one.reserve(6 << 20, 1):
        assert not admits(same, 5) and admits(same, 4) and admits(other, 10)
    assert admits(same, 10)


def test_a_new_phase_takes_anew_what_the_one_before_has_freed() -> None:
    arrays = Free(10, "phases")
    memory = MemoryReservations(arrays)
    with memory.reserve(6 << 20, 1) as running:
        running.begin_phase()
        arrays.free = 4
        assert admits(memory, 4)
        arrays.free = 10
        running.begin_phase()
        assert admits(memory, 4) and not admits(memory, 5)


def test_what_a_request_frees_as_it_ends_does_not_hide_what_another_has_taken() -> None:
    arrays = Free(12, "two requests")
    memory = MemoryReservations(arrays)
    first, second = memory.reserve(4 << 20, 1), memory.reserve(4 << 20, 1)
    for request in (first, second):
        request.__enter__().begin_phase()
        arrays.free -= 4
    first.__exit__(None, None, None)
    arrays.free += 4
    assert admits(memory, 8) and not admits(memory, 9)
    second.__exit__(None, None, None)


def test_two_pipelines_at_once_are_promised_no_more_than_there_is(
    bundle: Path, wide_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = load_pipeline(bundle), load_pipeline(wide_bundle)
    free = [one.memory().per_request + other.memory().per_request // 2]
    monkeypatch.setattr(Arrays, "free_bytes", lambda self: free[0])
    outcomes: list[str] = []

    def attempt() -> None:
        try:
            other(PROMPT, steps=1)
            outcomes.append("admitted")
        except OutOfMemory:
            outcomes.append("refused")

    def on_step(done: int, steps: int, trace: Any) -> None:
        attempt()
        free[0] -= one.memory().per_request  # what this request has taken
        attempt()
        free[0] = one.memory().per_request * 100
        attempt()

    one(PROMPT, steps=1, on_step=on_step)
    assert outcomes == ["refused", "refused", "admitted"]
    attempt()
    assert outcomes[-1] == "admitted"


def test_with_low_memory_a_cancelled_or_failed_request_leaves_nothing_behind(
    pipeline: VideoPipeline, bundle: Path
) -> None:
    low, backend = watched_pipeline(bundle, low_memory=True)
    with pytest.raises(Cancelled):
        low(PROMPT, steps=4, cancel=CancelAt(5))
    backend.before = fail_at(3, is_block)
    with pytest.raises(EngineError, match="injected"):
        low(PROMPT, steps=4)
    backend.before = lambda part, tensors: None
    assert low(PROMPT, steps=4).latents.tobytes() == pipeline(PROMPT, steps=4).latents.tobytes()
    assert not backend.alive


def test_a_request_that_does_not_fit_is_refused_before_anything_runs(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, backend = watched_pipeline(bundle)
    backend.before = lambda part, tensors: pytest.fail(f"{part} ran")
    needed = pipeline.memory(2).per_request
    monkeypatch.setattr(type(backend.arrays), "free_bytes", lambda self: needed - 1)
    with pytest.raises(EngineError, match=r"request: got \d+ MiB of free memory on cpu, expected \d+ for 2 prompts"):
        pipeline([PROMPT, PROMPT])
    backend.before = lambda part, tensors: None
    monkeypatch.setattr(type(backend.arrays), "free_bytes", lambda self: needed)
    assert len(pipeline([PROMPT, PROMPT], steps=1)) == 2


def test_memory_that_runs_out_is_an_engine_error_with_the_sizes() -> None:
    arrays = Arrays()
    with (
        pytest.raises(EngineError, match=r"device cpu: out of memory, .*iB for an array.*cache_memory"),
        arrays.active(),
    ):
        arrays.empty((2**48,), "fp32")


def test_a_pipeline_is_usable_after_memory_ran_out(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, backend = watched_pipeline(bundle)
    expected = pipeline(PROMPT, steps=3).latents.tobytes()

    def before(part: str, tensors: Any) -> None:
        if part == "block.001":
            backend.arrays.empty((2**48,), "fp32")

    backend.before = before
    with pytest.raises(EngineError, match="out of memory"):
        pipeline(PROMPT, steps=3)
    backend.before = lambda part, tensors: None
    assert pipeline(PROMPT, steps=3).latents.tobytes() == expected


MEMINFO = "MemTotal:       1000 kB\nMemFree:         100 kB\nMemAvailable:    600 kB\n"


@pytest.mark.parametrize(
    ("files", "available"),
    [
        ({}, 600 * 1024),
        ({"memory.max": "max\n", "memory.current": "5\n"}, 600 * 1024),
        (
            {"memory.max": "500000\n", "memory.current": "300000\n", "memory.stat": "anon 1\ninactive_file 50000\n"},
            250000,
        ),
        ({"memory.max": "5000\n", "memory.current": "6000\n", "memory.stat": "inactive_file 0\n"}, 0),
        ({"memory.max": "5000\n"}, 600 * 1024),
    ],
)
def test_a_container_may_have_less_than_the_machine(tmp_path: Path, files: dict[str, str], available: int) -> None:
    (tmp_path / "meminfo").write_text(MEMINFO)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert _available_memory(tmp_path / "meminfo", tmp_path) == available


@pytest.mark.parametrize("text", ["", "MemTotal: 5 kB\n", "MemAvailable: many kB\n", "nonsense\n"])
def test_memory_that_is_not_known_is_not_checked(tmp_path: Path, text: str) -> None:
    (tmp_path / "meminfo").write_text(text)
    assert _available_memory(tmp_path / "meminfo", tmp_path) is None
    assert _available_memory(tmp_path / "missing", tmp_path) is None


def test_frames_may_stay_on_the_device(pipeline: VideoPipeline, tmp_path: Path) -> None:
    """On the CPU the device is the host: what another library takes over by DLPack are the same frames."""
    video = pipeline(PROMPT, steps=2, to_host=False)
    expected = pipeline(PROMPT, steps=2)
    assert np.from_dlpack(video.frames).tobytes() == expected.frames.tobytes()
    assert np.from_dlpack(video.latents).tobytes() == expected.latents.tobytes()
    video.save(tmp_path / "frames.npy")
    assert np.load(tmp_path / "frames.npy").tobytes() == expected.frames.tobytes()


def test_fixed_slots_change_nothing_but_the_addresses(pipeline: VideoPipeline, bundle: Path) -> None:
    fixed = load_pipeline(bundle, fixed_slots=True)
    for policy in (Foresight(gamma=2, warmup=2), Static(2, 3, warmup=2), NoReuse()):
        video, expected = (p(PROMPT, steps=10, policy=policy) for p in (fixed, pipeline))
        assert video.latents.tobytes() == expected.latents.tobytes()
        blocks = len(pipeline.manifest.blocks)
        assert video.trace.cache_bytes * (blocks + 2) == expected.trace.cache_bytes * (2 * blocks + 1)
