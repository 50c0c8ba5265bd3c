"""The tables of the pages."""

from __future__ import annotations

import json

import pytest

from benchmarks.readme import PAGES, REPOSITORY

PAGE = "benchmarks/README.md"


@pytest.mark.parametrize("section", ["step time", "engine build"])
def test_a_table_of_times_names_the_machine(section: str) -> None:
    draw, files = PAGES[PAGE][section]
    results = [json.loads((REPOSITORY / file).read_text(encoding="utf-8")) for file in files]
    machine = results[0]["machine"]
    assert draw(*results).startswith(f"{machine['processor']}, {machine['cores']} cores; ")


def test_a_model_without_a_measured_step_has_a_dash() -> None:
    draw, files = PAGES["README.md"]["models"]
    result, real_size = [json.loads((REPOSITORY / file).read_text(encoding="utf-8")) for file in files]
    measured = {row["model"] for row in result["rows"] if "step_ms" in row} | {"latte"}
    for row, line in zip(result["rows"], draw(result, real_size).splitlines()[2:], strict=True):
        assert line.endswith("| — |") == (row["model"] not in measured)


def test_every_result_file_is_linked_beside_its_command() -> None:
    text = (REPOSITORY / PAGE).read_text(encoding="utf-8")
    for _, files in PAGES[PAGE].values():
        for file in files:
            name = file.removeprefix("benchmarks/")
            assert f"({name})" in text or file.startswith("demo/records/")
