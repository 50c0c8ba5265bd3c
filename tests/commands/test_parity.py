"""parity: two backends over the same inputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from foresight.engines.bundle import open_bundle
from tests.commands.support import Cli, assert_refused, document


def test_parity_lists_the_parts_worst_first(foresight_cli: Cli, bundle: Path) -> None:
    summary = document(foresight_cli("parity", bundle, "--steps", 1, "--json"))
    rows = summary["differences"]
    assert {row["part"] for row in rows} == {part.name for part in open_bundle(bundle).manifest.parts}
    shares = [row["relative"] / row["tolerance"] for row in rows]
    assert shares == sorted(shares, reverse=True)
    assert summary["beyond_tolerance"] == [] and all(row["within"] for row in rows)


def test_parity_fails_where_a_part_is_beyond_the_tolerance(foresight_cli: Cli, bundle: Path) -> None:
    outcome = foresight_cli("parity", bundle, "--part", "block.001", "--steps", 1, "--tolerance", 1e-12, "--json")
    assert outcome.code == 1
    assert json.loads(outcome.out)["beyond_tolerance"] == ["block.001"]
    assert outcome.err.startswith("error: parity: block.001 on onnxruntime differ")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--part", "block.999"), "parts: got 'block.999'"),
        (("--backend", "abacus"), "backend: got 'abacus'"),
        (("--tolerance", -1), "tolerance: got -1"),
        (("--steps", 0), "steps: got 0"),
    ],
    ids=str,
)
def test_parity_refuses_odd_flags(foresight_cli: Cli, bundle: Path, flags: tuple[Any, ...], message: str) -> None:
    assert_refused(foresight_cli("parity", bundle, *flags), 2, message)
