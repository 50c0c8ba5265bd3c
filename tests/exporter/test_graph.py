"""A graph computes what its module computes, with whatever weights it is given, and tells nothing of this machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import foresight
from foresight.engines.arrays import numpy_dtype
from foresight.engines.backend import create_backend
from foresight.engines.bundle import open_bundle
from foresight.engines.errors import ExportError
from foresight.engines.manifest import Part, TensorSpec
from foresight.exporter.graph import Graph, graph_from_module, widen, write_graph
from foresight.exporter.models.base import assign_parameters, mean_squared_change
from tests.support import load_graph

WIDTH = 6


class TwoLayers(nn.Module):
    """Two layers of one shape, whose zero biases are equal in value; `shared` ties the second weight to the first."""

    def __init__(self, shared: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)
        nn.init.zeros_(self.first.bias)
        nn.init.zeros_(self.second.bias)
        if shared:
            self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))  # type: ignore[no-any-return]


def trace(module: nn.Module) -> Graph:
    return graph_from_module(module, {"x": torch.randn(2, WIDTH)}, ["y"], {"x": {0: "batch"}}, opset=23)


@pytest.fixture(scope="module")
def two_layers() -> Graph:
    torch.manual_seed(0)
    return trace(TwoLayers())


def run(graph: Graph, parameters: Callable[[str], Tensor], folder: Path, x: Tensor) -> Any:
    path, _ = write_graph(graph, parameters, folder / "tiny.onnx")
    specs = [TensorSpec(name=name, dtype="fp32", shape=("batch", WIDTH)) for name in "xy"]
    part = Part(name="tiny", kind="tiny", graph="tiny.onnx", inputs=(specs[0],), outputs=(specs[1],), max_difference=0)
    y = np.empty(x.shape, np.float32)
    load_graph(create_backend(), path, part).run({"x": x.numpy(), "y": y})
    return y


def randomised(module: nn.Module, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


@pytest.mark.parametrize("seed", [1, 2])
@torch.no_grad()
def test_any_weights_may_be_bound_to_a_graph(two_layers: Graph, tmp_path: Path, seed: int) -> None:
    module, x = randomised(TwoLayers(), seed), torch.randn(3, WIDTH)
    np.testing.assert_allclose(run(two_layers, module.get_parameter, tmp_path, x), module(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_writing_a_graph_leaves_it_as_it_was(two_layers: Graph, tmp_path: Path) -> None:
    x, one, other = torch.randn(3, WIDTH), randomised(TwoLayers(), 1), randomised(TwoLayers(), 2)
    first = run(two_layers, one.get_parameter, tmp_path, x)
    run(two_layers, other.get_parameter, tmp_path, x)
    assert run(two_layers, one.get_parameter, tmp_path, x).tobytes() == first.tobytes()


@torch.no_grad()
def test_a_graph_is_usable_after_its_writing_failed(two_layers: Graph, tmp_path: Path) -> None:
    def fail(name: str) -> Tensor:
        raise OSError(28, "No space left on device") if name == "second.weight" else KeyError(name)

    module, x = randomised(TwoLayers(), 1), torch.randn(3, WIDTH)
    with pytest.raises((OSError, KeyError)):
        write_graph(two_layers, fail, tmp_path / "tiny.onnx")
    np.testing.assert_allclose(run(two_layers, module.get_parameter, tmp_path, x), module(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_parameters_of_equal_value_are_not_confused(two_layers: Graph, tmp_path: Path) -> None:
    module, x = TwoLayers(), torch.randn(3, WIDTH)
    nn.init.ones_(module.first.bias)
    nn.init.constant_(module.second.bias, -2.0)
    np.testing.assert_allclose(run(two_layers, module.get_parameter, tmp_path, x), module(x), rtol=1e-5, atol=1e-5)


def test_initializers_bear_the_parameters_names(two_layers: Graph) -> None:
    assert set(two_layers.weights) == {"first.weight", "first.bias", "second.weight", "second.bias"}


@torch.no_grad()
def test_tied_parameters_are_stored_once_and_used_twice(tmp_path: Path) -> None:
    module, x = randomised(TwoLayers(shared=True), 3), torch.randn(3, WIDTH)
    graph = trace(TwoLayers(shared=True))
    assert set(graph.weights) == {"first.weight", "first.bias", "second.bias"}
    np.testing.assert_allclose(run(graph, module.get_parameter, tmp_path, x), module(x), rtol=1e-5, atol=1e-5)


def test_assigned_parameters_stay_tied() -> None:
    module = TwoLayers(shared=True)
    assign_parameters(module, lambda name: torch.ones_like(module.get_parameter(name)))
    assert module.first.weight is module.second.weight
    assert bool((module.first.weight == 1).all())


def test_a_module_that_torch_cannot_trace_is_an_export_error() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ExportError, match=r"^Branches: torch.onnx cannot export it: [^\n]+$"):
        trace(Branches())


def test_the_change_is_a_mean_over_everything_but_the_rows() -> None:
    new, cached = torch.randn(3, 4, 5, 6), torch.randn(3, 4, 5, 6)
    expected = (new.double() - cached.double()).square().mean((1, 2, 3))
    torch.testing.assert_close(mean_squared_change(new, cached).double(), expected, rtol=1e-6, atol=0)


def test_the_change_of_half_precision_is_summed_in_single() -> None:
    new = torch.full((1, 300, 300), 200.0, dtype=torch.float16)
    assert mean_squared_change(new, -new).tolist() == [160_000.0]  # beyond fp16's largest number


# The graphs of a bundle


def test_a_block_measures_the_change_from_what_it_is_given(bundle: Path) -> None:
    manifest = open_bundle(bundle).manifest
    part = manifest.blocks[0]
    sizes = manifest.largest(batch=2, text=7)
    draw = np.random.default_rng(0)
    tensors = {
        spec.name: draw.standard_normal(spec.resolve(sizes)).astype(np.float32)
        for spec in (*part.inputs, *part.outputs)
    }
    load_graph(create_backend(), bundle / part.graph, part).run(tensors)
    change = tensors["new_hidden"].astype(np.float64) - tensors["cached_hidden"]
    np.testing.assert_allclose(tensors["distance"], (change**2).mean((1, 2, 3)), rtol=1e-5)


def test_the_metric_does_not_overflow_in_half_precision(half_bundle: Path) -> None:
    """Streams of real models reach thousands; the square of such a change is beyond fp16, whose largest is 65504."""
    manifest = open_bundle(half_bundle).manifest
    sizes = manifest.largest(batch=2, text=7)
    draw = np.random.default_rng(0)
    for part in manifest.blocks:
        tensors = {
            spec.name: draw.standard_normal(spec.resolve(sizes)).astype(numpy_dtype(spec.dtype))
            for spec in (*part.inputs, *part.outputs)
        }
        tensors["hidden"][...] = 3000 * np.sign(tensors["hidden"])
        tensors["cached_hidden"][...] = -tensors["hidden"]
        load_graph(create_backend(), half_bundle / part.graph, part).run(tensors)
        change = tensors["new_hidden"].astype(np.float64) - tensors["cached_hidden"]
        assert np.isfinite(tensors["new_hidden"]).all()
        np.testing.assert_allclose(tensors["distance"], (change**2).mean((1, 2, 3)), rtol=1e-4)
        assert (tensors["distance"] > 1e7).all()


def test_a_graph_in_bf16_is_widened_beside_its_weights(tmp_path: Path) -> None:
    module = TwoLayers().to(torch.bfloat16)
    x = torch.randn(2, WIDTH, dtype=torch.bfloat16)
    graph = graph_from_module(module, {"x": x}, ["y"], {"x": {0: "batch"}}, opset=23)
    path, data = write_graph(graph, module.get_parameter, tmp_path / "tiny.onnx")
    widen(path, wide := tmp_path / "wide.onnx")
    assert sorted(tmp_path.iterdir()) == [data, path, wide]
    specs = [TensorSpec(name=name, dtype="fp32", shape=("batch", WIDTH)) for name in "xy"]
    part = Part(name="wide", kind="wide", graph="wide.onnx", inputs=(specs[0],), outputs=(specs[1],), max_difference=0)
    y = np.empty(x.shape, np.float32)
    load_graph(create_backend(), wide, part).run({"x": x.float().numpy(), "y": y})
    np.testing.assert_allclose(y, module.float()(x.float()).detach().numpy(), atol=1e-6)


SECRETS = [str(Path(foresight.__file__).parent).encode(), b"site-packages", str(Path.home()).encode() + b"/"]


@pytest.mark.parametrize("secret", SECRETS, ids=["the repository", "the libraries", "the user"])
def test_no_file_of_a_bundle_names_a_path_of_this_machine(bundle: Path, secret: bytes) -> None:
    assert [path.name for path in bundle.iterdir() if secret in path.read_bytes()] == []


def test_no_file_of_a_bundle_names_the_folder_of_its_checkpoint(bundle: Path, checkpoint: Path) -> None:
    folder = str(checkpoint.parent).encode()
    assert [path.name for path in bundle.iterdir() if folder in path.read_bytes()] == []


def test_every_graph_is_valid_onnx_of_the_manifests_opset(bundle: Path) -> None:
    manifest = open_bundle(bundle).manifest
    for part in manifest.parts:
        onnx.checker.check_model(bundle / part.graph)
        model = onnx.load(bundle / part.graph, load_external_data=False)
        assert {entry.domain: entry.version for entry in model.opset_import}[""] == manifest.opset


def test_the_manifest_describes_the_graphs(bundle: Path) -> None:
    for part in open_bundle(bundle).manifest.parts:
        graph = onnx.load(bundle / part.graph, load_external_data=False).graph
        for specs, values in ((part.inputs, graph.input), (part.outputs, graph.output)):
            assert [spec.name for spec in specs] == [value.name for value in values]
            assert [len(spec.shape) for spec in specs] == [len(value.type.tensor_type.shape.dim) for value in values]


def test_blocks_of_one_kind_are_one_graph(bundle: Path) -> None:
    graphs: dict[str, Any] = {}
    for part in open_bundle(bundle).manifest.blocks:
        model = onnx.load(bundle / part.graph, load_external_data=False)
        for tensor in model.graph.initializer:
            del tensor.external_data[:]
        graphs.setdefault(part.kind, set()).add(model.SerializeToString(deterministic=True))
    assert {kind: len(variants) for kind, variants in graphs.items()} == {
        "spatial": 1,
        "temporal_first": 1,
        "temporal": 1,
    }


@pytest.mark.parametrize("name", ["bundle", "wide_bundle", "half_bundle", "single_bundle"])
def test_every_parts_difference_from_eager_is_recorded_and_small(name: str, request: pytest.FixtureRequest) -> None:
    manifest = open_bundle(request.getfixturevalue(name)).manifest
    differences = {part.name: part.max_difference for part in manifest.parts}
    grey = differences.pop("vae_decoder")
    assert 0 <= grey <= 1
    assert max(differences.values()) <= (1e-4 if manifest.dtype == "fp32" else 0.2)
    assert sum(difference > 0 for difference in differences.values()) > len(differences) // 2
