"""An error that somebody keeps holds none of its request's arrays, whatever it is and wherever it was raised."""

from __future__ import annotations

import gc
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

from foresight.engines.arrays import Array, Arrays
from foresight.engines.errors import Cancelled, EngineError, OutOfMemory
from foresight.runtime.pipeline import VideoPipeline
from foresight.runtime.policies import NoReuse
from foresight.runtime.release import released
from tests.support import CancelAt, WatchedBackend, watched_pipeline

PARTS = ["text_encoder", "condition", "prologue", "block.002", "epilogue", "vae_decoder"]
PROMPT = "a red circle moving right"


@pytest.fixture(scope="module")
def watched(bundle: Path) -> tuple[VideoPipeline, WatchedBackend]:
    return watched_pipeline(bundle)


@contextmanager
def none_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every array that is allocated inside through the seam is gone at the end, without the garbage collector."""
    made: list[weakref.ref[Any]] = []
    empty = Arrays.empty

    def counted(self: Arrays, shape: tuple[int, ...], dtype: str) -> Any:
        array = empty(self, shape, dtype)
        made.append(weakref.ref(array))
        return array

    gc.disable()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Arrays, "empty", counted)
            yield
        assert made, "the request has allocated nothing"
        assert not [reference for reference in made if reference() is not None]
    finally:
        gc.enable()


def kept(run: Callable[[], object]) -> BaseException:
    """What is raised, with its traceback and all that it came from."""
    try:
        run()
    except BaseException as error:  # noqa: BLE001 - whatever it is
        return error
    raise AssertionError("nothing was raised")


def raising(part: str, error: BaseException) -> Callable[[str, Mapping[str, Array]], None]:
    def before(name: str, tensors: Mapping[str, Array]) -> None:
        if name == part:
            raise error

    return before


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("error", [EngineError("injected"), MemoryError("injected"), KeyboardInterrupt()], ids=repr)
def test_an_engines_failure(
    watched: tuple[VideoPipeline, WatchedBackend], monkeypatch: pytest.MonkeyPatch, part: str, error: BaseException
) -> None:
    pipeline, backend = watched
    backend.before = raising(part, error)
    with none_left(monkeypatch):
        caught = kept(lambda: pipeline(PROMPT, steps=2))
    expected = OutOfMemory if isinstance(error, MemoryError) else type(error)
    assert type(caught) is expected and caught.__traceback__ is not None


@pytest.mark.parametrize("part", PARTS[1:])
def test_results_that_are_not_finite(
    watched: tuple[VideoPipeline, WatchedBackend], monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    pipeline, backend = watched

    def before(name: str, tensors: Mapping[str, Array]) -> None:
        for values in tensors.values() if name == part else ():
            if values.dtype == np.float32 and values.flags.writeable:
                values[...] = np.nan

    backend.before = before
    with none_left(monkeypatch):
        caught = kept(lambda: pipeline(PROMPT, steps=3, policy=NoReuse()))
    assert isinstance(caught, EngineError) and "not finite" in str(caught)


@pytest.mark.parametrize("look", [1, 3, 4, 9, 12, 13])
def test_cancelling(watched: tuple[VideoPipeline, WatchedBackend], monkeypatch: pytest.MonkeyPatch, look: int) -> None:
    pipeline, backend = watched
    backend.before = lambda name, tensors: None
    with none_left(monkeypatch) if look > 3 else released():
        caught = kept(lambda: pipeline(PROMPT, steps=2, cancel=CancelAt(look)))
    assert isinstance(caught, Cancelled)


def test_an_error_of_on_step_whose_own_frames_keep_what_they_hold(
    watched: tuple[VideoPipeline, WatchedBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, backend = watched
    backend.before = lambda name, tensors: None

    def complain(done: int, steps: int, trace: object) -> None:
        mine = "kept"
        try:
            raise KeyError(mine)
        except KeyError as error:
            raise MemoryError("of the callback") from error

    with none_left(monkeypatch):
        caught = kept(lambda: pipeline(PROMPT, steps=3, on_step=complain))
    assert type(caught) is MemoryError
    for error in (caught, caught.__cause__):
        trace = error.__traceback__ if error is not None else None
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        assert trace is not None and trace.tb_frame.f_locals["mine"] == "kept"


def test_with_low_memory_the_engines_are_gone_as_well(bundle: Path) -> None:
    low, backend = watched_pipeline(bundle, low_memory=True)
    for part in PARTS:
        backend.before = raising(part, EngineError("injected"))
        caught = kept(lambda: low(PROMPT, steps=1))
        assert isinstance(caught, EngineError)
        assert not backend.alive


def test_errors_that_refer_to_each_other_are_released_once() -> None:
    first, second = ValueError("first"), ValueError("second")
    first.__context__, second.__context__ = second, first

    def fail() -> None:
        big = threading.Event()
        references.append(weakref.ref(big))
        raise first

    references: list[weakref.ref[threading.Event]] = []
    with pytest.raises(ValueError, match="first"), released():
        fail()
    assert references[0]() is None


def test_the_error_that_a_caller_was_handling_keeps_what_it_has() -> None:
    def fail() -> None:
        mine = np.ones(3)
        raise ValueError(mine.sum())

    def try_again() -> None:
        theirs = np.ones(3)
        raise EngineError(f"again: {theirs.sum()}")

    def run() -> None:
        try:
            fail()
        except ValueError:
            with released():
                try_again()

    error = kept(run)
    assert isinstance(error, EngineError) and isinstance(error.__context__, ValueError)
    frames = {trace.f_code.co_name: dict(trace.f_locals) for trace in frames_of(error.__context__)}
    assert "mine" in frames["fail"]
    assert "theirs" not in {name for frame in frames_of(error) for name in frame.f_locals}


def frames_of(error: BaseException) -> list[FrameType]:
    return [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
