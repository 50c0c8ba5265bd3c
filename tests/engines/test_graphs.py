"""A graph is judged by its own bytes before any library reads it: whose files it may name, and whose code it has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import helper

from foresight.engines import graphs as graphs_module
from foresight.engines.bundle import open_bundle, verify_files
from foresight.engines.errors import ForesightError, IntegrityError
from foresight.engines.graphs import RefusedGraph, check_graph
from foresight.runtime.pipeline import load
from tests.support import copy_bundle, vouch_for

WEIGHTS = "epilogue.data"


@pytest.fixture
def copied(single_bundle: Path, tmp_path: Path) -> Path:
    """A bundle to damage."""
    return copy_bundle(single_bundle, tmp_path / "copied")


def check(folder: Path) -> None:
    verify_files(open_bundle(folder))


@pytest.fixture
def model(copied: Path) -> onnx.ModelProto:
    return onnx.load(copied / "epilogue.onnx", load_external_data=False)


def external(tensor: onnx.TensorProto) -> dict[str, onnx.StringStringEntryProto]:
    return {entry.key: entry for entry in tensor.external_data}


def first_external(model: onnx.ModelProto) -> onnx.TensorProto:
    tensors: list[onnx.TensorProto] = list(model.graph.initializer)
    return next(tensor for tensor in tensors if tensor.data_location == onnx.TensorProto.EXTERNAL)


def outside(location: str, **more: str) -> onnx.TensorProto:
    tensor = onnx.TensorProto(name="secret", data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
    for key, value in {"location": location, "offset": "0", "length": "4", **more}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def constant(tensor: onnx.TensorProto) -> onnx.NodeProto:
    return helper.make_node("Constant", [], ["unused"], value=tensor)


def branch(node: onnx.NodeProto, *initializers: onnx.TensorProto) -> onnx.NodeProto:
    graph = helper.make_graph([node], "then", [], [], list(initializers))
    return helper.make_node("If", ["x"], ["y"], then_branch=graph, else_branch=graph)


IDENTITY = helper.make_node("Identity", ["a"], ["b"])
NATIVE = helper.make_node("EPContext", [], ["unused"], domain="com.microsoft", ep_cache_context="payload")


def function(*nodes: onnx.NodeProto) -> onnx.FunctionProto:
    return helper.make_function("local", "f", [], ["unused"], list(nodes), [helper.make_opsetid("", 23)])


def sparse(tensor: onnx.TensorProto) -> onnx.SparseTensorProto:
    return onnx.SparseTensorProto(values=tensor, indices=onnx.TensorProto(data_type=7, dims=[1]), dims=[1])


def nested(depth: int) -> onnx.NodeProto:
    node = IDENTITY
    for _ in range(depth):
        node = helper.make_node("If", ["x"], ["y"], then_branch=helper.make_graph([node], "then", [], []))
    return node


GRAPHS: dict[str, Callable[[onnx.ModelProto], Any]] = {
    "above": lambda model: model.graph.initializer.append(outside("../secret.bin")),
    "absolute": lambda model: model.graph.initializer.append(outside("/etc/passwd")),
    "another part's": lambda model: model.graph.initializer.append(outside("prologue.data")),
    "the same by another name": lambda model: model.graph.initializer.append(outside(f"./{WEIGHTS}")),
    "beyond the end": lambda model: model.graph.initializer.append(outside(WEIGHTS, offset=str(1 << 30))),
    "a negative offset": lambda model: model.graph.initializer.append(outside(WEIGHTS, offset="-4")),
    "an offset that is no number": lambda model: model.graph.initializer.append(outside(WEIGHTS, offset="0x10")),
    "more than its shape": lambda model: model.graph.initializer.append(outside(WEIGHTS, length="8")),
    "two locations": lambda model: first_external(model).external_data.add(key="location", value="../secret.bin"),
    "another key": lambda model: first_external(model).external_data.add(key="basepath", value="/"),
    "no length": lambda model: first_external(model).external_data.remove(external(first_external(model))["length"]),
    "external without saying so": lambda model: first_external(model).ClearField("data_location"),
    "a size below none": lambda model: first_external(model).dims.__setitem__(0, -1),
    "in a constant": lambda model: model.graph.node.append(constant(outside("../secret.bin"))),
    "in a branch": lambda model: model.graph.node.append(branch(IDENTITY, outside("../secret.bin"))),
    "in a branch's constant": lambda model: model.graph.node.append(branch(constant(outside("../secret.bin")))),
    "in a function": lambda model: model.functions.append(function(constant(outside("../secret.bin")))),
    "sparse": lambda model: model.graph.sparse_initializer.append(sparse(outside("../secret.bin"))),
    "in a list of tensors": lambda model: model.graph.node.append(
        helper.make_node("Constant", [], ["unused"], tensors=[outside("../secret.bin")])
    ),
    "native code": lambda model: model.graph.node.append(NATIVE),
    "native code in a branch": lambda model: model.graph.node.append(branch(NATIVE)),
    "native code in a function": lambda model: model.functions.append(function(NATIVE)),
    "an unknown domain": lambda model: model.graph.node.append(helper.make_node("Run", [], ["unused"], domain="x.y")),
    "training": lambda model: model.training_info.add(),
    "too deep": lambda model: model.graph.node.append(nested(20)),
}


@pytest.mark.parametrize("harm", GRAPHS)
def test_a_graph_is_refused_before_a_library_reads_it(copied: Path, model: onnx.ModelProto, harm: str) -> None:
    GRAPHS[harm](model)
    (copied / "epilogue.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(IntegrityError, match=r"epilogue\.onnx (has|carries|brings)") as caught:
        check(vouch_for(copied, "epilogue.onnx"))
    assert str(caught.value).isprintable()


def test_that_a_text_names_native_code_is_no_reason_to_refuse_a_graph(copied: Path, model: onnx.ModelProto) -> None:
    model.doc_string = "no EPContext here"
    (copied / "epilogue.onnx").write_bytes(model.SerializeToString())
    check(vouch_for(copied, "epilogue.onnx"))


def test_a_function_of_the_graph_s_own_is_known(model: onnx.ModelProto, copied: Path) -> None:
    model.functions.append(function(IDENTITY))
    model.graph.node.append(helper.make_node("f", [], ["unused"], domain="local"))
    check_graph(model.SerializeToString(), WEIGHTS, (copied / WEIGHTS).stat().st_size)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x00",
        b"\x3a\x7f",
        b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
        b"\x08" + b"\xff" * 20,
        b"\x3b",
        b"\x39\x00",
    ],
)
def test_what_is_no_graph_is_refused(raw: bytes) -> None:
    with pytest.raises(RefusedGraph):
        check_graph(raw, WEIGHTS, 100)


def test_a_graph_in_too_many_pieces_is_not_walked_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs_module, "MOST_FIELDS", 100)
    with pytest.raises(RefusedGraph, match="more than 100 pieces"):
        check_graph(b"\x3a\x00" * 101, WEIGHTS, 100)


def test_a_graph_with_other_ends_than_its_part_is_no_bare_error(copied: Path, model: onnx.ModelProto) -> None:
    model.graph.input[0].name = "other"
    (copied / "epilogue.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ForesightError, match="epilogue"):
        load(vouch_for(copied, "epilogue.onnx"))
