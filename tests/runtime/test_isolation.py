"""Requests share nothing: whatever else runs, was cancelled or has failed, a request gives the bytes it gives alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from foresight.engines.errors import Cancelled, EngineError
from foresight.engines.interrupt import WATCH, stoppable
from foresight.runtime.pipeline import VideoPipeline
from foresight.runtime.policies import Decision, Forecast, Foresight, NoReuse, Policy
from foresight.runtime.video import Video
from tests.support import CancelAt, WatchedBackend, fail_at, watched_pipeline

STEPS = 6
LOOKS_BEFORE = 4  # at the cancel token, before the first block: at the beginning, before each text, and after them
POLICIES: dict[str, Policy] = {
    "none": NoReuse(),
    "foresight-output": Foresight(gamma=2, warmup=2),
    "foresight-residual": Foresight(gamma=2, warmup=2, cache="residual"),
    "forecast": Forecast(tolerance=10, warmup=2),
}
TIMEOUT_S = 60  # of a barrier that is never reached, so that a broken test ends


@pytest.fixture(params=POLICIES)
def policy(request: pytest.FixtureRequest) -> Policy:
    return POLICIES[request.param]


def first(pipeline: VideoPipeline, policy: Policy, **settings: Any) -> Video:
    return pipeline("a red circle moving right", steps=STEPS, guidance=4, seed=1, policy=policy, **settings)


def second(pipeline: VideoPipeline, policy: Policy, **settings: Any) -> Video:
    return pipeline("a dog", steps=STEPS + 1, guidance=1, seed=2, policy=policy, **settings)


def content(video: Video) -> tuple[bytes, bytes]:
    return video.latents.tobytes(), video.frames.tobytes()


def decisions(video: Video) -> list[tuple[str, ...]]:
    return [step.decisions for step in video.trace.steps]


def test_these_requests_do_reuse(pipeline: VideoPipeline) -> None:
    for name in ("foresight-output", "foresight-residual"):
        assert first(pipeline, POLICIES[name]).trace.count(Decision.REUSE) > 0
        assert second(pipeline, POLICIES[name]).trace.count(Decision.REUSE) > 0
    assert first(pipeline, POLICIES["forecast"]).trace.count(Decision.FORECAST) > 0
    assert second(pipeline, POLICIES["forecast"]).trace.count(Decision.FORECAST) > 0


def test_the_same_request_twice_gives_the_same_bytes(pipeline: VideoPipeline, policy: Policy) -> None:
    assert content(first(pipeline, policy)) == content(first(pipeline, policy))


def test_the_same_request_twice_makes_the_same_decisions(pipeline: VideoPipeline, policy: Policy) -> None:
    assert decisions(first(pipeline, policy)) == decisions(first(pipeline, policy))


def test_two_pipelines_of_one_bundle_give_the_same_bytes(pipeline: VideoPipeline, bundle: Path, policy: Policy) -> None:
    other, _ = watched_pipeline(bundle)
    assert content(first(pipeline, policy)) == content(first(other, policy))


def test_another_request_in_between_changes_nothing(pipeline: VideoPipeline, policy: Policy) -> None:
    before = content(first(pipeline, policy))
    second(pipeline, policy)
    assert content(first(pipeline, policy)) == before


def test_what_a_caller_does_to_its_video_reaches_nobody_else(pipeline: VideoPipeline, policy: Policy) -> None:
    video = first(pipeline, policy)
    before = content(video)
    video.latents[...] = 0
    video.frames[...] = 0
    assert content(first(pipeline, policy)) == before


def test_requests_in_many_threads_give_the_bytes_they_give_alone(pipeline: VideoPipeline, policy: Policy) -> None:
    alone = [content(first(pipeline, policy)), content(second(pipeline, policy))]
    calls: list[Callable[[], Video]] = [lambda: first(pipeline, policy), lambda: second(pipeline, policy)] * 4
    assert at_once(calls) == alone * 4


def test_requests_in_lockstep_give_the_bytes_they_give_alone(pipeline: VideoPipeline, policy: Policy) -> None:
    """Both finish their step t before either begins its step t + 1."""
    alone = [content(request(pipeline, policy)) for request in (first, first)]
    barrier = threading.Barrier(2)

    def together() -> Video:
        return first(pipeline, policy, on_step=lambda done, steps, trace: barrier.wait(TIMEOUT_S))

    assert at_once([together, together]) == alone


def test_requests_that_alternate_block_by_block_give_the_bytes_they_give_alone(
    pipeline: VideoPipeline, policy: Policy
) -> None:
    alone = [content(first(pipeline, policy)), content(second(pipeline, policy))]
    turns = Turns(2)

    def taking_turns(me: int, request: Callable[..., Video]) -> Video:
        try:
            return request(pipeline, policy, cancel=turns.token(me))
        finally:
            turns.leave(me)

    assert at_once([lambda: taking_turns(0, first), lambda: taking_turns(1, second)]) == alone


def looks_in_steps(pipeline: VideoPipeline, policy: Policy) -> list[str]:
    """What is said where the first request is cancelled at a block, or before a step's forecast, in order."""
    return [
        f"in step {step} of {STEPS}, before {when}"
        for step, row in enumerate(decisions(first(pipeline, policy)), 1)
        for when in (["its forecast"] if "forecast" in row else [f"block {block}" for block in range(4)])
    ]


@pytest.mark.parametrize("look", range(STEPS * 4))
def test_a_request_after_one_that_was_cancelled_anywhere_is_as_if_alone(
    pipeline: VideoPipeline, policy: Policy, look: int
) -> None:
    looks = looks_in_steps(pipeline, policy)
    place = look % len(looks)
    alone = content(second(pipeline, policy))
    with pytest.raises(Cancelled, match=f"cancelled {looks[place]}"):
        first(pipeline, policy, cancel=CancelAt(LOOKS_BEFORE + place))
    assert content(second(pipeline, policy)) == alone


@pytest.mark.parametrize(
    ("look", "in_steps", "when"),
    [
        (0, False, "before it began"),
        (1, False, "while its text was prepared"),
        (2, False, "while its text was prepared"),
        (3, False, "before its first step"),
        (LOOKS_BEFORE, True, "before its frames were decoded"),
        (LOOKS_BEFORE + 1, True, "while its frames were decoded"),
    ],
)
def test_a_request_can_be_cancelled_in_every_phase(
    pipeline: VideoPipeline, policy: Policy, look: int, in_steps: bool, when: str
) -> None:
    alone = content(second(pipeline, policy))
    before = len(looks_in_steps(pipeline, policy)) if in_steps else 0
    with pytest.raises(Cancelled, match=f"request: cancelled {when}"):
        first(pipeline, policy, cancel=CancelAt(look + before))
    assert content(second(pipeline, policy)) == alone


def test_a_token_that_is_never_set_changes_nothing(pipeline: VideoPipeline, policy: Policy) -> None:
    token = CancelAt(1 << 30)
    assert content(first(pipeline, policy, cancel=token)) == content(first(pipeline, policy))
    chunks = sum(len(stage.chunks) for stage in pipeline.manifest.decoder)
    assert token.looked == LOOKS_BEFORE + len(looks_in_steps(pipeline, policy)) + 1 + chunks


def test_a_token_set_beforehand_stops_the_request_before_anything_runs(bundle: Path) -> None:
    pipeline, backend = watched_pipeline(bundle)
    ran: list[str] = []
    backend.before = lambda part, tensors: ran.append(part)
    token = threading.Event()
    token.set()
    with pytest.raises(Cancelled):
        first(pipeline, NoReuse(), cancel=token)
    assert ran == []


@pytest.fixture(scope="module")
def watched(bundle: Path) -> tuple[VideoPipeline, WatchedBackend]:
    return watched_pipeline(bundle)


@pytest.mark.parametrize("part", ["text_encoder", "condition", "prologue", "epilogue", "vae_decoder"])
def test_a_request_after_one_whose_other_part_failed_is_as_if_alone(
    watched: tuple[VideoPipeline, WatchedBackend], policy: Policy, part: str
) -> None:
    pipeline, backend = watched
    with healthy(backend):
        alone = content(second(pipeline, policy))
    backend.before = fail_at(0, lambda name: name == part)
    with pytest.raises(EngineError, match=f"{part}: injected fault"):
        first(pipeline, policy)
    with healthy(backend):
        assert content(second(pipeline, policy)) == alone


@pytest.mark.parametrize("step", [0, 3, STEPS - 1])
@pytest.mark.parametrize("block", range(4))
def test_a_request_after_one_whose_block_failed_is_as_if_alone(
    watched: tuple[VideoPipeline, WatchedBackend], policy: Policy, block: int, step: int
) -> None:
    pipeline, backend = watched
    with healthy(backend):
        alone = content(second(pipeline, policy))
        # how often the block runs before the step it is to fail in
        runs = sum(row[block] == "computed" for row in decisions(first(pipeline, policy))[:step])
    backend.before = fail_at(runs, lambda name: name == f"block.{block:03d}")
    with pytest.raises(EngineError, match=f"block.{block:03d}: injected fault"):
        first(pipeline, policy)
    with healthy(backend):
        assert content(second(pipeline, policy)) == alone


def test_an_error_in_on_step_reaches_the_caller_and_leaves_the_pipeline_usable(
    pipeline: VideoPipeline, policy: Policy
) -> None:
    def complain(done: int, steps: int, trace: object) -> None:
        if done == 3:
            raise LookupError("injected")

    alone = content(second(pipeline, policy))
    with pytest.raises(LookupError, match="injected"):
        first(pipeline, policy, on_step=complain)
    assert content(second(pipeline, policy)) == alone


@pytest.mark.parametrize("part", ["text_encoder", "condition", "prologue", "block.001", "epilogue", "vae_decoder"])
def test_a_part_that_runs_is_ended_when_its_request_is_cancelled(
    watched: tuple[VideoPipeline, WatchedBackend], part: str
) -> None:
    """As an engine that can be stopped would be, and would run for ever otherwise."""
    pipeline, backend = watched
    token, stop = threading.Event(), threading.Event()

    def run_for_ever(name: str, tensors: object) -> None:
        if name == part:
            token.set()
            with stoppable(stop.set) as run:
                assert stop.wait(TIMEOUT_S) and run.stopped
            raise Cancelled(f"request: cancelled while {name} ran")

    with healthy(backend):
        alone = content(second(pipeline, NoReuse()))
    backend.before = run_for_ever
    with pytest.raises(Cancelled, match=f"cancelled while {part} ran"):
        first(pipeline, NoReuse(), cancel=token)
    with healthy(backend):
        assert content(second(pipeline, NoReuse())) == alone
    assert WATCH not in {thread.name for thread in threading.enumerate()}


def test_one_request_may_fail_while_another_runs(watched: tuple[VideoPipeline, WatchedBackend], policy: Policy) -> None:
    pipeline, backend = watched
    with healthy(backend):
        alone = content(first(pipeline, policy))
        results: list[Any] = []

        def fail_inside(done: int, steps: int, trace: object) -> None:
            if done == 3:
                with pytest.raises(Cancelled):
                    second(pipeline, policy, cancel=CancelAt(5))
                results.append(content(second(pipeline, policy)))

        assert content(first(pipeline, policy, on_step=fail_inside)) == alone
        assert results == [content(second(pipeline, policy))]


class healthy:
    """Inside, the backend's engines do not fail."""

    def __init__(self, backend: WatchedBackend) -> None:
        self.backend = backend

    def __enter__(self) -> None:
        self.backend.before = lambda part, tensors: None

    def __exit__(self, *caught: object) -> None:
        self.backend.before = lambda part, tensors: None


class Turns:
    """Lets requests advance one block at a time, in turn: each waits inside its cancel token until it is its turn."""

    def __init__(self, players: int) -> None:
        self.playing = list(range(players))
        self.turn = 0
        self.changed = threading.Condition()

    def token(self, me: int) -> _Turn:
        return _Turn(self, me)

    def leave(self, me: int) -> None:
        with self.changed:
            following = self._after(me)
            self.playing.remove(me)
            if self.turn == me:
                self.turn = following
            self.changed.notify_all()

    def wait(self, me: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.turn == me, TIMEOUT_S), "nobody moved"
            self.turn = self._after(me)
            self.changed.notify_all()

    def _after(self, me: int) -> int:
        return self.playing[(self.playing.index(me) + 1) % len(self.playing)]


class _Turn:
    def __init__(self, turns: Turns, me: int) -> None:
        self.turns, self.me = turns, me

    def is_set(self) -> bool:
        if threading.current_thread().name != WATCH:
            self.turns.wait(self.me)
        return False


def at_once(calls: list[Callable[[], Video]]) -> list[tuple[bytes, bytes]]:
    """The videos of calls that run in a thread each."""
    results: dict[int, tuple[bytes, bytes]] = {}

    def run(index: int, call: Callable[[], Video]) -> None:
        results[index] = content(call())

    threads = [threading.Thread(target=run, args=item, daemon=True) for item in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * TIMEOUT_S)
    return [results[index] for index in range(len(calls))]
