"""The whole transformer as one module, made of the modules that a bundle's parts are exported from."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu.setup import whole_part
from foresight.exporter.checkpoint import Checkpoint
from foresight.exporter.graph import graph_from_module, write_graph
from foresight.exporter.models.base import TORCH_DTYPES, Split, assign_parameters


class Transformer(nn.Module):
    """Prologue, blocks and epilogue, one after the other, without caches; distances are not asked for.

    Takes the inputs that no part of it computes; of the conditions, each family has its own. Returns the epilogue's
    output. Its parameters are on the meta device until `load` is called.
    """

    def __init__(self, split: Split) -> None:
        super().__init__()
        self.plans = (split.prologue, *split.blocks, split.epilogue)
        self.parts = nn.ModuleList(copy.deepcopy(plan.module) for plan in self.plans)
        self.streams = split.streams
        self.part = whole_part([plan.part for plan in self.plans], split.streams)

    def load(self, checkpoint: Checkpoint) -> None:
        """Give it its weights. Raises CheckpointError."""
        for part, plan in zip(self.parts, self.plans, strict=True):
            assign_parameters(part, lambda name, plan=plan: plan.parameter(checkpoint, name))  # type: ignore[misc]

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: Tensor | None = None,
        text_bias: Tensor | None = None,
        text_embedding: Tensor | None = None,
        rotary_cos: Tensor | None = None,
        rotary_sin: Tensor | None = None,
    ) -> Tensor:
        conditions = {
            "text": text,
            "text_bias": text_bias,
            "text_embedding": text_embedding,
            "rotary_cos": rotary_cos,
            "rotary_sin": rotary_sin,
        }
        tensors = {"latents": latents, "timestep": timestep}
        tensors |= {name: tensor for name, tensor in conditions.items() if tensor is not None}
        for part, plan in zip(self.parts, self.plans, strict=True):
            caches = {f"cached_{name}": tensors[name] for name in self.streams if name in tensors}
            given = {spec.spec.name: (tensors | caches)[spec.spec.name] for spec in plan.inputs}
            computed = part(**given)
            computed = computed if isinstance(computed, tuple) else (computed,)
            tensors |= {spec.name: tensor for spec, tensor in zip(plan.outputs, computed, strict=True)}
            tensors |= {name: tensors[f"new_{name}"] for name in self.streams if f"new_{name}" in tensors}
        return tensors[self.plans[-1].outputs[0].name]


def write_transformer(split: Split, checkpoint: Checkpoint, sizes: Mapping[str, int], opset: int, path: Path) -> None:
    """Export the transformer as one graph, traced at `sizes`. Raises CheckpointError, ExportError.

    Sizes that the bundle pins are constant in it: all parts in a row agree on them, as those of one part need not.
    """
    module = Transformer(split).eval()
    module.load(checkpoint)
    free = {name for name, (low, high) in split.ranges.items() if low < high}
    inputs = module.part.inputs
    graph = graph_from_module(
        module,
        {spec.name: torch.zeros(spec.resolve(sizes), dtype=TORCH_DTYPES[spec.dtype]) for spec in inputs},
        [spec.name for spec in module.part.outputs],
        {spec.name: {axis: str(dim) for axis, dim in enumerate(spec.shape) if dim in free} for spec in inputs},
        opset,
    )
    write_graph(graph, module.get_parameter, path)


def count_flops(split: Split, sizes: Mapping[str, int]) -> int:
    """Of one step's matrix products and convolutions; a multiply-add is two. Nothing is computed."""
    module = Transformer(split).to("meta")
    inputs = {
        spec.name: torch.empty(spec.resolve(sizes), dtype=TORCH_DTYPES[spec.dtype], device="meta")
        for spec in module.part.inputs
    }
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(**inputs)
    return int(counter.get_total_flops())
