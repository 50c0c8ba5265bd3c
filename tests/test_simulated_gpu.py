"""The suites that are meant for GPUs, on a simulated one: everything but the kernels is what a GPU would run."""

from __future__ import annotations

import gc
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from foresight.engines.bundle import COMPILED, MANIFEST
from tests.gpu import run_suites
from tests.simulation import gpu

ROOT = Path(__file__).parents[1]
# Without the plain loop of every family, and parity with the original pipelines: make test-simulated-gpu.
SUITES = (
    "tests/engines/test_backend_contract.py",
    "tests/runtime/test_isolation.py",
    "tests/runtime/test_gpu.py",
)
# Of the contract, what concerns the GPU; and not the trained checkpoints.
QUICK = "(cuda or not contract) and not fp16_runs and not bf16_runs"


@pytest.mark.parametrize("backend", ["tensorrt", pytest.param("tensorrt-rtx", marks=pytest.mark.slow)])
def test_the_suites_for_gpus_pass(backend: str, bundles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for bundle in bundles.glob(f"*/{MANIFEST}"):  # its own copies: engines will be built into them
        if bundle.parent.suffix != ".partial":
            shutil.copytree(bundle.parent, tmp_path / bundle.parent.name, ignore=shutil.ignore_patterns(COMPILED))
    paths = [ROOT / "tests" / "simulation" / "modules", ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, paths)))
    monkeypatch.setenv("FORESIGHT_TEST_BUNDLES", str(tmp_path))
    monkeypatch.chdir(ROOT)
    result = run_suites(backend, ["-k", QUICK], SUITES)
    assert result["failed"] == 0, result["failures"]
    assert result["passed"] > 200
    assert result["skipped"] == 1  # latents of torch, which needs a real one


def test_fresh_memory_is_garbage() -> None:
    assert np.isnan(gpu.empty((3,), np.float32).get()).all()


def test_a_download_has_not_arrived_before_it_is_waited_for() -> None:
    with gpu.Stream() as stream:
        values, host = gpu.asarray(np.ones(4, np.float32)), np.zeros(4, np.float32)
        values.get(stream=stream, out=host, blocking=False)
        values[:] = 2
        assert np.isnan(host).all()
        stream.record().synchronize()
    assert host.tolist() == [1, 1, 1, 1]


def test_an_array_that_a_stream_works_on_is_not_to_be_touched_by_another() -> None:
    with gpu.Stream() as stream:
        values = gpu.asarray(np.ones(4, np.float32)) + 1
    with pytest.raises(AssertionError, match="another stream"):
        values + 1
    stream.synchronize()
    assert (values + 1).get().tolist() == [3, 3, 3, 3]


def test_memory_that_is_gone_has_no_address() -> None:
    values, stream = gpu.empty((4,), np.float32), gpu.Stream()
    address = values.data.ptr
    assert gpu.use_memory(address + 4, 12, stream).size == 12
    with pytest.raises(AssertionError, match="no allocation"):
        gpu.use_memory(address, 1024, stream)
    del values
    gc.collect()
    with pytest.raises(AssertionError, match="no allocation"):
        gpu.use_memory(address, 16, stream)


def test_arrays_of_the_host_are_refused() -> None:
    values = gpu.empty((4,), np.float32)
    with pytest.raises(TypeError, match="Unsupported"):
        values + np.ones(4, np.float32)
    with pytest.raises(TypeError, match="Implicit conversion"):
        np.asarray(values)
    with pytest.raises(TypeError, match=r"numpy\.concatenate"):
        np.concatenate([values, values])


def test_a_pool_keeps_what_was_freed_until_it_is_asked_for() -> None:
    pool = gpu.MemoryPool()
    with gpu.using_allocator(pool.malloc):
        first = gpu.empty((1000,), np.uint8)
        assert (pool.total_bytes(), pool.free_bytes()) == (1024, 0)
        del first
        gc.collect()
        assert (pool.total_bytes(), pool.free_bytes()) == (1024, 1024)
        pool.free_all_blocks()
        assert pool.total_bytes() == 0
        with pytest.raises(gpu.OutOfMemoryError):
            gpu.empty((gpu.TOTAL_BYTES,), np.uint16)


def test_a_graph_replays_the_addresses_it_was_recorded_with() -> None:
    values, stream, recorder = gpu.asarray(np.zeros(4, np.float32)), gpu.Stream(), gpu.Stream()
    address = values.data.ptr

    def kernel(on: gpu.Stream) -> None:
        gpu.use_memory(address, 16, on).view(np.float32)[...] += 1

    recorder.begin_capture()
    recorder.launch(kernel)
    graph = recorder.end_capture()
    for _ in range(3):
        graph.launch(stream)
    stream.synchronize()
    assert values.get().tolist() == [3, 3, 3, 3]
