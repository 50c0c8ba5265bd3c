"""What is particular to the OpenVINO backend: what it computes in which type, what it keeps, and that it is quiet."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from foresight.engines import openvino
from foresight.engines.arrays import numpy_dtype
from foresight.engines.errors import Cancelled, EngineError, InvalidRequest
from foresight.engines.interrupt import Watch
from foresight.engines.manifest import Dtype, Part, TensorSpec
from foresight.engines.openvino import OpenVinoBackend, OpenVinoEngine
from foresight.runtime.pipeline import load
from foresight.runtime.policies import Foresight, NoReuse

WIDTH = 64
RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_normal((WIDTH, WIDTH)).astype(np.float32) / 8
NAMES = {"fp32": "float", "bf16": "bfloat16"}


def make(
    folder: Path, x: tuple[Dtype, int], y: tuple[Dtype, int], body: str, threads: int = 1, **weights: Any
) -> OpenVinoEngine:
    """The engine of a graph from x to y, both of a dtype and (N, width)."""
    (given, wide), (made, high) = x, y
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 23]> '
        f"tiny ({NAMES[given]}[N, {wide}] x) => ({NAMES[made]}[N, {high}] y) {{ {body} }}"
    )
    model.graph.initializer.extend(numpy_helper.from_array(values, name) for name, values in weights.items())
    onnx.save(model, folder / "tiny.onnx")
    specs = [TensorSpec(name=name, dtype=d, shape=("rows", n)) for name, (d, n) in {"x": x, "y": y}.items()]
    part = Part(name="tiny", kind="", graph="tiny.onnx", inputs=(specs[0],), outputs=(specs[1],), max_difference=0.0)
    return OpenVinoBackend(threads=threads).load_graph(folder / "tiny.onnx", part)


def run(engine: OpenVinoEngine, x: Any, dtype: Dtype = "fp32", width: int = WIDTH) -> Any:
    y = np.empty((len(x), width), numpy_dtype(dtype))
    engine.run({"x": x, "y": y})
    return y.astype(np.float32)


def relative(got: Any, expected: Any) -> float:
    return float(np.sqrt(((got - expected) ** 2).mean() / (expected**2).mean()))


def narrow(values: Any) -> Any:
    return values.astype(numpy_dtype("bf16"))


def test_fp32_is_computed_in_fp32(tmp_path: Path) -> None:
    """By itself OpenVINO would compute in bf16 wherever the processor can."""
    x = RNG.standard_normal((32, WIDTH)).astype(np.float32)
    engine = make(tmp_path, ("fp32", WIDTH), ("fp32", WIDTH), "y = MatMul(x, w)", w=WEIGHT)
    assert relative(run(engine, x), x.astype(np.float64) @ WEIGHT) < 1e-6


def test_bf16_is_carried_and_computed(tmp_path: Path) -> None:
    x = narrow(RNG.standard_normal((32, WIDTH)))
    engine = make(tmp_path, ("bf16", WIDTH), ("bf16", WIDTH), "y = MatMul(x, w)", w=narrow(WEIGHT))
    expected = x.astype(np.float64) @ narrow(WEIGHT).astype(np.float64)
    assert relative(run(engine, x, "bf16"), expected) < 3e-3


def test_what_is_fp32_in_a_graph_in_bf16_stays_it(tmp_path: Path) -> None:
    """As timesteps are, of which bf16 cannot tell 977 from 976."""
    body = "angle = Mul(x, f) s = Sin(angle) n = Cast <to = 16> (s) y = MatMul(n, w)"
    frequencies = np.linspace(0.01, 1, WIDTH).astype(np.float32)
    engine = make(tmp_path, ("fp32", 1), ("bf16", WIDTH), body, f=frequencies, w=narrow(WEIGHT))
    timesteps = np.array([[977], [3], [501]], np.float32)
    expected = np.sin(timesteps.astype(np.float64) * frequencies) @ narrow(WEIGHT).astype(np.float64)
    assert relative(run(engine, timesteps, "bf16"), expected) < 1e-2


def test_it_says_in_which_type_it_computes_bf16(tmp_path: Path) -> None:
    engine = make(tmp_path, ("bf16", WIDTH), ("bf16", WIDTH), "y = MatMul(x, w)", w=narrow(WEIGHT))
    run(engine, narrow(np.ones((4, WIDTH))), "bf16")
    products = [
        node.get_output_element_type(0).to_string()
        for node in engine._compiled.get_runtime_model().get_ops()
        if node.get_rt_info()["layerType"] == "FullyConnected"
    ]
    names = {"bf16": "bf16", "f32": "fp32"}
    assert [f"computed in {names[name]}" for name in products] == [OpenVinoBackend().describe()["bf16"]]


def test_inputs_may_be_read_only(tmp_path: Path) -> None:
    x = np.ones((2, WIDTH), np.float32)
    x.flags.writeable = False
    engine = make(tmp_path, ("fp32", WIDTH), ("fp32", WIDTH), "y = Add(x, x)")
    assert (run(engine, x) == 2).all()


class Counting:
    """A compiled graph that counts how often its scratch is given back."""

    def __init__(self, compiled: Any) -> None:
        self._compiled, self.released = compiled, 0

    def create_infer_request(self) -> Any:
        return self._compiled.create_infer_request()

    def release_memory(self) -> None:
        self.released += 1
        self._compiled.release_memory()


def test_scratch_is_given_back_after_every_run_also_one_that_fails(tmp_path: Path) -> None:
    engine = make(tmp_path, ("fp32", WIDTH), ("fp32", WIDTH), "y = MatMul(x, w)", w=WEIGHT)
    engine._compiled = counting = Counting(engine._compiled)
    run(engine, np.ones((2, WIDTH), np.float32))
    assert counting.released == 1
    with pytest.raises(EngineError, match="^tiny: "):
        run(engine, np.ones((2, WIDTH), np.float32), width=WIDTH + 1)
    assert counting.released == 2


def long_running(folder: Path) -> Callable[[], Any]:
    """A good part of a second of work, in many small steps."""
    names = ["x", *(f"h{index}" for index in range(400)), "y"]
    body = " ".join(f"{after} = MatMul({before}, w)" for before, after in itertools.pairwise(names))
    engine = make(folder, ("fp32", WIDTH), ("fp32", WIDTH), body, w=WEIGHT)
    x = np.ones((40_000, WIDTH), np.float32)
    return lambda: run(engine, x)


def test_a_graph_that_runs_is_ended_when_its_request_is_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But the first, as it is not known yet to take long."""
    monkeypatch.setattr(openvino, "LONG_SECONDS", 0)
    work = long_running(tmp_path)
    expected = work()
    with Watch(lambda: True), pytest.raises(Cancelled, match="request: cancelled while tiny ran"):
        work()
    assert work().tobytes() == expected.tobytes()


QUIET = """
import sys
from foresight.engines.openvino import OpenVinoBackend
OpenVinoBackend()
print("openvino_telemetry" in sys.modules)
import openvino_telemetry
"""


def test_loading_it_tells_nobody(tmp_path: Path) -> None:
    """OpenVINO reports its import, and leaves a number for this user at home; others may still ask for it."""
    done = subprocess.run(
        [sys.executable, "-c", QUIET], env={"HOME": str(tmp_path)}, check=True, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr, list(tmp_path.iterdir())) == ("False\n", "", [])


def test_without_the_library_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(EngineError, match=r'^openvino: OpenVINO is not installed .*pip install ".*\[openvino\]"'):
        OpenVinoBackend()


@pytest.mark.parametrize("device", ["cuda", "gpu:", "gpu:x", "CPU"])
def test_devices_of_others_are_refused(device: str) -> None:
    with pytest.raises(InvalidRequest, match=f"device: got '{device}', expected cpu, gpu or gpu:N"):
        OpenVinoBackend(device)


def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(EngineError, match=r"^device gpu:77: OpenVINO has no such device here[^\n]*use device cpu"):
        OpenVinoBackend("gpu:77")


def test_weights_are_mapped_only_where_they_are_to_be_shared(single_bundle: Path) -> None:
    program = (
        "import sys, foresight; shared = sys.argv[2] == 'yes';"
        "p = foresight.load(sys.argv[1], backend='openvino', shared_weights=shared);"
        "print(sys.argv[1] in open('/proc/self/maps').read())"
    )
    told = [
        subprocess.run(
            [sys.executable, "-c", program, str(single_bundle), shared], check=True, capture_output=True, text=True
        ).stdout
        for shared in ("no", "yes")
    ]
    assert told == ["False\n", "True\n"]


@pytest.mark.parametrize("cache", ["output", "residual"])
def test_a_bundle_in_bf16_makes_the_video_of_the_one_in_fp32(
    demo_bundle: Path, demo_bf16_bundle: Path, cache: Any
) -> None:
    """Rounding in bf16 moves a video of ten steps by some percent; a wrong weight or cast moves it by more than all."""
    policy = Foresight(gamma=0.5, cache=cache)
    with load(demo_bundle) as wide, load(demo_bf16_bundle, backend="openvino") as bf16:
        expected, got, again = (
            pipeline("a red circle moving right", steps=10, policy=policy) for pipeline in (wide, bf16, bf16)
        )
    error = np.mean((got.frames.astype(np.float64) - expected.frames) ** 2)
    assert 10 * np.log10(255**2 / error) > 30
    assert got.latents.tobytes() == again.latents.tobytes()
    assert got.trace.backend["bf16"].startswith("computed in ")
    assert got.trace.blocks_reused


def test_fp32_makes_the_video_that_onnx_runtime_makes(demo_bundle: Path) -> None:
    with load(demo_bundle) as one, load(demo_bundle, backend="openvino") as other:
        expected, got = (pipeline("a dog", steps=4, policy=NoReuse()) for pipeline in (one, other))
    assert relative(got.latents, expected.latents) < 1e-4
    assert np.abs(got.frames.astype(int) - expected.frames).max() <= 1


def test_onnx_runtime_refuses_bf16_and_names_openvino(demo_bf16_bundle: Path) -> None:
    with pytest.raises(EngineError, match="got bf16, which ONNX Runtime cannot run on a CPU.*backend openvino"):
        load(demo_bf16_bundle, device="cpu")
