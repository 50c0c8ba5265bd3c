"""A written graph is held to eager: with its own weights it passes, with another block's it does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from foresight.engines.bundle import open_bundle
from foresight.engines.errors import ExportError
from foresight.exporter.check import TOLERANCES, check_part
from foresight.exporter.checkpoint import Checkpoint
from foresight.exporter.models import split_checkpoint
from foresight.exporter.models.base import ExportRequest, PartPlan, Split, assign_parameters


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
