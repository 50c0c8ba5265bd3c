"""Share skipped against PSNR as a picture: a panel a condition, a line a policy, that of the worst video dashed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

PANEL, HEIGHT, MARGIN, LEGEND = 330, 400, 48, 28
TICK_PERCENT, TICK_DB = 20, 10
HIGHEST_DB = 80  # what is beyond is as good as identical
COLOURS = ("#0072b2", "#000000", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MEASURES = {"mean_psnr_db": "none", "worst_psnr_db": "5 3"}

Rows = Sequence[Mapping[str, Any]]


def draw(panels: Mapping[str, Rows]) -> str:
    """The text of an SVG file. Settings of one policy are joined: those whose name begins with the same word."""
    families = list(dict.fromkeys(_family(row) for rows in panels.values() for row in rows))
    values = [row[name] for rows in panels.values() for row in rows for name in MEASURES]
    low, high = TICK_DB * math.floor(min(values) / TICK_DB), min(HIGHEST_DB, TICK_DB * math.ceil(max(values) / TICK_DB))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {PANEL * len(panels)} {HEIGHT + LEGEND}"',
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{PANEL * len(panels)}" height="{HEIGHT + LEGEND}" fill="white"/>',
    ]
    for index, (title, rows) in enumerate(panels.items()):
        parts.append(f'<g transform="translate({PANEL * index} 0)">')
        parts += [*_scales(title, low, high), *_lines(families, rows, low, high), "</g>"]
    for index, family in enumerate(families):
        x, colour = MARGIN + 110 * index, COLOURS[index % len(COLOURS)]
        parts.append(f'<line x1="{x}" x2="{x + 24}" y1="{HEIGHT + 8}" y2="{HEIGHT + 8}" stroke="{colour}"')
        parts.append(f'stroke-width="2"/><text x="{x + 30}" y="{HEIGHT + 12}">{escape(family)}</text>')
    parts.append(f'<text x="{MARGIN + 110 * len(families)}" y="{HEIGHT + 12}">dashed: the worst video</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _family(row: Mapping[str, Any]) -> str:
    return str(row["setting"]).partition(" ")[0]


def _place(percent: float, decibels: float, low: float, high: float) -> tuple[float, float]:
    x = MARGIN + percent / 80 * (PANEL - 1.5 * MARGIN)
    y = HEIGHT - MARGIN - (min(decibels, high) - low) / (high - low) * (HEIGHT - 2 * MARGIN)
    return round(x, 1), round(y, 1)


def _scales(title: str, low: int, high: int) -> list[str]:
    parts = [f'<text x="{PANEL / 2}" y="{MARGIN - 26}" text-anchor="middle" font-weight="bold">{escape(title)}</text>']
    for percent in range(0, 81, TICK_PERCENT):
        x, y = _place(percent, low, low, high)
        parts.append(f'<text x="{x}" y="{y + 18}" text-anchor="middle">{percent} %</text>')
    for decibels in range(low, high + 1, TICK_DB):
        (x, y), (end, _) = _place(0, decibels, low, high), _place(80, decibels, low, high)
        parts.append(f'<line x1="{x}" x2="{end}" y1="{y}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="{x - 6}" y="{y + 4}" text-anchor="end">{decibels}</text>')
    middle, bottom = _place(40, low, low, high)
    parts.append(f'<text x="{middle}" y="{bottom + 36}" text-anchor="middle">block calls skipped; PSNR, dB</text>')
    return parts


def _lines(families: Sequence[str], rows: Rows, low: int, high: int) -> list[str]:
    parts = []
    for index, family in enumerate(families):
        colour = COLOURS[index % len(COLOURS)]
        own = sorted((row for row in rows if _family(row) == family), key=lambda row: float(row["skipped_percent"]))
        for measure, dash in MEASURES.items():
            places = [_place(row["skipped_percent"], row[measure], low, high) for row in own]
            joined = " ".join(f"{x},{y}" for x, y in places)
            parts.append(f'<polyline points="{joined}" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"')
            parts.append('fill="none"/>')
            fill = colour if dash == "none" else "white"
            for row, (x, y) in zip(own, places, strict=True):
                told = escape(f"{row['setting']}: {row['skipped_percent']} %, {row[measure]} dB")
                parts.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{fill}" stroke="{colour}"><title>{told}</title>')
                parts.append("</circle>")
    return parts
