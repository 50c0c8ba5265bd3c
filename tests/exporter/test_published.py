"""The real models by their published configurations: blocks, parameters, cache, and what a dry run says of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.engine_build import CASES, Case, real_split
from foresight.engines.manifest import DTYPE_BYTES
from foresight.exporter.check import TOLERANCES, check_part
from foresight.exporter.export import OPSET, graph_from_plan
from foresight.exporter.graph import write_graph
from foresight.exporter.models.base import assign_parameters
from foresight.exporter.registry import REGISTRY
from tests.support import Outcome
from zoo import PUBLISHED, write_published

# blocks, parameters of the transformer, and bytes of the cache of one guided prompt in 16 bits
FACTS: dict[str, tuple[dict[str, Any], int, float, int]] = {
    "latte": ({}, 56, 1.06e9, 56 * 2 * 16 * 1024 * 1152 * 2),
    "cogvideox-2b": ({}, 30, 1.69e9, 30 * 2 * (13 * 30 * 45 + 226) * 1920 * 2),
    "cogvideox-5b": ({}, 42, 5.57e9, 42 * 2 * (13 * 30 * 45 + 226) * 3072 * 2),
    "wan-1.3b": ({}, 30, 1.42e9, 30 * 2 * 21 * 30 * 52 * 1536 * 2),
    "wan-14b": ({"height": 720, "width": 1280}, 40, 14.29e9, 40 * 2 * 21 * 45 * 80 * 5120 * 2),
    "wan-a14b": ({}, 40, 14.29e9, 40 * 2 * 21 * 30 * 52 * 5120 * 2),
    "wan-ti2v-5b": ({}, 30, 5.00e9, 30 * 2 * 31 * 22 * 40 * 3072 * 2),
    "open-sora": ({"resolution": "720p", "duration": "2s"}, 56, 1.21e9, 56 * 2 * 15 * 45 * 80 * 1152 * 2),
}


def test_every_model_that_is_not_in_the_repository_has_its_published_configuration() -> None:
    assert PUBLISHED.keys() == {name for name, row in REGISTRY.items() if not row.comes_with_a_clone} == FACTS.keys()


@pytest.mark.parametrize("model", FACTS)
def test_a_dry_run_says_what_the_real_model_takes(
    foresight_cli: Callable[..., Outcome], tmp_path: Path, model: str
) -> None:
    sizes, blocks, _, cache_bytes = FACTS[model]
    flags = [word for name, value in sizes.items() for word in (f"--{name}", value)]
    folder = write_published(model, tmp_path / "published")
    said = foresight_cli(
        "export", "--model", model, "--checkpoint", folder, "--dtype", "fp16", *flags, "--dry-run", "--json"
    )
    plan = json.loads(said.out)
    assert said.code == 0 and plan["blocks"] == blocks
    assert plan["cache_bytes"] == cache_bytes
    assert not Path(plan["output"]).exists()


@pytest.mark.parametrize("model", FACTS)
def test_the_parts_hold_all_parameters_of_the_transformer(tmp_path: Path, model: str) -> None:
    sizes, _, parameters, _ = FACTS[model]
    split = real_split(model, tmp_path, **sizes)
    modules = {id(plan.module): plan.module for plan in (split.condition, split.prologue, split.epilogue)}
    count = sum(p.numel() for module in modules.values() for p in module.parameters())
    count += sum(p.numel() for plan in split.blocks for p in plan.module.parameters())
    assert count == pytest.approx(parameters, rel=0.01)


@pytest.mark.parametrize("model", FACTS)
def test_every_block_takes_the_streams_and_returns_them(tmp_path: Path, model: str) -> None:
    split = real_split(model, tmp_path, **FACTS[model][0])
    for plan in split.blocks:
        names = {one.spec.name for one in plan.inputs}
        assert {name for stream in split.streams for name in (stream, f"cached_{stream}")} <= names
        assert [spec.name for spec in plan.outputs] == [*(f"new_{stream}" for stream in split.streams), "distance"]
        assert all(DTYPE_BYTES[spec.dtype] == 4 for spec in plan.outputs)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_a_block_of_real_width_is_exported_as_it_is(tmp_path: Path, case: Case) -> None:
    """Every kind, fp32, few tokens, random weights: ONNX Runtime against the original code."""
    split = real_split(case.model, tmp_path / "published", **case.sizes)
    for kind, plan in {plan.kind: plan for plan in split.blocks}.items():
        graph = graph_from_plan(plan, OPSET)
        randomise(plan.module)
        write_graph(graph, plan.module.get_parameter, tmp_path / f"{plan.name}.onnx")
        difference = check_part(plan, tmp_path / f"{plan.name}.onnx", TOLERANCES["fp32"])
        assert 0 < difference < 1e-3, kind


def randomise(module: nn.Module) -> None:
    assign_parameters(module, lambda name: 0.02 * torch.randn(module.get_parameter(name).shape))
