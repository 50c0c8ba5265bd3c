"""The page of an evaluation: self-contained, true to its numbers, whatever policies and prompts there are."""

from __future__ import annotations

import base64
import io
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from foresight.engines.arrays import HostArray
from foresight.engines.errors import OutputError
from foresight.evaluation.evaluate import REFERENCE, Pair, Row, VideoKey
from foresight.evaluation.metrics import METRICS, PSNR, Metric
from foresight.evaluation.quality import psnr
from foresight.evaluation.report.evaluation import curve, write_evaluation
from foresight.evaluation.results import Results
from foresight.evaluation.summary import summarise
from foresight.runtime.policies import Forecast, Foresight, Policy, Static, policy_settings
from foresight.runtime.policies.notation import text_of
from tests.evaluation.page import Page

IDENTICAL = Static(warmup=19)
POLICIES = (Foresight(), Foresight(gamma=1.0), Forecast(), Static())
PAIRS = [Pair("a <b>red</b> circle", 0), Pair("a dog", 1), Pair("caf\udce9", 2)]
SETTINGS = {
    "version": "0.1.0",
    "bundle": "0123456789abcdef" * 4,
    "steps": 20,
    "guidance": 7.5,
    "negative_prompt": "",
    "backend": {"backend": "onnxruntime", "version": "1.23.0", "device": "cpu", "threads": "2"},
    "cache_memory": None,
}


def make(
    policies: tuple[Policy, ...] = POLICIES,
    pairs: list[Pair] = PAIRS,
    size: int = 16,
    metrics: tuple[Metric, ...] = (PSNR, METRICS["ssim"]),
) -> tuple[Results, dict[VideoKey, HostArray]]:
    """Each policy skips more than the one before, and is further off; of the pairs the second one is the worst."""
    generator = np.random.default_rng(0)
    videos: dict[VideoKey, HostArray] = {}
    rows = []
    for index, pair in enumerate(pairs):
        plain = generator.integers(64, 192, (3, size, size, 3), dtype=np.uint8)
        videos[VideoKey(REFERENCE, pair)] = plain
        rows.append(Row(REFERENCE, pair.prompt, pair.seed, 100, 100, 20, 0, 200.0, 200.0))
        for number, policy in enumerate(policies, 1):
            off = 0 if policy == IDENTICAL else number + (3 if index == 1 else 0)
            name = text_of(policy)
            key = VideoKey(name, pair)
            videos[key] = plain + np.uint8(off)
            quality = psnr(videos[key], plain) if off else None
            values = {"psnr": quality, **{metric.name: 0.5 for metric in metrics[1:] if not metric.of_set}}
            ran = 100 - 10 * number
            rows.append(Row(name, pair.prompt, pair.seed, ran, 100, 20, number, 2.0 * ran, 200.0, metrics=values))
    names = [text_of(policy) for policy in policies]
    of = {name: [row for row in rows if row.candidate == name] for name in (REFERENCE, *names)}
    results = Results(
        model="latte-demo",
        settings=SETTINGS,
        prompts=tuple(pair.prompt for pair in pairs),
        seeds=1,
        fps=8,
        metrics=metrics,
        policies={text_of(policy): policy_settings(policy) for policy in policies},
        reference=summarise(of[REFERENCE], metrics),
        candidates=tuple(summarise(of[name], metrics) for name in names),
        rows=tuple(rows),
        notes=("times: <told> as they are",),
    )
    return results, videos


def page_of(tmp_path: Path, results: Results, videos: dict[VideoKey, HostArray]) -> Page:
    return Page(write_evaluation(results, videos, tmp_path / "page.html"))


def test_the_page_fetches_nothing(tmp_path: Path) -> None:
    page = page_of(tmp_path, *make())
    assert not re.search(r"https?://|@import|url\(", page.html)
    assert all(image.startswith("data:image/") for image in page.images())
    assert not [tag for tag, attributes in page.tags if tag == "link" or (tag == "script" and "src" in attributes)]


def test_the_table_has_every_number(tmp_path: Path) -> None:
    results, videos = make()
    head, *rows = page_of(tmp_path, results, videos).rows["numbers"]
    assert head[1:] == ["policy", "calls", "steps", "PSNR", "mean", "worst", "SSIM", "speed-up", "from … to"]
    assert [row[1:4] for row in rows] == [
        ["foresight", "10.0 %", "5.0 %"],
        ["foresight:gamma=1", "20.0 %", "10.0 %"],
        ["forecast", "30.0 %", "15.0 %"],
        ["static", "40.0 %", "20.0 %"],
    ]
    first = results.candidates[0]
    assert rows[0][4] == f"{first.psnr_db:.1f} dB" and rows[0][6] == f"{first.worst_psnr_db:.1f} dB"
    assert rows[0][7:] == ["0.5000", "1.11×", "1.11 to 1.11"]


def test_worst_and_median_video_stand_beside_those_without_reuse(tmp_path: Path) -> None:
    results, videos = make()
    page = page_of(tmp_path, results, videos)
    assert page.words.count("Worst video: ") == page.words.count("Median video: ") == len(POLICIES)
    assert "“a dog”, seed 1" in page.words
    first = [np.asarray(Image.open(io.BytesIO(base64.b64decode(image.partition(",")[2])))) for image in page.images()]
    worst = VideoKey("foresight", PAIRS[1])
    assert np.array_equal(first[0], videos[worst][0])
    assert np.array_equal(first[1], videos[VideoKey(REFERENCE, PAIRS[1])][0])
    assert len(first) == len(POLICIES) * 2 * 3 * 3


def test_a_single_video_is_shown_once(tmp_path: Path) -> None:
    page = page_of(tmp_path, *make(pairs=PAIRS[:1]))
    assert page.words.count("The only video: ") == len(POLICIES)
    assert "Median" not in page.words and "one pair" in page.words


def test_texts_are_shown_as_they_are(tmp_path: Path) -> None:
    page = page_of(tmp_path, *make())
    assert "a <b>red</b> circle" in page.words and "<told>" in page.words
    assert not [tag for tag, _ in page.tags if tag == "told"]


def test_the_curve_has_a_mark_a_setting_and_a_line_a_policy() -> None:
    results, _ = make()
    drawn = curve(results)
    assert [mark["number"] for mark in drawn["marks"]] == [1, 2, 3, 4]
    assert [mark["x"] for mark in drawn["marks"]] == sorted(mark["x"] for mark in drawn["marks"])
    assert [mark["y"] for mark in drawn["marks"]] == sorted(mark["y"] for mark in drawn["marks"])
    assert all(mark["worst"] > mark["y"] for mark in drawn["marks"])
    assert drawn["legend"] == [(0, "foresight"), (1, "forecast"), (2, "static")]
    assert [family for family, _ in drawn["lines"]] == [0, 1, 2]
    assert drawn["lines"][0][1].count("L") == 1
    inside = range(drawn["left"], drawn["right"] + 1)
    assert all(round(mark["x"]) in inside and 0 < mark["y"] <= drawn["bottom"] for mark in drawn["marks"])


def test_identical_videos_lie_on_the_upper_edge(tmp_path: Path) -> None:
    results, videos = make((IDENTICAL, Static()))
    drawn = curve(results)
    assert drawn["identical"] == ["static:warmup=19"] and drawn["marks"][0]["y"] == drawn["marks"][0]["worst"] == 16
    assert "identical" in page_of(tmp_path, results, videos).rows["numbers"][1]
    alone, videos = make((IDENTICAL,))
    assert "identical" in page_of(tmp_path, alone, videos).words


def test_metrics_that_compare_nothing_tell_of_the_videos_without_reuse_too(tmp_path: Path) -> None:
    alone = replace(METRICS["ssim"], name="clip", label="CLIP", compares=False, digits=2)
    results, videos = make(metrics=(PSNR, alone))
    reference = [replace(row, metrics={"clip": 0.75}) for row in results.rows_of(REFERENCE)]
    results = replace(results, reference=summarise(reference, results.metrics))
    assert page_of(tmp_path, results, videos).rows["numbers"][-1][1:] == [
        "without reuse", "0.0 %", "0.0 %", "", "", "", "0.75", "", "",
    ]  # fmt: skip


def test_metrics_of_sets_have_a_column(tmp_path: Path) -> None:
    metric = replace(METRICS["ssim"], name="fvd", label="FVD", of_set=True, digits=1)
    results, videos = make(metrics=(PSNR, metric))
    results = replace(results, candidates=tuple(replace(one, sets={"fvd": 12.34}) for one in results.candidates))
    assert page_of(tmp_path, results, videos).rows["numbers"][1][7] == "12.3"


def test_large_videos_are_scaled_down_and_the_page_says_so(tmp_path: Path) -> None:
    results, videos = make((Static(),), PAIRS[:1], size=640)
    page = page_of(tmp_path, results, videos)
    assert "scaled from 640 × 640" in page.words
    assert all(image.startswith("data:image/jpeg") for image in page.images())


def test_a_missing_library_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(OutputError, match="jinja2 or Pillow is not installed"):
        write_evaluation(*make(), tmp_path / "page.html")
    assert not list(tmp_path.iterdir())
