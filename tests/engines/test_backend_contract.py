"""What every backend must do, checked on tiny real graphs, on every backend and device that this machine has."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from foresight.engines.arrays import create_arrays
from foresight.engines.backend import Backend, Engine, create_backend
from foresight.engines.errors import EngineError, ForesightError, InvalidRequest
from foresight.engines.manifest import Dtype, Part, TensorSpec
from foresight.engines.registry import ABILITIES, COMPILERS, REGISTRY
from foresight.engines.tensorrt.library import EDITIONS
from tests.support import BACKEND, load_graph

ONNX_TYPES = {
    "fp32": TensorProto.FLOAT,
    "fp16": TensorProto.FLOAT16,
    "bf16": TensorProto.BFLOAT16,
    "int64": TensorProto.INT64,
    "uint8": TensorProto.UINT8,
    "bool": TensorProto.BOOL,
}
WIDTH = 48
RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_normal((WIDTH, WIDTH)).astype(np.float32)
BIAS = RNG.standard_normal(WIDTH).astype(np.float32)


# A process works with one of the compiling libraries: with the one under test, if it is one of them.
NAMES = [name for name in REGISTRY if name not in COMPILERS or name == BACKEND]


def find_usable() -> list[tuple[str, str]]:
    usable = []
    for name in NAMES:
        for device in ("cpu", "cuda"):
            try:
                create_backend(name, device)
            except ForesightError:
                continue
            usable.append((name, device))
    return usable


def has_gpu() -> bool:
    try:
        create_arrays("cuda")
    except ForesightError:
        return False
    return True


USABLE = find_usable()
HAS_GPU = has_gpu()
WITHOUT_CUDA = [name for name in (NAMES if HAS_GPU else REGISTRY) if (name, "cuda") not in USABLE]


@pytest.fixture(params=USABLE, ids=["-".join(pair) for pair in USABLE])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    created = create_backend(*request.param)
    with created.arrays.active():
        yield created


def spec(name: str, *shape: int | str, dtype: Dtype = "fp32") -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)


def part_of(inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> Part:
    return Part(name="tiny", kind="tiny", graph="tiny.onnx", inputs=inputs, outputs=outputs, max_difference=0.0)


def write(
    folder: Path,
    nodes: list[onnx.NodeProto],
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    weights: dict[str, Any] | None = None,
) -> tuple[Path, Part]:
    def info(tensor: TensorSpec) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(tensor.name, ONNX_TYPES[tensor.dtype], tensor.shape)

    graph = helper.make_graph(
        nodes,
        "tiny",
        [info(tensor) for tensor in inputs],
        [info(tensor) for tensor in outputs],
        [numpy_helper.from_array(value, name) for name, value in (weights or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path = folder / "tiny.onnx"
    onnx.save(model, path)
    return path, part_of(inputs, outputs)


def affine(backend: Backend, folder: Path) -> Engine:
    """y = x W + b, and the mean of y² per row; as a block has a stream and a distance."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["product"]),
        helper.make_node("Add", ["product", "b"], ["y"]),
        helper.make_node("Mul", ["y", "y"], ["square"]),
        helper.make_node("ReduceMean", ["square", "axes"], ["mean"], keepdims=0),
    ]
    weights = {"w": WEIGHT, "b": BIAS, "axes": np.array([1], np.int64)}
    inputs, outputs = (spec("x", "batch", WIDTH),), (spec("y", "batch", WIDTH), spec("mean", "batch"))
    return load_graph(backend, *write(folder, nodes, inputs, outputs, weights))


def to_shape(backend: Backend, folder: Path) -> Engine:
    """x in the shape that its second input asks for: a graph that fails when the shape does not fit."""
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["y"])]
    inputs = (spec("x", "batch", 4), spec("shape", 2, dtype="int64"))
    return load_graph(backend, *write(folder, nodes, inputs, (spec("y", "rows", "columns"),)))


@dataclass
class Fallible:
    """An engine, tensors on which it fails, and tensors on which it does not."""

    engine: Engine
    bad: dict[str, Any]
    good: dict[str, Any]


def fallible(backend: Backend, folder: Path) -> Fallible:
    """A plan refuses shapes that it was not built for; graphs take all, but a reshape may not work out."""
    arrays = backend.arrays
    if backend.name in COMPILERS:
        tensors = [
            {
                "x": arrays.from_host(draw(rows)),
                "y": arrays.empty((rows, WIDTH), "fp32"),
                "mean": arrays.empty((rows,), "fp32"),
            }
            for rows in (9, 1)
        ]
        return Fallible(affine(backend, folder), *tensors)
    given = {"x": arrays.from_host(draw(1)[:, :4].copy()), "y": arrays.empty((2, 2), "fp32")}
    shapes = [{**given, "shape": arrays.from_host(np.array(shape))} for shape in ([3, 5], [2, 2])]
    return Fallible(to_shape(backend, folder), *shapes)


def draw(rows: int, seed: int = 1) -> Any:
    return np.random.default_rng(seed).standard_normal((rows, WIDTH)).astype(np.float32)


def run_affine(backend: Backend, engine: Engine, x: Any) -> tuple[Any, Any]:
    arrays = backend.arrays
    with arrays.active():  # for threads; the fixture is active only in the first
        y, mean = arrays.empty(x.shape, "fp32"), arrays.empty(x.shape[:1], "fp32")
        engine.run({"x": arrays.from_host(x), "y": y, "mean": mean})
        return arrays.to_host(y), arrays.to_host(mean)


def test_computes_what_the_graph_says(backend: Backend, tmp_path: Path) -> None:
    x = draw(3)
    y, mean = run_affine(backend, affine(backend, tmp_path), x)
    np.testing.assert_allclose(y, x @ WEIGHT + BIAS, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(mean, ((x @ WEIGHT + BIAS) ** 2).mean(1), rtol=1e-4)


@pytest.mark.parametrize("rows", [1, 5, 2, 7])
def test_takes_any_size_of_a_named_dimension(backend: Backend, tmp_path: Path, rows: int) -> None:
    engine, x = affine(backend, tmp_path), draw(rows)
    y, _ = run_affine(backend, engine, x)
    np.testing.assert_allclose(y, x @ WEIGHT + BIAS, rtol=1e-4, atol=1e-4)


def test_writes_where_the_caller_says_and_nowhere_else(backend: Backend, tmp_path: Path) -> None:
    engine, arrays, x = affine(backend, tmp_path), backend.arrays, draw(2)
    whole = arrays.empty((6, WIDTH), "fp32")
    whole[:] = 7.0
    mean = arrays.empty((2,), "fp32")
    address = arrays.address(whole[2:4])
    engine.run({"x": arrays.from_host(x), "y": whole[2:4], "mean": mean})
    host = arrays.to_host(whole)
    assert arrays.address(whole[2:4]) == address
    np.testing.assert_allclose(host[2:4], x @ WEIGHT + BIAS, rtol=1e-4, atol=1e-4)
    assert (host[:2] == 7.0).all() and (host[4:] == 7.0).all()


def test_reads_from_the_address_it_is_given(backend: Backend, tmp_path: Path) -> None:
    engine, arrays = affine(backend, tmp_path), backend.arrays
    x = arrays.from_host(draw(4).copy())
    y, mean = arrays.empty((2, WIDTH), "fp32"), arrays.empty((2,), "fp32")
    engine.run({"x": x[1:3], "y": y, "mean": mean})
    first = arrays.to_host(y).copy()
    x[1:3] = 0
    engine.run({"x": x[1:3], "y": y, "mean": mean})
    np.testing.assert_allclose(first, draw(4)[1:3] @ WEIGHT + BIAS, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(arrays.to_host(y), np.tile(BIAS, (2, 1)), rtol=1e-6)


def test_leaves_inputs_as_they_are(backend: Backend, tmp_path: Path) -> None:
    engine, arrays, x = affine(backend, tmp_path), backend.arrays, draw(3)
    given = arrays.from_host(x.copy())
    engine.run({"x": given, "y": arrays.empty(x.shape, "fp32"), "mean": arrays.empty((3,), "fp32")})
    assert arrays.to_host(given).tobytes() == x.tobytes()


def test_keeps_no_reference_to_what_it_was_given(backend: Backend, tmp_path: Path) -> None:
    engine, arrays = affine(backend, tmp_path), backend.arrays
    tensors = {"x": arrays.from_host(draw(2)), "y": arrays.empty((2, WIDTH), "fp32")}
    tensors["mean"] = arrays.empty((2,), "fp32")
    before = {name: sys.getrefcount(array) for name, array in tensors.items()}
    engine.run(tensors)
    assert {name: sys.getrefcount(array) for name, array in tensors.items()} == before


def test_earlier_outputs_stay_as_they_were(backend: Backend, tmp_path: Path) -> None:
    engine = affine(backend, tmp_path)
    first, _ = run_affine(backend, engine, draw(2))
    kept = first.copy()
    run_affine(backend, engine, draw(2, seed=9))
    assert first.tobytes() == kept.tobytes()


def test_ignores_names_it_does_not_know(backend: Backend, tmp_path: Path) -> None:
    engine, arrays, x = affine(backend, tmp_path), backend.arrays, draw(2)
    y, mean, other = (arrays.empty(shape, "fp32") for shape in ((2, WIDTH), (2,), (5,)))
    engine.run({"other": other, "x": arrays.from_host(x), "y": y, "mean": mean})
    np.testing.assert_allclose(arrays.to_host(y), x @ WEIGHT + BIAS, rtol=1e-4, atol=1e-4)


def test_the_same_input_gives_the_same_bytes(backend: Backend, tmp_path: Path) -> None:
    engine, x = affine(backend, tmp_path), draw(5)
    first, again = (run_affine(backend, engine, x)[0].tobytes() for _ in range(2))
    assert first == again


def test_threads_at_once_get_the_bytes_they_get_alone(backend: Backend, tmp_path: Path) -> None:
    engine = affine(backend, tmp_path)
    inputs = [draw(1 + seed % 5, seed) for seed in range(48)]
    alone = [run_affine(backend, engine, x)[0].tobytes() for x in inputs]
    with ThreadPoolExecutor(max_workers=8) as pool:
        together = list(pool.map(lambda x: run_affine(backend, engine, x)[0].tobytes(), inputs))
    assert together == alone


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "int64", "uint8", "bool"])
def test_carries_every_dtype_unchanged(backend: Backend, tmp_path: Path, dtype: Dtype) -> None:
    nodes = [  # TensorRT reads and writes uint8 only to cast it
        helper.make_node("Cast", ["x"], ["number"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["number"], ["y"], to=ONNX_TYPES[dtype]),
    ]
    engine = load_graph(backend, *write(tmp_path, nodes, (spec("x", 4, dtype=dtype),), (spec("y", 4, dtype=dtype),)))
    given = np.array([0, 1, 1, 0]).astype(backend.arrays.empty((1,), dtype).dtype)
    y = backend.arrays.empty((4,), dtype)
    engine.run({"x": backend.arrays.from_host(given), "y": y})
    assert backend.arrays.to_host(y).tobytes() == given.tobytes()


def test_a_failing_graph_raises_an_engine_error_that_names_the_part(backend: Backend, tmp_path: Path) -> None:
    case = fallible(backend, tmp_path)
    with pytest.raises(EngineError, match=r"^tiny: .*[^\n]$"):
        case.engine.run(case.bad)


def test_an_engine_is_usable_after_it_failed(backend: Backend, tmp_path: Path) -> None:
    case = fallible(backend, tmp_path)
    case.engine.run(case.good)
    expected = backend.arrays.to_host(case.good["y"]).copy()
    with pytest.raises(EngineError):
        case.engine.run(case.bad)
    case.good["y"][:] = 0
    case.engine.run(case.good)
    assert backend.arrays.to_host(case.good["y"]).tobytes() == expected.tobytes() != bytes(expected.nbytes)


def test_an_output_array_of_the_wrong_shape_is_an_engine_error(backend: Backend, tmp_path: Path) -> None:
    engine, arrays = affine(backend, tmp_path), backend.arrays
    with pytest.raises(EngineError):
        engine.run(
            {
                "x": arrays.from_host(draw(3)),
                "y": arrays.empty((2, WIDTH), "fp32"),
                "mean": arrays.empty((3,), "fp32"),
            }
        )


def garbage(folder: Path) -> Path:
    path = folder / "tiny.onnx"
    path.write_bytes(b"this is no graph" * 100)
    return path


def nothing(folder: Path) -> Path:
    path = folder / "tiny.onnx"
    path.write_bytes(b"")
    return path


def missing(folder: Path) -> Path:
    return folder / "missing" / "tiny.onnx"


def unknown_operator(folder: Path) -> Path:
    return write(folder, [helper.make_node("Nonsense", ["x"], ["y"])], (spec("x", 4),), (spec("y", 4),))[0]


def undefined_input(folder: Path) -> Path:
    return write(folder, [helper.make_node("Add", ["x", "nowhere"], ["y"])], (spec("x", 4),), (spec("y", 4),))[0]


def no_kernel(folder: Path) -> Path:
    node = helper.make_node("Det", ["x"], ["y"])
    inputs, outputs = (spec("x", 4, 4, dtype="bf16"),), (spec("y", dtype="fp16"),)
    return write(folder, [node], inputs, outputs)[0]


def truncated(folder: Path) -> Path:
    weights = {"w": np.ones(4, np.float32)}
    path, _ = write(folder, [helper.make_node("Add", ["x", "w"], ["y"])], (spec("x", 4),), (spec("y", 4),), weights)
    path.write_bytes(path.read_bytes()[:-20])
    return path


def lost_weights(folder: Path) -> Path:
    weights = {"w": np.ones(1024, np.float32)}
    path, _ = write(
        folder, [helper.make_node("Add", ["x", "w"], ["y"])], (spec("x", 1024),), (spec("y", 1024),), weights
    )
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="tiny.data", size_threshold=0)
    (folder / "tiny.data").unlink()
    return path


@pytest.mark.parametrize(
    "make", [garbage, nothing, missing, unknown_operator, undefined_input, no_kernel, truncated, lost_weights]
)
def test_a_graph_that_cannot_be_loaded_is_an_engine_error(
    backend: Backend, tmp_path: Path, make: Callable[[Path], Path]
) -> None:
    with pytest.raises(EngineError, match=r"^tiny: [^\n]*$"):
        load_graph(backend, make(tmp_path), part_of((spec("x", 4),), (spec("y", 4),)))


def test_describes_itself_in_plain_text(backend: Backend) -> None:
    described = backend.describe()
    assert {"backend", "version", "device"} <= set(described)
    assert all(isinstance(value, str) and value for value in described.values())
    assert json.loads(json.dumps(described)) == described


@pytest.mark.parametrize("name", WITHOUT_CUDA)
def test_asking_for_cuda_where_there_is_none_says_what_to_do(name: str) -> None:
    with pytest.raises((EngineError, InvalidRequest), match=r"cuda.*(install|device cpu)"):
        create_backend(name, "cuda")


@pytest.mark.parametrize("name", REGISTRY)
@pytest.mark.parametrize("device", ["tpu", "cpu:x", "cuda:x", "", "CPU"])
def test_an_unknown_device_is_refused(name: str, device: str) -> None:
    with pytest.raises(InvalidRequest, match="device"):
        create_backend(name, device)


def test_an_unknown_backend_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidRequest, match="backend: got 'abacus', expected one of onnxruntime"):
        create_backend("abacus")


def test_the_backends_that_compile_are_the_editions_of_tensorrt() -> None:
    assert list(COMPILERS) == list(EDITIONS)


@pytest.mark.parametrize(
    ("name", "option"),
    [(name, option) for name, row in REGISTRY.items() for option in ABILITIES if option not in row.options],
)
def test_an_option_that_a_backend_does_not_take_is_refused_with_the_backends_that_do(name: str, option: str) -> None:
    takers = " or ".join(other for other, row in REGISTRY.items() if option in row.options)
    with pytest.raises(InvalidRequest, match=rf"^{option}: got {name}, expected {takers}, which can"):
        create_backend(name, **{option: True})  # type: ignore[arg-type]


def test_every_option_is_taken_by_some_backend() -> None:
    assert {option for row in REGISTRY.values() for option in row.options} == {"threads", *ABILITIES}
