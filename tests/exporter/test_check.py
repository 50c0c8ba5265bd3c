"""A written graph is held to eager: with its own weights it passes, with another block's it does not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import T5Config, T5EncoderModel

import zoo.latte
from foresight.engines.bundle import open_bundle
from foresight.engines.errors import ExportError
from foresight.exporter.check import TOLERANCES, check_part, in_fp32
from foresight.exporter.checkpoint import Checkpoint
from foresight.exporter.export import graph_from_plan
from foresight.exporter.graph import write_graph
from foresight.exporter.models import split_checkpoint
from foresight.exporter.models.base import ExportRequest, PartPlan, Split, assign_parameters
from foresight.exporter.models.t5 import TextEncoder
from zoo.components import TINY_T5


@pytest.fixture(scope="module")
def split(checkpoint: Path) -> Split:
    return split_checkpoint("latte", Checkpoint("tiny", checkpoint), ExportRequest())


@pytest.fixture
def loaded(split: Split, checkpoint: Path) -> Callable[[int, int], PartPlan]:
    """A block's plan with the weights of another block in its module."""

    def load(block: int, weights_of: int) -> PartPlan:
        plan, donor = split.blocks[block], split.blocks[weights_of]
        files = Checkpoint("tiny", checkpoint)
        values = {name: donor.parameter(files, name) for name, _ in donor.module.named_parameters()}
        assign_parameters(plan.module, values.__getitem__)
        return plan

    return load


@pytest.mark.parametrize("block", range(4))
def test_every_block_has_its_own_weights(bundle: Path, loaded: Callable[[int, int], PartPlan], block: int) -> None:
    part = open_bundle(bundle).manifest.blocks[block]
    assert check_part(loaded(block, block), bundle / part.graph, TOLERANCES["fp32"]) < 1e-4


@pytest.mark.parametrize(("block", "other"), [(0, 2), (2, 0)])
def test_swapped_weights_would_be_far_off(
    bundle: Path, loaded: Callable[[int, int], PartPlan], block: int, other: int
) -> None:
    part = open_bundle(bundle).manifest.blocks[block]
    with pytest.raises(ExportError, match=r"differs from eager by [0-9.]+, expected at most 0.00"):
        check_part(loaded(block, other), bundle / part.graph, TOLERANCES["fp32"])


def test_a_model_that_overflows_by_itself_is_told_from_a_wrong_graph(
    bundle: Path, loaded: Callable[[int, int], PartPlan]
) -> None:
    plan, part = loaded(0, 0), open_bundle(bundle).manifest.blocks[0]
    values = {name: value * 1e30 for name, value in plan.module.named_parameters()}
    assign_parameters(plan.module, values.__getitem__)
    with pytest.raises(ExportError, match=r"block\.000: .* is not finite in the model's own code either"):
        check_part(plan, bundle / part.graph, TOLERANCES["fp32"])


def test_weights_in_bf16_are_computed_with_in_single_precision() -> None:
    narrow = TextEncoder(T5EncoderModel(T5Config(**TINY_T5)).eval().bfloat16())
    wide = copy.deepcopy(narrow).float()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected = wide(ids)
        with in_fp32():
            states = narrow(ids)
    assert states.dtype == torch.float32
    assert torch.equal(states, expected)


def test_the_activation_of_t5_is_not_rounded_in_bf16(tmp_path: Path) -> None:
    wide = {"d_ff": 2048, "num_layers": 4}
    files = Checkpoint("tiny", zoo.latte.write_random(tmp_path, text=wide))
    plan = split_checkpoint("latte", files, ExportRequest(dtype="bf16")).text_encoder
    graph = graph_from_plan(plan, 23)
    assign_parameters(plan.module, lambda name: plan.parameter(files, name))
    path, _ = write_graph(graph, plan.module.get_parameter, tmp_path / plan.part.graph)
    assert check_part(plan, path, TOLERANCES["bf16"]) < 1e-4  # 2e-3 where its constants are rounded
