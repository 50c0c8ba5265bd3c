"""What is recorded of the models is what is counted, and a count is what an export's own bundle says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.common import RESULTS
from benchmarks.models import CASES, Case, count, facts, manifest_without_files
from foresight.engines.bundle import open_bundle
from foresight.exporter.export import Export
from foresight.runtime.memory import plan_memory

RECORDED = json.loads((RESULTS / "models.json").read_text(encoding="utf-8"))["rows"]
PUBLISHED = [(case, row) for case, row in zip(CASES, RECORDED, strict=True) if not case.is_demo]


def test_every_case_is_recorded() -> None:
    assert [(row["model"], row["dtype"], row["sizes"]) for row in RECORDED] == [
        (case.model, case.dtype, dict(case.sizes)) for case in CASES
    ]


@pytest.mark.parametrize(("case", "row"), PUBLISHED[:1], ids=lambda value: getattr(value, "model", None))
def test_what_is_recorded_of_a_published_model_is_what_is_counted(
    case: Case, row: dict[str, object], tmp_path: Path
) -> None:
    assert count(case, tmp_path) == row


def test_memory_counted_without_files_is_that_of_the_bundle(demo_bundle: Path, tmp_path: Path) -> None:
    manifest = open_bundle(demo_bundle).manifest
    export = Export("latte-demo", Case("latte-demo", "fp32").request, None, tmp_path / "bundle")
    counted = plan_memory(manifest_without_files(export, manifest.sampler.kept))
    known = plan_memory(manifest)
    assert [phase.arrays for phase in counted.phases] == [phase.arrays for phase in known.phases]
    assert 0.9 * known.weights < counted.weights <= known.weights  # files hold constants beside the weights
    assert facts(export, Case("latte-demo", "fp32"), manifest)["memory_bytes"] == known.total
