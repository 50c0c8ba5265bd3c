"""A pipeline's end: closing it, leaving Python, and forks; nothing aborts, hangs, or is lost."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from foresight.engines.errors import Cancelled, InvalidRequest
from foresight.engines.interrupt import stoppable
from foresight.runtime.pipeline import VideoPipeline
from foresight.runtime.request import VideoRequest
from foresight.runtime.video import Video
from tests.support import BACKEND, WatchedBackend, load_pipeline, watched_pipeline

TIMEOUT_S = 60
on_the_cpu = pytest.mark.skipif(BACKEND != "onnxruntime", reason="what a process does to sessions on the CPU")


class Held:
    """A request that waits inside its first step until it is let go."""

    def __init__(self, pipeline: VideoPipeline, pool: ThreadPoolExecutor) -> None:
        self.inside, self.go = threading.Event(), threading.Event()
        self.video: Future[Video] = pool.submit(lambda: pipeline("a dog", steps=2, on_step=self.wait))
        assert self.inside.wait(TIMEOUT_S)

    def wait(self, done: int, total: int, trace: object) -> None:
        self.inside.set()
        assert self.go.wait(TIMEOUT_S)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


@pytest.fixture(params=[False, True], ids=["", "low_memory"])
def watched(single_bundle: Path, request: pytest.FixtureRequest) -> tuple[VideoPipeline, WatchedBackend]:
    return watched_pipeline(single_bundle, low_memory=request.param)


@pytest.fixture
def single(watched: tuple[VideoPipeline, WatchedBackend]) -> VideoPipeline:
    return watched[0]


def test_after_close_requests_are_refused_and_nothing_is_left(watched: tuple[VideoPipeline, WatchedBackend]) -> None:
    pipeline, backend = watched
    pipeline("a dog", steps=1)
    assert not pipeline.closed and pipeline.close() and pipeline.closed
    gc.collect()
    assert not backend.alive
    with pytest.raises(InvalidRequest, match=r"pipeline: got a request after close\(\).*load the bundle again"):
        pipeline("a dog", steps=1)
    with pytest.raises(InvalidRequest, match="after close"), pipeline:
        pass
    assert pipeline.close(cancel=True, timeout=0)


def test_close_waits_for_the_requests_that_run(single: VideoPipeline, pool: ThreadPoolExecutor) -> None:
    held = Held(single, pool)
    closing = pool.submit(single.close)
    held.go.set()
    assert closing.result(TIMEOUT_S)
    assert held.video.result(0).frames.any()


def test_when_the_time_is_up_the_request_goes_on_and_then_all_is_free(
    watched: tuple[VideoPipeline, WatchedBackend], pool: ThreadPoolExecutor
) -> None:
    pipeline, backend = watched
    held = Held(pipeline, pool)
    assert not pipeline.close(timeout=0.01)
    with pytest.raises(InvalidRequest, match="after close"):
        pipeline("a dog", steps=1)
    held.go.set()
    assert held.video.result(TIMEOUT_S).frames.any()
    assert pipeline.close(timeout=TIMEOUT_S)
    del held
    gc.collect()
    assert not backend.alive


def test_requests_can_be_cancelled_by_close_and_are_told_why(
    watched: tuple[VideoPipeline, WatchedBackend], pool: ThreadPoolExecutor
) -> None:
    pipeline, _ = watched
    held = Held(pipeline, pool)
    closing = [pool.submit(pipeline.close, cancel=True) for _ in range(3)]
    _until_cancelled(pipeline)
    held.go.set()
    assert all(future.result(TIMEOUT_S) for future in closing)
    with pytest.raises(Cancelled, match=r"^request: cancelled .* step .*, as its pipeline was closed$"):
        held.video.result(TIMEOUT_S)


def test_a_request_that_waits_for_its_turn_is_cancelled_too(single_bundle: Path, pool: ThreadPoolExecutor) -> None:
    pipeline = load_pipeline(single_bundle, low_memory=True)
    held = Held(pipeline, pool)
    waiting = pool.submit(pipeline, "a dog", steps=1)
    while len(pipeline._life._running) < 2:
        assert not waiting.done()
    assert not pipeline.close(cancel=True, timeout=0)
    with pytest.raises(Cancelled, match="as its pipeline was closed"):
        waiting.result(TIMEOUT_S)
    held.go.set()
    assert pipeline.close(timeout=TIMEOUT_S)


@pytest.mark.parametrize("cancel", [False, True])
def test_close_inside_a_callback_does_not_wait_for_its_own_request(single: VideoPipeline, cancel: bool) -> None:
    told: list[bool] = []
    if cancel:
        with pytest.raises(Cancelled, match="after step 1 of 2, as its pipeline was closed"):
            single("a dog", steps=2, on_step=lambda *_: told.append(single.close(cancel=True)))
        assert told == [False]
    else:
        assert single("a dog", steps=2, on_step=lambda *_: told.append(single.close())).frames.any()
        assert told == [False, False]
    assert single.close(timeout=0)


def test_a_signal_handler_may_close_while_a_request_runs(single: VideoPipeline) -> None:
    before = signal.signal(signal.SIGUSR1, lambda *_: single.close(cancel=True) and None)
    try:
        with pytest.raises(Cancelled, match="as its pipeline was closed"):
            single("a dog", steps=5, on_step=lambda *_: signal.raise_signal(signal.SIGUSR1))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert single.close(timeout=0)


def test_a_with_block_closes(single: VideoPipeline) -> None:
    with single as pipeline:
        assert pipeline is single
        assert pipeline("a dog", steps=1).frames.any()
    assert pipeline.closed


def test_a_with_block_left_by_an_error_cancels_what_runs(single: VideoPipeline, pool: ThreadPoolExecutor) -> None:
    held = Held(single, pool)

    def let_go() -> None:
        _until_cancelled(single)
        held.go.set()

    pool.submit(let_go)
    with pytest.raises(LookupError), single:
        raise LookupError
    with pytest.raises(Cancelled, match="as its pipeline was closed"):
        held.video.result(TIMEOUT_S)


def _until_cancelled(pipeline: VideoPipeline) -> None:
    while pipeline._life.why is None:
        pass


@pytest.mark.parametrize("timeout", [-1, float("nan"), "soon"])
def test_a_timeout_that_is_no_time_is_refused(single: VideoPipeline, timeout: Any) -> None:
    with pytest.raises(InvalidRequest, match="timeout: got .*, expected seconds of 0 or more, or None"):
        single.close(timeout=timeout)
    assert not single.closed
    assert single.close(timeout=float("inf"))


def test_a_kept_error_of_a_cancelled_request_keeps_no_engine(watched: tuple[VideoPipeline, WatchedBackend]) -> None:
    pipeline, backend = watched

    def close(done: int, total: int, trace: object) -> None:
        pipeline.close(cancel=True)

    with pytest.raises(Cancelled) as kept:
        pipeline("a dog", steps=2, on_step=close)
    gc.collect()
    assert kept.value is not None and not backend.alive


def test_a_pipeline_that_nobody_holds_is_gone_without_being_closed(
    watched: tuple[VideoPipeline, WatchedBackend], single_bundle: Path
) -> None:
    pipeline, backend = watched_pipeline(single_bundle)
    pipeline("a dog", steps=1)
    gone = weakref.ref(pipeline)
    del pipeline
    assert gone() is None and not backend.alive


def test_a_pipeline_that_is_sent_to_another_process_says_what_to_do(single: VideoPipeline) -> None:
    for copied in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(InvalidRequest, match="cannot be copied or sent to another process; load the bundle there"):
            copied(single)


def outcome(code: str, *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a Python program."""
    program = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", textwrap.dedent(code), *map(str, arguments)]
    run = subprocess.run(program, check=False, capture_output=True, text=True, timeout=TIMEOUT_S)
    return run.returncode, run.stdout, run.stderr


@on_the_cpu
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and glibc gives memory back")
def test_close_gives_memory_back_to_the_system(demo_bundle: Path) -> None:
    code = """
        import pathlib, sys, foresight
        resident = lambda: int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096
        pipeline = foresight.load(sys.argv[1], threads=1)
        before = resident()
        pipeline.close()
        print(before - resident() > pipeline.memory().weights)
    """
    assert outcome(code, demo_bundle) == (0, "True\n", "")


IN_REQUESTS = """
    import sys, threading, foresight
    from foresight.engines.backend import create_backend
    from foresight.engines.bundle import open_bundle
    from foresight.runtime.pipeline import VideoPipeline
    begun = threading.Semaphore(0)
    def endless(pipeline):
        while True:
            pipeline("a dog", steps=20, on_step=lambda *_: begun.release())
    def loading():
        while True:
            VideoPipeline(open_bundle(sys.argv[1]), create_backend(threads=1))
    for settings in ({}, {}, {"low_memory": True}):
        pipeline = foresight.load(sys.argv[1], threads=2, **settings)
        for _ in range(2):
            threading.Thread(target=endless, args=[pipeline], daemon=True).start()
    threading.Thread(target=loading, daemon=True).start()
    for _ in range(6):
        begun.acquire()
    print("end")
"""


@on_the_cpu
@pytest.mark.parametrize("attempt", range(2))
def test_python_ends_while_daemon_threads_are_inside_engines(single_bundle: Path, attempt: int) -> None:
    assert outcome(IN_REQUESTS, single_bundle) == (0, "end\n", "")


@on_the_cpu
def test_python_ends_while_a_callback_never_returns(single_bundle: Path) -> None:
    code = """
        import sys, threading, foresight
        inside = threading.Event()
        stuck = lambda *_: (inside.set(), threading.Event().wait())
        pipeline = foresight.load(sys.argv[1])
        threading.Thread(target=lambda: pipeline("a dog", steps=2, on_step=stuck), daemon=True).start()
        inside.wait()
        sys.exit(3)
    """
    assert outcome(code, single_bundle) == (3, "", "")


@on_the_cpu
def test_requests_of_other_threads_are_finished_before_python_ends(single_bundle: Path) -> None:
    code = """
        import sys, threading, foresight
        pipeline = foresight.load(sys.argv[1])
        threading.Thread(target=lambda: print(pipeline("a dog", steps=20).frames.shape)).start()
    """
    exit_code, out, err = outcome(code, single_bundle)
    assert (exit_code, err) == (0, "") and out.startswith("(")


FORKED = """
    import gc, os, sys, threading, foresight
    pipeline, other = foresight.load(sys.argv[1], threads=2), foresight.load(sys.argv[1], low_memory=True)
    video, stop, begun = pipeline("a dog", steps=2), threading.Event(), threading.Semaphore(0)
    def busy(pipeline):
        while not stop.is_set():
            pipeline("a dog", steps=4, on_step=lambda *_: begun.release())
    threads = [threading.Thread(target=busy, args=[pipeline]) for pipeline in (pipeline, other)]
    for thread in threads:
        thread.start()
    for _ in range(10):
        begun.acquire()
    if not (child := os.fork()):
        for inherited in (pipeline, other):
            try:
                inherited("a dog", steps=2)
            except foresight.InvalidRequest as error:
                print(str(error).partition("; ")[2])
            assert inherited.close()
        del pipeline, other, inherited
        gc.collect()
        with foresight.load(sys.argv[1], threads=2) as own:
            print(own("a dog", steps=2).frames.tobytes() == video.frames.tobytes(), flush=True)
        sys.exit(7)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    stop.set()
    print(code, pipeline("a dog", steps=2).frames.tobytes() == video.frames.tobytes())
"""
REMEDY = "load it after the fork, or start processes with multiprocessing's spawn"


@on_the_cpu
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_is_refused_what_it_inherited_and_ends(single_bundle: Path) -> None:
    assert outcome(FORKED, single_bundle) == (0, f"{REMEDY}\n{REMEDY}\nTrue\n7 True\n", "")


@on_the_cpu
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_is_refused_the_runtime_and_waits_for_no_job(single_bundle: Path) -> None:
    code = """
        import os, sys, foresight
        runtime, request = foresight.Runtime(threads=1), foresight.VideoRequest("a dog", steps=50)
        runtime.load(sys.argv[1], "tiny")
        job = runtime.submit("tiny", request)
        if not (child := os.fork()):
            for inherited in (lambda: runtime.submit("tiny", request), job.result, lambda: runtime.load(sys.argv[1])):
                try:
                    inherited()
                except foresight.InvalidRequest as error:
                    print(str(error).partition("; ")[2], flush=True)
            sys.exit(7 if runtime.close() else 8)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), len(job.result()), runtime.close())
    """
    assert outcome(code, single_bundle) == (0, f"{REMEDY}\n" * 3 + "7 1 True\n", "")


@on_the_cpu
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("low_memory", [False, True])
def test_a_callback_may_fork(single_bundle: Path, low_memory: bool) -> None:
    code = """
        import os, sys, foresight
        pipeline, children = foresight.load(sys.argv[1], low_memory=sys.argv[2] == "True"), []
        try:
            video = pipeline("a dog", steps=2, on_step=lambda *_: children.append(os.fork()))
        except foresight.InvalidRequest as error:
            sys.exit(str(error).partition("; ")[2] != sys.argv[3])
        print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children], video.frames.any())
    """
    assert outcome(code, single_bundle, low_memory, REMEDY) == (0, "[0, 0] True\n", "")


@on_the_cpu
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_pools_of_processes_work_and_end(single_bundle: Path, tmp_path: Path, method: str) -> None:
    script = tmp_path / "pool.py"
    script.write_text(
        textwrap.dedent("""
            import multiprocessing, sys, foresight
            def make(bundle):
                with foresight.load(bundle, threads=1) as pipeline:
                    return bool(pipeline("a dog", steps=1).frames.any())
            if __name__ == "__main__":
                pipeline = foresight.load(sys.argv[1])
                pipeline("a dog", steps=1)
                with multiprocessing.get_context(sys.argv[2]).Pool(2) as pool:
                    print(pool.map(make, [sys.argv[1]] * 3))
        """)
    )
    program = [sys.executable, str(script), str(single_bundle), method]
    run = subprocess.run(program, check=False, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert (run.returncode, run.stdout, run.stderr) == (0, "[True, True, True]\n", "")


def test_engines_are_run_by_nobody_once_a_pipeline_is_closed(
    watched: tuple[VideoPipeline, WatchedBackend], pool: ThreadPoolExecutor
) -> None:
    pipeline, backend = watched
    ran: list[str] = []
    held = Held(pipeline, pool)
    pipeline.close(cancel=True, timeout=0)

    def note(part: str, tensors: Mapping[str, Any]) -> None:
        ran.append(part)

    backend.before = note
    held.go.set()
    with pytest.raises(Cancelled):
        held.video.result(TIMEOUT_S)
    assert ran == []


def test_a_request_ends_at_its_deadline_and_says_so(single: VideoPipeline) -> None:
    with pytest.raises(Cancelled, match=r"^request: cancelled .*, as its deadline of 0\.05 s had passed$") as caught:
        single.generate(VideoRequest("a dog", steps=100, deadline=0.05), on_step=lambda *_: time.sleep(0.03))
    assert caught.value.reason == "deadline"
    assert single.generate(VideoRequest("a dog", steps=1, deadline=TIMEOUT_S))


def test_a_part_that_runs_is_ended_at_the_deadline(single_bundle: Path) -> None:
    pipeline, backend = watched_pipeline(single_bundle)

    def long(part: str, tensors: Mapping[str, Any]) -> None:
        with stoppable(stopped.set):
            assert stopped.wait(TIMEOUT_S)
        raise Cancelled(f"request: cancelled while {part} ran")

    stopped, backend.before = threading.Event(), long
    with pytest.raises(Cancelled, match=r"^request: cancelled while text_encoder ran, as its deadline of 0\.1 s had"):
        pipeline.generate(VideoRequest("a dog", steps=1, deadline=0.1))


@pytest.mark.parametrize("deadline", [0, -1, float("nan"), "soon"])
def test_a_deadline_is_seconds(single: VideoPipeline, deadline: Any) -> None:
    with pytest.raises(InvalidRequest, match="deadline: got .*, expected seconds above 0"):
        single.generate(VideoRequest("a dog", deadline=deadline))


def test_who_cancelled_is_said(single: VideoPipeline, pool: ThreadPoolExecutor) -> None:
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(Cancelled) as caught:
        single("a dog", cancel=cancel)
    assert caught.value.reason == "caller"
    held = Held(single, pool)
    closing = pool.submit(single.close, cancel=True)
    _until_cancelled(single)
    held.go.set()
    with pytest.raises(Cancelled) as closed:
        held.video.result(TIMEOUT_S)
    assert closed.value.reason == "closed" and closing.result(TIMEOUT_S)
