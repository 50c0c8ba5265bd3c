"""The tables of our pages."""

from __future__ import annotations

import json

import pytest

from benchmarks.readme import PAGES, REPOSITORY


@pytest.mark.parametrize(("page", "section"), [("README.md", "step time"), ("README.md", "engine build")])
def test_a_table_of_times_names_the_machine(page: str, section: str) -> None:
    draw, files = PAGES[page][section]
    results = [json.loads((REPOSITORY / file).read_text(encoding="utf-8")) for file in files]
    machine = results[0]["machine"]
    assert draw(*results).startswith(f"{machine['processor']}, {machine['cores']} cores; ")
