"""What is particular to the reference: 16 bits are computed in fp32, and only what comes out is rounded."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import helper, numpy_helper

from foresight.engines.arrays import numpy_dtype
from foresight.engines.errors import EngineError, InvalidRequest
from foresight.engines.manifest import Dtype, Part, TensorSpec
from foresight.engines.reference import ReferenceBackend

TYPES = {"fp32": "float", "fp16": "float16", "bf16": "bfloat16"}
ONE = {"fp16": "{15360}", "bf16": "{16256}"}  # as its bits: so does ONNX write numbers of 16 bits
half = pytest.mark.parametrize("dtype", ["fp16", "bf16"])


def tensor(name: str, values: Any, dtype: Dtype) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(values).astype(numpy_dtype(dtype)), name)


def run(folder: Path, dtype: Dtype, body: str, x: Any, **weights: Any) -> Any:
    """What a graph with one input x and one output y, both of that type and shape, makes of x."""
    given = np.asarray(x).astype(numpy_dtype(dtype))
    declared = f"{TYPES[dtype]}{list(given.shape)}"
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 23]> tiny ({declared} x) => ({declared} y) {{ {body} }}'
    )
    model.graph.initializer.extend(tensor(name, values, dtype) for name, values in weights.items())
    onnx.save(model, folder / "tiny.onnx")
    specs = [TensorSpec(name=name, dtype=dtype, shape=given.shape) for name in ("x", "y")]
    part = Part(name="tiny", kind="", graph="tiny.onnx", inputs=(specs[0],), outputs=(specs[1],), max_difference=0.0)
    y = np.empty_like(given)
    ReferenceBackend().load_graph(folder / "tiny.onnx", part).run({"x": given, "y": y})
    return y.astype(np.float32)


@half
def test_nothing_is_rounded_on_the_way(tmp_path: Path, dtype: Dtype) -> None:
    body = "large = Add(x, much) y = Sub(large, much)"
    assert run(tmp_path, dtype, body, [0.25, 0.5], much=[2**15]).tolist() == [0.25, 0.5]


@half
def test_what_comes_out_is_rounded(tmp_path: Path, dtype: Dtype) -> None:
    (got,) = run(tmp_path, dtype, "y = Div(x, three)", [1], three=[3])
    assert got == np.float32(1 / 3).astype(numpy_dtype(dtype)) != np.float32(1 / 3)


def test_large_values_are_normalised_as_the_standard_says(tmp_path: Path) -> None:
    y = run(tmp_path, "fp16", "y = LayerNormalization(x, scale)", [[-600, 600, -600, 600]], scale=[1] * 4)
    np.testing.assert_allclose(y, [[-1, 1, -1, 1]], rtol=1e-3)


@half
def test_operators_that_are_made_of_others_are_widened_too(tmp_path: Path, dtype: Dtype) -> None:
    body = "n = GroupNormalization <num_groups = 1> (x, scale, bias) y = Add(n, x)"
    x = np.array([[[-1, 1], [1, -1]]])
    np.testing.assert_allclose(run(tmp_path, dtype, body, x, scale=[1, 1], bias=[0, 0]), 2 * x, rtol=1e-2)


@half
def test_casts_and_constants_are_widened_too(tmp_path: Path, dtype: Dtype) -> None:
    code = helper.np_dtype_to_tensor_dtype(numpy_dtype(dtype))
    body = (
        f"wide = Cast <to = 1> (x) narrow = Cast <to = {code}> (wide) "
        f"one = Constant <value = {TYPES[dtype]}[1] {ONE[dtype]}> () y = Add(narrow, one)"
    )
    assert run(tmp_path, dtype, body, [1, 2]).tolist() == [2, 3]


def test_infinities_are_results_not_warnings(tmp_path: Path) -> None:
    assert run(tmp_path, "fp32", "y = Log(x)", [0, 1]).tolist() == [-np.inf, 0]


def test_a_gpu_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="device: got cuda, expected cpu"):
        ReferenceBackend("cuda")


def test_without_onnx_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("onnx", "onnx.reference"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(EngineError, match=r'^reference: onnx is not installed .*pip install ".*\[export\]"'):
        ReferenceBackend()
