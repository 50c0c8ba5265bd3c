"""What only a GPU can show. `make test-gpu` runs these on every backend that the machine has; nothing else does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foresight.engines.arrays import GpuArrays, create_arrays
from foresight.engines.backend import create_backend
from foresight.engines.bundle import open_bundle
from foresight.engines.errors import EngineError
from foresight.engines.registry import COMPILERS
from foresight.runtime.memory import MemoryLimits
from foresight.runtime.pipeline import VideoPipeline, load
from foresight.runtime.policies import Foresight, NoReuse, Policy, Static
from tests.engines.test_backend_contract import BIAS, WEIGHT, affine, draw
from tests.support import BACKEND, backend_under_test, load_pipeline

pytestmark = pytest.mark.gpu

PROMPT = "a red circle moving right"
POLICIES: list[Policy] = [
    NoReuse(),
    Foresight(gamma=2, warmup=2),
    Foresight(gamma=2, warmup=2, cache="residual"),
    Static(2, 3, warmup=2),
]


def relative(got: Any, expected: Any) -> float:
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def gpu(pipeline: VideoPipeline) -> GpuArrays:
    assert isinstance(pipeline.backend.arrays, GpuArrays)
    return pipeline.backend.arrays


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_the_gpu_makes_the_video_that_the_cpu_makes(pipeline: VideoPipeline, bundle: Path, policy: Policy) -> None:
    assert pipeline.backend.arrays.kind == "cuda"
    got, expected = (p(PROMPT, steps=10, policy=policy) for p in (pipeline, load(bundle, device="cpu")))
    assert relative(got.latents, expected.latents) < 1e-3


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_the_same_request_gives_the_same_bytes(pipeline: VideoPipeline, policy: Policy) -> None:
    first, again = (pipeline(PROMPT, steps=10, policy=policy).latents.tobytes() for _ in range(2))
    assert first == again


@pytest.mark.parametrize("cache", ["output", "residual"])
def test_bf16_runs(demo_bf16_bundle: Path, demo_bundle: Path, cache: Any) -> None:
    """Rounding in bf16 moves a video of ten steps by some percent; a wrong weight or cast moves it by more than all."""
    policy = Static(1, 2, warmup=2, cache=cache)
    pipelines = load_pipeline(demo_bf16_bundle), load(demo_bundle, device="cpu")
    got, expected = (p(PROMPT, steps=10, policy=policy) for p in pipelines)
    assert got.trace.blocks_reused == expected.trace.blocks_reused > 0
    assert relative(got.latents, expected.latents) < 0.2


def test_fp16_runs(demo_half_bundle: Path, demo_bundle: Path) -> None:
    pipelines = load_pipeline(demo_half_bundle), load(demo_bundle, device="cpu")
    got, expected = (p(PROMPT, steps=10, policy=NoReuse()) for p in pipelines)
    assert relative(got.latents, expected.latents) < 0.05


def test_arrays_go_in_and_out_by_dlpack(pipeline: VideoPipeline) -> None:
    arrays = gpu(pipeline)
    noise = np.random.default_rng(0).standard_normal(pipeline.manifest.shape.latents, dtype=np.float32)
    given = arrays.xp.asarray(noise)
    video = pipeline(PROMPT, steps=3, latents=given, to_host=False)
    expected = pipeline(PROMPT, steps=3, latents=noise)
    assert isinstance(video.frames, arrays.xp.ndarray)
    assert arrays.xp.from_dlpack(video.frames).get().tobytes() == expected.frames.tobytes()
    assert given.get().tobytes() == noise.tobytes()


def test_latents_of_torch_go_in(pipeline: VideoPipeline) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch here is built without CUDA")
    noise = torch.randn(pipeline.manifest.shape.latents, device="cuda")
    video = pipeline(PROMPT, steps=3, latents=noise)
    assert video.latents.tobytes() == pipeline(PROMPT, steps=3, latents=noise.cpu().numpy()).latents.tobytes()


def test_with_low_memory_the_video_is_the_same_and_memory_comes_back(pipeline: VideoPipeline, bundle: Path) -> None:
    low = load_pipeline(bundle, low_memory=True)
    assert low(PROMPT, steps=4).latents.tobytes() == pipeline(PROMPT, steps=4).latents.tobytes()
    assert gpu(low).used_bytes() == 0


def test_memory_that_runs_out_is_an_engine_error_and_the_pipeline_goes_on(pipeline: VideoPipeline) -> None:
    arrays, expected = gpu(pipeline), pipeline(PROMPT, steps=3).latents.tobytes()
    with pytest.raises(EngineError, match=r"out of memory.*MiB are free"), arrays.active():
        arrays.empty((1 << 45,), "uint8")
    assert pipeline(PROMPT, steps=3).latents.tobytes() == expected


def test_arrays_take_no_more_than_was_planned(pipeline: VideoPipeline) -> None:
    """A pool rounds every array up to 512 bytes and keeps blocks of sizes it has seen: a tenth, and 4 MiB."""
    trace = pipeline(PROMPT, steps=4).trace
    plan = pipeline.memory()
    assert trace.device_bytes is not None
    assert trace.device_bytes <= 1.1 * (sum(phase.arrays for phase in plan.phases) + (plan.scratch or 0)) + (4 << 20)


def test_a_download_is_what_the_array_held_when_it_was_asked_for(pipeline: VideoPipeline) -> None:
    arrays = gpu(pipeline)
    with arrays.active():
        values = arrays.from_host(np.arange(1 << 20, dtype=np.float32))
        download = arrays.start_download(values)
        values[:] = 0
        assert download.wait().tobytes() == np.arange(1 << 20, dtype=np.float32).tobytes()


def test_a_gpu_that_is_not_there_is_one_clear_error() -> None:
    with pytest.raises(EngineError, match=r"device cuda:99: not usable"):
        create_arrays("cuda:99")


@pytest.mark.skipif(BACKEND not in COMPILERS, reason="the others have no engines")
def test_a_bundle_with_engines_for_this_gpu_is_run_by_them(pipeline: VideoPipeline, bundle: Path) -> None:
    assert pipeline.backend.name == BACKEND
    chosen = [load(bundle, device=device).backend.name for device in (None, "cuda", "cpu")]
    assert chosen == [BACKEND, BACKEND, "onnxruntime"]


@pytest.mark.skipif(BACKEND not in COMPILERS, reason="only TensorRT replays graphs")
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_replayed_graphs_give_the_bytes_of_plain_runs(pipeline: VideoPipeline, bundle: Path, policy: Policy) -> None:
    backend_under_test(bundle)
    backend = create_backend(BACKEND, "cuda", cuda_graphs=True)
    graphs = VideoPipeline(open_bundle(bundle), backend, MemoryLimits(fixed_slots=True))
    expected = pipeline(PROMPT, steps=12, policy=policy).latents.tobytes()
    for _ in range(3):
        assert graphs(PROMPT, steps=12, policy=policy).latents.tobytes() == expected


@pytest.mark.skipif(BACKEND not in COMPILERS, reason="only TensorRT replays graphs")
def test_a_graph_is_not_replayed_for_other_shapes_at_the_same_addresses(tmp_path: Path) -> None:
    backend = create_backend(BACKEND, "cuda", cuda_graphs=True)
    engine, given, arrays = affine(backend, tmp_path), draw(4), backend.arrays
    with arrays.active():
        x, y, mean = arrays.from_host(given), arrays.empty(given.shape, "fp32"), arrays.empty((4,), "fp32")
        for rows in (4, 4, 4, 2, 2, 2, 4):
            y[:] = 0
            engine.run({"x": x[:rows], "y": y[:rows], "mean": mean[:rows]})
            got = arrays.to_host(y)
            np.testing.assert_allclose(got[:rows], given[:rows] @ WEIGHT + BIAS, rtol=1e-3, atol=1e-3)
            assert not got[rows:].any()
