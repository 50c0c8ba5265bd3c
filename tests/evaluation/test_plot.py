"""A benchmark's picture: every result that has a place is in it."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree

from foresight.evaluation.plot import plot

SVG = "{http://www.w3.org/2000/svg}"


def row(name: str, psnr_db: float | None, speedup: float, kind: str = "as shipped") -> dict[str, Any]:
    return {"name": name, "kind": kind, "psnr_db": psnr_db, "cpu_speedup": {"median": speedup}}


def test_every_result_is_a_point_and_every_contender_a_line() -> None:
    rows = [row("pab:skip=2", 41.0, 1.2), row("ours", 50.0, 1.5, "this project"), row("ours:a=1", 45.0, 1.9, "adapted")]
    picture = ElementTree.fromstring(plot(rows))
    titles = [title.text for title in picture.iter(f"{SVG}title")]
    assert titles == ["pab:skip=2: 1.20x, 41.0 dB", "ours: 1.50x, 50.0 dB", "ours:a=1: 1.90x, 45.0 dB"]
    assert len(list(picture.iter(f"{SVG}polyline"))) == 2


def test_faster_is_further_right_and_better_is_higher() -> None:
    picture = ElementTree.fromstring(plot([row("a", 41.0, 1.2), row("b", 52.0, 1.9)]))
    first, second = (
        {key: float(circle.attrib[key]) for key in ("cx", "cy")} for circle in picture.iter(f"{SVG}circle")
    )
    assert second["cx"] > first["cx"] and second["cy"] < first["cy"]


def test_what_is_identical_or_slower_than_its_reference_breaks_nothing() -> None:
    assert "circle" not in plot([row("a", None, 1.0)])
    assert "circle" not in plot([])
    slow = plot([row("a", 40.0, 0.4)])
    assert 0 < float(re.findall(r'cx="([\d.]+)"', slow)[0]) < 860


def test_names_cannot_break_the_picture() -> None:
    ElementTree.fromstring(plot([row("a<b>&:c=1", 40.0, 1.1)]))
