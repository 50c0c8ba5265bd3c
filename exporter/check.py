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
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

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
            _check_finite(part, spec, reference)
            difference = float(np.abs(outputs[spec.name].astype(np.float32) - reference).max())
            allowed = 1.0 if spec.dtype == "uint8" else tolerance * max(1.0, float(np.abs(reference).max()))
            if not difference <= allowed:
                raise ExportError(
                    f"{part.name}: {spec.name} differs from eager by {difference:.3g}, expected at most {allowed:.3g} "
                    f"at {dict(sizes)}; this version of torch.onnx exports it wrongly"
                )
            worst = max(worst, difference)
    return worst


def _check_finite(part: Part, spec: TensorSpec, reference: HostArray) -> None:
    """Refuse a model that overflows by itself, which no graph could be compared with. Raises ExportError."""
    if not np.isfinite(reference).all():
        raise ExportError(
            f"{part.name}: {spec.name} is not finite in the model's own code either, expected numbers for random "
            "inputs; export with dtype bf16 or fp32, or give another checkpoint"
        )


def _expected(plan: PartPlan, sizes: Mapping[str, int], seed: int) -> tuple[dict[str, Tensor], list[HostArray]]:
    """Random inputs and what the reference makes of them; bf16 weights are computed with in fp32."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {i.spec.name: i.example(sizes, generator) for i in plan.inputs}
    with torch.no_grad(), in_fp32():
        results = plan.reference(**{name: _without_bf16(tensor).clone() for name, tensor in inputs.items()})
    results = results if isinstance(results, tuple) else (results,)
    return inputs, [result.float().numpy() for result in results]


class in_fp32(TorchFunctionMode):
    """Computes in fp32 what is in bf16: weights become fp32 one by one, where they are used, and never all at once."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map(_without_bf16, (args, kwargs or {}))
        return _without_bf16(func(*args, **kwargs))


@contextmanager
def _runnable(plan: PartPlan, graph: Path) -> Iterator[tuple[Path, Part]]:
    """The graph as a CPU can run it: bf16, which has no CPU kernels, is widened to fp32."""
    part = plan.part
    if not any(parameter.dtype == torch.bfloat16 for parameter in plan.module.parameters()):
        yield graph, part
        return
    with tempfile.NamedTemporaryFile(dir=graph.parent, prefix="check-", suffix=".onnx") as wide:
        widen(graph, Path(wide.name))
        specs = [tuple(_widened(spec) for spec in specs) for specs in (part.inputs, part.outputs)]
        yield Path(wide.name), msgspec.structs.replace(part, inputs=specs[0], outputs=specs[1])


def _widened(spec: TensorSpec) -> TensorSpec:
    return msgspec.structs.replace(spec, dtype="fp32") if spec.dtype == "bf16" else spec


def _without_bf16(value: Any) -> Any:
    """A bf16 tensor, or that type itself, as fp32."""
    if isinstance(value, torch.dtype):
        return torch.float32 if value == torch.bfloat16 else value
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value
