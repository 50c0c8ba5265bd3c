"""bench: peers and policies on the same requests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.commands.support import Cli, assert_refused, document


def test_bench_prints_a_document_and_writes_it_beside_its_picture(
    foresight_cli: Cli, bundle: Path, checkpoint: Path, tmp_path: Path
) -> None:
    chosen = ("--only", "pab", "--only", "static", "--pairs", 2, "--steps", 4, "--threads", 1)
    output = tmp_path / "results"
    printed = document(
        foresight_cli("bench", bundle, *chosen, "--checkpoint", checkpoint, "--output", output, "--json")
    )
    names = [row["name"] for row in printed["rows"]]
    assert names == ["none", "static", "diffusers", "pab:skip=2"]
    assert [seed for _, seed in printed["pairs"]] == [0, 1]
    assert printed["threads"] == 1 and printed["steps"] == 4
    (line,) = (output / "bench.json").read_text().splitlines()
    assert json.loads(line)["rows"] == printed["rows"]
    assert (output / "bench.svg").read_text().startswith("<svg ")


def test_bench_tells_people_what_is_adapted_and_what_did_not_run(
    foresight_cli: Cli, bundle: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foresight.evaluation.peers.version_of", lambda name: None if name == "cache-dit" else "1")
    chosen = ("--only", "taylorseer", "--only", "cache-dit", "--pairs", 1, "--steps", 3)
    outcome = foresight_cli("bench", bundle, *chosen, "--checkpoint", checkpoint)
    assert outcome.code == 0, outcome
    assert "taylorseer is adapted: its calls are put into a cache context" in outcome.out
    assert "cache-dit did not run: cache-dit not installed" in outcome.out
    assert "without a cache none and diffusers make" in outcome.out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--only", "abacus"), "only: got 'abacus'"),
        (("--pairs", 0), "pairs: got 0"),
        (("--steps", 0, "--only", "none"), "steps: got 0"),
        (("--threads", 0), "threads: got 0"),
    ],
    ids=str,
)
def test_bench_refuses_odd_flags(foresight_cli: Cli, bundle: Path, flags: tuple[Any, ...], message: str) -> None:
    assert_refused(foresight_cli("bench", bundle, *flags), 2, message)


def test_bench_writes_into_no_bundle(foresight_cli: Cli, bundle: Path) -> None:
    assert_refused(foresight_cli("bench", bundle, "--output", bundle / "results"), 2)
