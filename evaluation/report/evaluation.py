"""An evaluation as one HTML page: what policies skip against what that costs, and the videos that suffer most."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...engines.wording import plural
from ...runtime.policies import policy_of_settings
from ...runtime.whole import write_whole
from ..evaluate import REFERENCE, Row, VideoKey, Videos
from ..metrics import PSNR
from ..results import Results
from ..summary import Summary, by_quality
from .film import film
from .templates import check_libraries, render
from .wording import decibels, in_turns, policy_words

WIDTH, HEIGHT = 720, 360  # of the curve, in units of its own
LEFT, RIGHT, TOP, BOTTOM = 60, 20, 16, 44  # around its area
COLOURS = 5  # classes family-0 to family-4 of the template
PIXELS = 2**20  # per video: there are two a policy
TICK_DECIBELS = (5, 10, 20, 50)


def write_evaluation(results: Results, videos: Videos, path: str | os.PathLike[str]) -> Path:
    """Write a self-contained page about an evaluation; returns its path. The page appears whole or not at all.

    Of `videos` the worst and the median one of each policy are shown beside those without reuse. Raises OutputError
    where jinja2 or Pillow is missing or the page cannot be written.
    """
    check_libraries()
    page = render("evaluation.html", _page(results, videos))
    return write_whole(Path(path), lambda target: target.write_bytes(page))


def _page(results: Results, videos: Videos) -> dict[str, Any]:
    shown: list[dict[str, Any]] = [
        {
            "number": number,
            "name": summary.candidate,
            "words": _policy_words(results, summary),
            "films": _films(results, summary, videos),
        }
        for number, summary in enumerate(results.candidates, 1)
    ]
    return {
        "title": f"{results.model}: {plural(len(results.candidates), 'setting')} against no reuse",
        "facts": _facts(results),
        "notes": results.notes,
        "curve": curve(results),
        "heads": [metric.label for metric in results.metrics[1:]],
        "table": [_table_row(results, number, summary) for number, summary in enumerate(results.candidates, 1)],
        "reference": _reference_row(results),
        "shown": shown,
        "compressed": next((film["note"] for one in shown for _, film in one["films"] if film["note"]), ""),
    }


def _facts(results: Results) -> list[tuple[str, str]]:
    settings, backend = results.settings, dict(results.settings["backend"])
    engine = f"{backend.pop('backend', '')} {backend.pop('version', '')}".strip()
    made = f"{plural(len(results.prompts), 'prompt')} with {plural(results.seeds, 'seed')} each"
    guidance = ", then ".join(f"{one:g}" for one in (settings["guidance"], *settings.get("later_guidances", ())))
    turns = settings.get("turns")
    return [
        ("Videos", f"{made}, every one with each setting and without reuse, from the same noise"),
        ("Sampling", f"{plural(settings['steps'], 'step')}, guidance {guidance}"),
        *([("Transformers", in_turns(turns))] if turns else []),
        ("Backend", ", ".join([engine, *(f"{name} {value}" for name, value in backend.items())])),
        ("Bundle", str(settings["bundle"])[:12]),
    ]


def _policy_words(results: Results, summary: Summary) -> str:
    policy = policy_of_settings(results.policies[summary.candidate])
    settings = results.settings
    return summary.candidate if policy is None else policy_words(policy, settings.get("turns", [settings["steps"]]))


def _films(results: Results, summary: Summary, videos: Videos) -> list[tuple[str, dict[str, Any]]]:
    """The worst and the median video, each with what is said of it; one where there is only one."""
    rows = by_quality(results.rows_of(summary.candidate))
    chosen = {"Worst video": rows[0], "Median video": rows[len(rows) // 2]}
    if len(rows) == 1:
        chosen = {"The only video": rows[0]}
    return [(_caption(words, row), _film(results, row, videos)) for words, row in chosen.items()]


def _caption(words: str, row: Row) -> str:
    return f"{words}: {decibels(_infinite(row.metrics[PSNR.name]))}, “{row.prompt}”, seed {row.seed}"


def _film(results: Results, row: Row, videos: Videos) -> dict[str, Any]:
    reference = VideoKey(REFERENCE, row.key.pair)
    return film(videos[row.key], results.fps, videos[reference], PIXELS)


def _table_row(results: Results, number: int, summary: Summary) -> dict[str, Any]:
    speed = summary.speed
    cells = [
        f"{100 * summary.share_skipped:.1f} %",
        f"{100 * summary.share_steps_skipped:.1f} %",
        decibels(_infinite(summary.psnr_db)),
        decibels(_infinite(summary.mean_psnr_db)),
        decibels(_infinite(summary.worst_psnr_db)),
        *_metric_cells(results, summary),
    ]
    if speed is not None:
        cells.append(f"{speed.median:.2f}×")
        cells.append("one pair" if speed.pairs == 1 else f"{speed.low:.2f} to {speed.high:.2f}")
        cells[-1] += ", noisy" if speed.noisy else ""
    return {
        "number": number,
        "name": summary.candidate,
        "family": _families(results)[summary.candidate],
        "cells": cells,
    }


def _metric_cells(results: Results, summary: Summary) -> list[str]:
    return ["" if (value := summary.value(metric)) is None else metric.shown(value) for metric in results.metrics[1:]]


def _reference_row(results: Results) -> list[str]:
    """What there is to say of the videos without reuse; nothing where all metrics compare."""
    cells = _metric_cells(results, results.reference)
    return ["0.0 %", "0.0 %", "", "", "", *cells, "", ""] if any(cells) else []


def curve(results: Results) -> dict[str, Any]:
    """Share of calls skipped against PSNR: a mark a setting, its worst video below it, a line a policy."""
    shown = [summary for summary in results.candidates if summary.psnr_db is not None]
    values = [value for one in shown for value in (one.psnr_db, one.worst_psnr_db) if value is not None]
    most = max((one.share_skipped for one in results.candidates), default=0.0)
    right = min(100, 10 * math.ceil(10 * most + 0.2)) or 10
    low, high, tick = _decibel_axis(values)
    families = _families(results)

    def at(share: float, value: float | None) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * 100 * share / right
        up = 1.0 if value is None else (value - low) / (high - low)
        return round(x, 1), round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * up, 1)

    marks = []
    for number, summary in enumerate(results.candidates, 1):
        (x, y), (_, worst) = (at(summary.share_skipped, v) for v in (summary.psnr_db, summary.worst_psnr_db))
        told = f"{number}. {summary.candidate}: {100 * summary.share_skipped:.1f} % of the calls skipped, "
        told += decibels(_infinite(summary.psnr_db))
        told += f", worst video {decibels(_infinite(summary.worst_psnr_db))}"
        mark = {"number": number, "x": x, "y": y, "worst": worst, "family": families[summary.candidate], "told": told}
        marks.append(mark)
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "bottom": HEIGHT - BOTTOM,
        "right": WIDTH - RIGHT,
        "x_ticks": [(at(share / 100, low)[0], f"{share} %") for share in range(0, right + 1, 10)],
        "y_ticks": [(at(0, value)[1], f"{value}") for value in range(low, high + 1, tick)],
        "marks": marks,
        "lines": _lines(marks),
        "identical": [one.candidate for one in results.candidates if one.psnr_db is None],
        "legend": [(family, name) for name, family in _legend(results).items()],
    }


def _lines(marks: Sequence[dict[str, Any]]) -> list[tuple[int, str]]:
    """Through the marks of a policy, from left to right."""
    lines = []
    for family in dict.fromkeys(mark["family"] for mark in marks):
        points = sorted((mark["x"], mark["y"]) for mark in marks if mark["family"] == family)
        lines.append((family, "M" + "L".join(f"{x:g} {y:g}" for x, y in points)))
    return lines


def _decibel_axis(values: Sequence[float]) -> tuple[int, int, int]:
    """Lowest and highest mark, and what lies between two of them: five or six marks at most."""
    lowest, highest = min(values, default=0.0), max(values, default=1.0)
    for tick in TICK_DECIBELS:
        low, high = tick * math.floor(lowest / tick), tick * math.ceil(highest / tick)
        if high - low <= 6 * tick:
            break
    return low, max(high, low + tick), tick


def _legend(results: Results) -> dict[str, int]:
    names = dict.fromkeys(str(settings["name"]) for settings in results.policies.values())
    return {name: number % COLOURS for number, name in enumerate(names)}


def _families(results: Results) -> dict[str, int]:
    """Per candidate the number of its policy, which has a colour."""
    numbers = _legend(results)
    return {candidate: numbers[settings["name"]] for candidate, settings in results.policies.items()}


def _infinite(value: float | None) -> float:
    return math.inf if value is None else value
