"""Building plans, with NVIDIA's own compiler: TensorRT-RTX has TensorRT 11's API and builds without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from foresight.engines.bundle import open_bundle
from foresight.engines.errors import EngineError, InvalidRequest
from foresight.engines.tensorrt.compiler import BuildSettings, ShapeRanges, build_plan, shape_ranges

pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX has wheels for Linux x86-64 only")

RTX = "tensorrt-rtx"
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a graph y = f(x) of nodes over inputs of type `dtype` and shape (batch, 8)."""

    def make(
        *nodes: onnx.NodeProto, dtype: int = TensorProto.FLOAT, constants: dict[str, np.ndarray] | None = None
    ) -> Path:
        graph = helper.make_graph(
            list(nodes),
            "graph",
            [helper.make_tensor_value_info("x", dtype, ["batch", 8])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(value, name) for name, value in (constants or {}).items()],
        )
        path = tmp_path / "part.onnx"
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
        return path

    return make


def batch(low: int, usual: int, high: int) -> ShapeRanges:
    return {"x": ((low, 8), (usual, 8), (high, 8))}


def relu(write: Write) -> Path:
    return write(helper.make_node("Relu", ["x"], ["y"]))


def first_block(bundle: Path) -> tuple[Path, ShapeRanges]:
    opened = open_bundle(bundle)
    block = opened.manifest.blocks[0]
    return opened.file(block.graph), shape_ranges(block, opened.manifest.ranges)


def test_shapes_span_the_ranges_and_expects_one_guided_prompt(bundle: Path) -> None:
    opened = open_bundle(bundle)
    block = opened.manifest.blocks[0]
    low, usual, high = shape_ranges(block, opened.manifest.ranges)["hidden"]
    assert (low[0], usual[0], high[0]) == (1, 2, 2 * opened.manifest.shape.max_batch)
    assert low[1:] == usual[1:] == high[1:]


def test_parts_that_have_no_batch_have_shapes_too(demo_bundle: Path) -> None:
    manifest = open_bundle(demo_bundle).manifest
    stage = manifest.decoder[0]
    low, _, high = shape_ranges(stage.first, manifest.ranges)["latents"]
    assert low[stage.axis] == 1 and high[stage.axis] == max(stage.chunks)


@pytest.mark.rtx
def test_two_builds_of_one_block_give_the_same_plan(demo_half_bundle: Path) -> None:
    """But for a few bytes: the compiler leaves a count of its own in it that differs from build to build."""
    graph, shapes = first_block(demo_half_bundle)
    one, other = (build_plan(RTX, graph, shapes, BuildSettings()) for _ in range(2))
    assert one.scratch_bytes == other.scratch_bytes > 0
    assert len(one.data) == len(other.data) > 1000
    differing = np.frombuffer(one.data, np.uint8) != np.frombuffer(other.data, np.uint8)
    assert differing.sum() < 1e-4 * len(one.data)


@pytest.mark.rtx
def test_attention_is_fused_in_fp16_and_taken_apart_in_fp32(demo_half_bundle: Path, demo_bundle: Path) -> None:
    fused, apart = (
        build_plan(RTX, *first_block(bundle), BuildSettings()) for bundle in (demo_half_bundle, demo_bundle)
    )
    assert (fused.fused_attention, apart.fused_attention) == (True, False)


def test_nothing_is_said_of_attention_where_there_is_none(write: Write) -> None:
    graph = write(helper.make_node("Relu", ["x"], ["y"]))
    assert build_plan(RTX, graph, batch(1, 1, 1), BuildSettings()).fused_attention is None


def test_a_dimension_of_one_size_is_fixed_and_another_is_not(write: Write) -> None:
    """A plan for one shape needs no room for another."""
    graph = write(
        helper.make_node("MatMul", ["x", "w"], ["z"]),
        helper.make_node("Softmax", ["z"], ["y"]),
        constants={"w": np.ones((8, 4096), np.float32)},
    )
    one, many = (build_plan(RTX, graph, batch(1, 1, high), BuildSettings()) for high in (1, 1024))
    assert one.scratch_bytes < many.scratch_bytes


def test_an_operator_it_does_not_know_is_named_with_its_node(write: Write) -> None:
    node = helper.make_node("DFT", ["x", "", "axis"], ["y"], name="the_fourier_node")
    graph = write(node, constants={"axis": np.array(-1, np.int64)})
    with pytest.raises(EngineError, match=r"part: tensorrt-rtx cannot read part.onnx: .*the_fourier_node.*DFT"):
        build_plan(RTX, graph, batch(1, 1, 1), BuildSettings())


def test_mixed_types_are_refused_not_cast(write: Write) -> None:
    graph = write(helper.make_node("Add", ["x", "half"], ["y"]), constants={"half": np.ones((1, 8), np.float16)})
    with pytest.raises(EngineError, match=r"(?i)part: tensorrt-rtx cannot .*type.*half"):
        build_plan(RTX, graph, batch(1, 1, 1), BuildSettings())


def test_shapes_that_contradict_each_other_are_refused(write: Write) -> None:
    with pytest.raises(EngineError, match=r"part: .*(?i:min|max|profile).*\(shapes"):
        build_plan(RTX, relu(write), batch(4, 2, 1), BuildSettings())


def test_an_input_that_the_manifest_does_not_name_is_refused(write: Write) -> None:
    with pytest.raises(EngineError, match=r"part: part.onnx has an input x that the manifest does not name"):
        build_plan(RTX, relu(write), {}, BuildSettings())


@pytest.mark.rtx
def test_too_little_workspace_is_an_error_with_the_librarys_reason(demo_half_bundle: Path) -> None:
    with pytest.raises(
        EngineError, match=r"block\.000: tensorrt-rtx cannot build block\.000\.onnx: (?!the library gave)"
    ):
        build_plan(RTX, *first_block(demo_half_bundle), BuildSettings(workspace_bytes=1 << 12))


def test_a_graph_that_is_none_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "part.onnx").write_bytes(b"no graph at all")
    with pytest.raises(EngineError, match=r"part: tensorrt-rtx cannot read part.onnx"):
        build_plan(RTX, tmp_path / "part.onnx", {}, BuildSettings())


def test_a_build_works_after_one_that_failed(write: Write) -> None:
    graph = relu(write)
    with pytest.raises(EngineError):
        build_plan(RTX, graph, batch(4, 2, 1), BuildSettings())
    assert build_plan(RTX, graph, batch(1, 2, 4), BuildSettings()).data


@pytest.mark.parametrize("settings", [{"level": -1}, {"level": 6}, {"workspace_bytes": 0}, {"workspace_bytes": -5}])
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=r"(level|workspace): got .*, expected"):
        BuildSettings(**settings)
