"""The benchmark for GPUs, as far as it can be checked without one: do all candidates compute the same step?"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import common
from benchmarks.engine_build import real_split
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.originals import load_original
from benchmarks.gpu.setup import COMPILING, Setup, request_sizes
from benchmarks.gpu.steps import CANDIDATES, EAGER, measure_in_pairs, row_of
from benchmarks.gpu.transformer import Transformer, count_flops, write_transformer
from benchmarks.step_time import Function, measure, multiply_adds
from foresight.engines.onnxruntime import OnnxRuntimeBackend
from foresight.exporter.models.base import assign_parameters
from tests.benchmarks.steps import logged_step
from zoo import FAMILIES, PUBLISHED
from zoo.base import Original


@pytest.fixture(scope="module", params=FAMILIES)
def setup(
    request: pytest.FixtureRequest,
    examples: Callable[[str], Path],
    example_bundles: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Setup:
    """A tiny model of every family."""
    example = FAMILIES[request.param].example
    checkpoint, bundle = examples(request.param), example_bundles(request.param)
    graph = tmp_path_factory.mktemp("one-graph") / "transformer.onnx"
    return Setup(example.model, "cpu", "fp32", 23, example.sizes, checkpoint, bundle, graph)


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


def logged(log: Path, *names: str, **fails_in: int) -> dict[str, Function]:
    return {name: (logged_step, (log, name, fails_in.get(name))) for name in names}


def steps_in(log: Path) -> list[str]:
    """But for the first one of every process, which warms up."""
    lines = (log / "steps").read_text(encoding="utf-8").splitlines()
    names = [line.partition(" of ")[0] for line in lines]
    return [line for index, line in enumerate(lines) if names[index] in names[:index]]


def test_candidates_take_turns_with_torch_eager_and_go_before_the_next_one_comes(tmp_path: Path) -> None:
    left_out: dict[str, str] = {}
    turns = measure_in_pairs(logged(tmp_path, EAGER.name, "a", "b"), 2, left_out)
    assert steps_in(tmp_path) == [
        *["torch, eager of 1"] * 2,
        *["torch, eager of 2", "a of 2"] * 2,
        *["torch, eager of 2", "b of 2"] * 2,
    ]
    assert {name: len(pairs) for name, pairs in turns.items()} == {EAGER.name: 2, "a": 2, "b": 2}
    assert not left_out and all(eager == own for eager, own in turns[EAGER.name])


@pytest.mark.parametrize("fails_in", [1, 3])
def test_a_candidate_that_fails_is_left_out(tmp_path: Path, fails_in: int) -> None:
    left_out: dict[str, str] = {}
    turns = measure_in_pairs(logged(tmp_path, EAGER.name, "a", "b", a=fails_in), 3, left_out)
    assert turns.keys() == {EAGER.name, "b"} and left_out == {"a": "RuntimeError: a fails"}


@pytest.mark.parametrize("fails_in", [1, 7])
def test_without_torch_eager_the_others_go_on_alone(tmp_path: Path, fails_in: int) -> None:
    """Before anything was measured, or in its turns with the first of them, when it has been measured itself."""
    left_out: dict[str, str] = {}
    turns = measure_in_pairs(logged(tmp_path, EAGER.name, "a", "b", **{EAGER.name: fails_in}), 3, left_out)
    assert left_out == {EAGER.name: "RuntimeError: torch, eager fails"}
    assert "ratio_to_eager" not in row_of(turns["b"], None)
    assert ("ratio_to_eager" in row_of(turns["a"], None)) == (EAGER.name in turns) == (fails_in > 1)


def test_ratios_are_to_torch_eagers_steps_of_the_same_turns() -> None:
    assert row_of([(1.0, 2.0), (4.0, 2.0), (4.0, 4.0)], flops=6 * 10**12) == {
        "step_ms": 2000.0,
        "ratio_to_eager": 1.0,
        "tflops": 3.0,
    }


def test_on_a_cpu_all_take_turns(tmp_path: Path) -> None:
    measured = measure(logged(tmp_path, "a", "b", "c"), 2)
    assert steps_in(tmp_path) == ["a of 3", "b of 3", "c of 3"] * 2
    assert all(len(steps.seconds) == len(steps.processor) == 2 for steps in measured.values())
    with pytest.raises(RuntimeError, match="^b: RuntimeError: b fails"):
        measure(logged(tmp_path, "a", "b", b=2), 2)


def test_where_nothing_can_be_measured_nothing_is_made_or_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    command = ["benchmarks.gpu", "--device", "cuda", "--small", "--save", "--work", str(tmp_path / "work")]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match="nothing was measured on cuda"):
        main()
    assert not (tmp_path / "results").exists()
    assert not [path for path in (tmp_path / "work").rglob("*") if path.is_file()]
    result = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert result["step"] == result["requests"] == {} and result["left_out"]


@pytest.mark.slow
@pytest.mark.parametrize("model", PUBLISHED)
def test_the_command_ends_in_one_json_line(tmp_path: Path, model: str) -> None:
    candidates = ["torch, eager", "onnxruntime, per block", "onnxruntime, one graph", "tensorrt, per block"]
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--small", "--model", model]
    command += [
        "--rounds",
        "2",
        "--request-rounds",
        "1",
        "--steps",
        "8",  # of which two transformers have some each
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


@pytest.mark.slow
def test_the_command_runs_on_a_simulated_gpu(tmp_path: Path) -> None:
    """But for what no simulation has: torch and ONNX Runtime's CUDA provider."""
    root = Path(__file__).parents[2]
    path = (str(root / "tests" / "simulation" / "modules"), str(root), os.environ.get("PYTHONPATH", ""))
    command = [sys.executable, "-m", "benchmarks.gpu", "--small", "--dtype", "fp32", "--work", str(tmp_path)]
    command += ["--rounds", "2", "--request-rounds", "1", "--steps", "4"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root, env=environment)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    compiling = {name for name in CANDIDATES if name.startswith(COMPILING)}
    assert result["step"].keys() == compiling, result["left_out"]
    assert result["requests"].keys() == {name for name in compiling if "per block" in name}
    assert all(row["memory"]["taken_mib"] > 0 for row in result["requests"].values())
    assert result["left_out"].keys() == CANDIDATES.keys() - compiling
