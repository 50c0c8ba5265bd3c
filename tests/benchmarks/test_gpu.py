"""The benchmark for GPUs, as far as it can be checked without one: do all candidates compute the same step?"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.engine_build import real_split
from benchmarks.gpu.models import MODELS
from benchmarks.gpu.originals import Original, load_original
from benchmarks.gpu.setup import Setup, request_sizes
from benchmarks.gpu.transformer import Transformer, count_flops, write_transformer
from benchmarks.step_time import multiply_adds
from foresight.engines.onnxruntime import OnnxRuntimeBackend
from foresight.exporter.models.base import assign_parameters

# A model of each family, and the fixtures that make its checkpoint and bundle.
FIXTURES = {
    "latte": ("checkpoint", "bundle"),
    "cogvideox-5b": ("cogvideox_checkpoint", "cogvideox_bundle"),
    "open-sora": ("open_sora_checkpoint", "open_sora_bundle"),
}


@pytest.fixture(scope="module", params=FIXTURES)
def setup(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    """A tiny model of every family."""
    checkpoint, bundle = (request.getfixturevalue(name) for name in FIXTURES[request.param])
    size = {"frames": 34} if request.param == "open-sora" else {}
    graph = tmp_path_factory.mktemp("one-graph") / "transformer.onnx"
    return Setup(request.param, "cpu", "fp32", 23, size, checkpoint, bundle, graph)


@pytest.fixture(scope="module")
def original(setup: Setup) -> Original:
    """The family's own transformer, with one step's arguments."""
    return load_original(setup.checkpoint, setup.manifest, setup.sizes, "cpu")


@pytest.fixture(scope="module")
def whole(setup: Setup) -> Transformer:
    """The exporter's modules in a row, with weights."""
    export = setup.export()
    module = Transformer(export.split).eval()
    module.load(export.checkpoint)
    return module


@pytest.fixture(scope="module")
def inputs(setup: Setup, original: Original) -> dict[str, Tensor]:
    """The original's step as the whole transformer takes it: the text has been through the condition."""
    step, export = original.step, setup.export()
    plan = export.split.condition
    condition = copy.deepcopy(plan.module)
    assign_parameters(condition, lambda name: plan.parameter(export.checkpoint, name))
    given = {
        "text_states": step.text,
        "text_mask": torch.ones(step.text.shape[:2], dtype=torch.int64),
        "unconditional": torch.zeros(step.text.shape[0], dtype=torch.int64),
    }
    with torch.no_grad():
        made = condition(**{i.spec.name: given[i.spec.name] for i in plan.inputs})
    outputs = made if isinstance(made, tuple) else (made,)
    conditions = {spec.name: tensor for spec, tensor in zip(plan.outputs, outputs, strict=True)}
    return {"latents": step.latents, "timestep": step.timestep.float()} | conditions


def test_the_modules_in_a_row_compute_the_originals_step(
    original: Original, whole: Transformer, inputs: dict[str, Tensor]
) -> None:
    with torch.no_grad():
        expected = original.module(**original.arguments)
        got = whole(**inputs)
    expected = expected[0] if isinstance(expected, tuple) else expected
    assert got.std() > 0.01
    # some predict a variance as well, in channels after the others, which no part computes
    torch.testing.assert_close(got, expected[tuple(slice(size) for size in got.shape)], rtol=1e-4, atol=1e-4)


def test_one_graph_computes_the_same(setup: Setup, whole: Transformer, inputs: dict[str, Tensor]) -> None:
    export = setup.export()
    write_transformer(export.split, export.checkpoint, setup.sizes, setup.opset, setup.graph)
    with torch.no_grad():
        expected = whole(**inputs).numpy()
    engine, output = OnnxRuntimeBackend().load_graph(setup.graph, setup.transformer), np.empty_like(expected)
    arrays = {name: tensor.contiguous().numpy() for name, tensor in inputs.items()}
    engine.run({**arrays, setup.transformer.outputs[0].name: output})
    np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-4)


def test_operations_are_counted(tmp_path: Path) -> None:
    """Latte-1's, at real size, against the formula for its blocks; before and after them little is computed."""
    split = real_split("latte", tmp_path)
    counted = count_flops(split, request_sizes(split.ranges))
    formula = 2 * multiply_adds(pairs=28, frames=16, tokens=32 * 32, dim=1152)
    assert formula < counted < 1.001 * formula


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_the_command_ends_in_one_json_line(tmp_path: Path, model: str) -> None:
    candidates = ["torch, eager", "onnxruntime, per block", "onnxruntime, one graph", "tensorrt, per block"]
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--small", "--model", model]
    command += [
        "--rounds",
        "2",
        "--request-rounds",
        "1",
        "--steps",
        "4",
        "--work",
        str(tmp_path),
        "--only",
        *candidates,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert result["step"].keys() == set(candidates[:3])
    assert all(row["step_ms"] > 0 and row["tflops"] > 0 for row in result["step"].values())
    assert result["requests"].keys() == {"onnxruntime, per block"}
    skipping = result["requests"]["onnxruntime, per block"]["skipping"]
    assert skipping["N1R2, output"]["blocks_computed"] < skipping["none"]["blocks_computed"]
    assert result["left_out"]["tensorrt, per block"] == "runs on an NVIDIA GPU, not on a CPU"
