"""Checking a written graph against the model's original code, run eagerly on the same random inputs."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from ..engines.arrays import HostArray, numpy_dtype
from ..engines.errors import ExportError
from ..engines.manifest import Part, TensorSpec
from ..engines.onnxruntime import OnnxRuntimeBackend
from .graph import widen
from .models.base import PartPlan, assign_parameters

# Largest difference from eager that passes, as a share of the largest value of the output (at least 1).
TOLERANCES = {"fp32": 2e-4, "fp16": 4e-2, "bf16": 2e-3}


def check_part(plan: PartPlan, graph: Path, tolerance: float) -> float:
    """Run a written graph and the module's reference on the same random inputs; the largest absolute difference.

    Every input is drawn on its own, at each of the plan's sizes. All references are computed before the graph is
    loaded, so that one copy of the weights is in memory at a time. Raises ExportError where a difference is beyond
    `tolerance` times the output's largest value.
    """
    cases = [(sizes, *_expected(plan, sizes, seed)) for seed, sizes in enumerate(plan.check_sizes)]
    assign_parameters(plan.module, lambda name: plan.module.get_parameter(name).to("meta"))
    with _runnable(plan, graph) as (runnable, part):
        engine, worst = OnnxRuntimeBackend(optimize=False).load_graph(runnable, part), 0.0
    for sizes, inputs, expected in cases:
        outputs = {spec.name: np.empty(spec.resolve(sizes), numpy_dtype(spec.dtype)) for spec in part.outputs}
        engine.run({name: _without_bf16(tensor).contiguous().numpy() for name, tensor in inputs.items()} | outputs)
        for spec, reference in zip(part.outputs, expected, strict=True):
            difference = float(np.abs(outputs[spec.name].astype(np.float32) - reference).max())
            allowed = 1.0 if spec.dtype == "uint8" else tolerance * max(1.0, float(np.abs(reference).max()))
            if not difference <= allowed:
                raise ExportError(
                    f"{part.name}: {spec.name} differs from eager by {difference:.3g}, expected at most {allowed:.3g} "
                    f"at {dict(sizes)}; this version of torch.onnx exports it wrongly"
                )
            worst = max(worst, difference)
    return worst


def _expected(plan: PartPlan, sizes: Mapping[str, int], seed: int) -> tuple[dict[str, Tensor], list[HostArray]]:
    """Random inputs and what the reference makes of them; bf16 weights are computed with in fp32."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {i.spec.name: i.example(sizes, generator) for i in plan.inputs}
    with torch.no_grad(), _in_fp32(plan.module):
        results = plan.reference(**{name: _without_bf16(tensor).clone() for name, tensor in inputs.items()})
    results = results if isinstance(results, tuple) else (results,)
    return inputs, [result.float().numpy() for result in results]


@contextmanager
def _in_fp32(module: nn.Module) -> Iterator[None]:
    """Compute with fp32 copies of a module's bf16 parameters and buffers for a while."""
    owners: list[dict[str, Any]] = [owner for part in module.modules() for owner in (part._parameters, part._buffers)]
    kept = [
        (owner, name, value)
        for owner in owners
        for name, value in owner.items()
        if value is not None and value.dtype == torch.bfloat16
    ]
    try:
        for owner, name, value in kept:
            wide = value.float()
            owner[name] = nn.Parameter(wide, requires_grad=False) if isinstance(value, nn.Parameter) else wide
        yield
    finally:
        for owner, name, value in kept:
            owner[name] = value


@contextmanager
def _runnable(plan: PartPlan, graph: Path) -> Iterator[tuple[Path, Part]]:
    """The graph as a CPU can run it: bf16, which has no CPU kernels, is widened to fp32."""
    part = plan.part
    if not any(parameter.dtype == torch.bfloat16 for parameter in plan.module.parameters()):
        yield graph, part
        return
    with tempfile.TemporaryDirectory(dir=graph.parent, prefix="check-") as folder:
        widen(graph, Path(folder) / graph.name)
        specs = [tuple(_widened(spec) for spec in specs) for specs in (part.inputs, part.outputs)]
        yield Path(folder) / graph.name, msgspec.structs.replace(part, inputs=specs[0], outputs=specs[1])


def _widened(spec: TensorSpec) -> TensorSpec:
    return msgspec.structs.replace(spec, dtype="fp32") if spec.dtype == "bf16" else spec


def _without_bf16(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor
