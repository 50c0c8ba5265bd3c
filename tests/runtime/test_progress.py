"""What loading and a request say about how far they are."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from foresight.engines.bundle import open_bundle
from foresight.engines.errors import InvalidRequest
from foresight.engines.manifest import part_files
from foresight.engines.progress import Counter, Progress
from foresight.runtime.pipeline import VideoPipeline, load
from foresight.runtime.policies import NoReuse
from tests.support import load_pipeline


def test_loading_tells_the_bytes_that_were_verified_and_then_loaded(single_bundle: Path) -> None:
    told: list[Progress] = []
    load(single_bundle, on_progress=told.append)
    manifest = open_bundle(single_bundle).manifest
    verified = [progress.done for progress in told if progress.phase == "verifying"]
    loaded = [progress.done for progress in told if progress.phase == "loading"]
    assert [progress.phase for progress in told] == ["verifying"] * len(verified) + ["loading"] * len(loaded)
    assert verified == sorted(verified)
    assert (verified[0], verified[-1]) == (0, sum(record.bytes for record in manifest.files.values()))
    sizes = [sum(manifest.files[name].bytes for name in part_files(part)) for part in manifest.parts]
    assert loaded == [0, *np.cumsum(sizes)]
    assert {(progress.unit, progress.total) for progress in told} == {("bytes", verified[-1]), ("bytes", loaded[-1])}


def test_a_request_tells_every_block_of_every_step_and_every_chunk(cogvideox_bundle: Path) -> None:
    told: list[Progress] = []
    pipeline = load_pipeline(cogvideox_bundle)
    assert not told
    pipeline("a dog", steps=2, policy=NoReuse(), on_progress=told.append)
    texts = [progress for progress in told if progress.phase == "encoding text"]
    steps = [progress for progress in told if progress.phase == "denoising"]
    chunks = [progress for progress in told if progress.phase == "decoding"]
    assert told == texts + steps + chunks
    blocks = len(pipeline.manifest.blocks)
    assert texts == [Progress("encoding text", 0, 2, "texts")]
    assert steps == [
        Progress("denoising", step, 2, "steps", f"block {block + 1} of {blocks}", block / blocks)
        for step in range(2)
        for block in range(blocks)
    ]
    assert chunks == [Progress("decoding", done, 2, "chunks") for done in range(3)]


def test_a_low_memory_request_tells_what_it_loads(single_bundle: Path) -> None:
    told: list[Progress] = []
    load_pipeline(single_bundle, low_memory=True)("a dog", steps=1, on_progress=told.append)
    phases = list(dict.fromkeys(progress.phase for progress in told))
    assert phases == ["loading", "encoding text", "denoising", "decoding"]
    assert [progress.phase for progress in told if progress.done == 0].count("loading") == 3


def test_what_on_progress_raises_reaches_the_caller_as_it_is(pipeline: VideoPipeline, single_bundle: Path) -> None:
    failure = MemoryError("the caller's own")

    def complain(progress: Progress) -> None:
        raise failure

    for work in (
        lambda: load(single_bundle, on_progress=complain),
        lambda: VideoPipeline(pipeline.bundle, pipeline.backend, on_progress=complain),
        lambda: pipeline("a dog", steps=1, on_progress=complain),
    ):
        with pytest.raises(MemoryError) as caught:
            work()
        assert caught.value is failure


def test_an_on_progress_that_is_no_plain_function_is_refused(pipeline: VideoPipeline, single_bundle: Path) -> None:
    async def later(progress: Progress) -> None: ...

    for callback in (3, later):
        with pytest.raises(InvalidRequest, match="on_progress: got"):
            load(single_bundle, on_progress=callback)  # type: ignore[arg-type]
        with pytest.raises(InvalidRequest, match="on_progress: got"):
            pipeline("a dog", steps=1, on_progress=callback)  # type: ignore[arg-type]


def test_threads_stop_when_the_one_that_waits_for_them_is_interrupted() -> None:
    """However much there is to hash, Ctrl-C ends it."""
    begun = threading.Event()

    def interrupt(progress: Progress) -> None:
        if begun.is_set():
            raise KeyboardInterrupt

    with ThreadPoolExecutor(1) as pool:
        counter = Counter("verifying", 1, "bytes", interrupt)

        def read_on() -> None:
            while True:
                counter.add(1)
                begun.set()

        future = pool.submit(read_on)
        with pytest.raises(KeyboardInterrupt):
            counter.results([future])
    assert isinstance(future.exception(), RuntimeError)
