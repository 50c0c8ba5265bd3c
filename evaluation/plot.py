"""A benchmark as a picture: speed-up against PSNR, a line a contender through its settings, as SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

WIDTH, HEIGHT, MARGIN, LEGEND = 860, 440, 52, 190
COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#7f4f24",
    "#5a189a",
    "#000000",
    "#6b8e23",
    "#8b0000",
)
DASHES = {"this project": "none", "as shipped": "6 3", "adapted": "2 3"}
FASTER, DECIBELS = 0.25, 5  # from one tick to the next


@dataclass(frozen=True)
class _Axes:
    right: float  # the fastest speed-up; the least is 1, or what is slower than that
    left: float
    low: float
    high: float

    def place(self, speedup: float, decibels: float) -> tuple[float, float]:
        inner = WIDTH - 2 * MARGIN - LEGEND
        x = MARGIN + (speedup - self.left) / (self.right - self.left) * inner
        y = HEIGHT - MARGIN - (decibels - self.low) / (self.high - self.low) * (HEIGHT - 2 * MARGIN)
        return round(x, 1), round(y, 1)


def plot(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of a benchmark's document, as an SVG file's text; those whose videos are all identical have no place."""
    points = [row for row in rows if row["psnr_db"] is not None]
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in points:
        groups.setdefault(row["name"].partition(":")[0], []).append(row)
    axes = _axes(points)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"',
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        *_scales(axes),
    ]
    for index, (name, group) in enumerate(groups.items()):
        parts += _line(index, name, group, axes)
    return "\n".join([*parts, "</svg>"])


def _axes(points: Sequence[Mapping[str, Any]]) -> _Axes:
    speeds = [row["cpu_speedup"]["median"] for row in points] or [1.0]
    decibels = [row["psnr_db"] for row in points] or [0.0]
    left = FASTER * math.floor(min(1.0, *speeds) / FASTER)
    low = DECIBELS * math.floor(min(decibels) / DECIBELS)
    return _Axes(
        right=FASTER * max(math.ceil(max(speeds) / FASTER), round(left / FASTER) + 1),
        left=left,
        low=low,
        high=max(DECIBELS * math.ceil(max(decibels) / DECIBELS), low + DECIBELS),
    )


def _scales(axes: _Axes) -> list[str]:
    parts = []
    for tick in range(round((axes.right - axes.left) / FASTER) + 1):
        speed = axes.left + tick * FASTER
        x, y = axes.place(speed, axes.low)
        parts.append(f'<text x="{x}" y="{y + 18}" text-anchor="middle">{speed:.2f}x</text>')
    for tick in range(round((axes.high - axes.low) / DECIBELS) + 1):
        decibels = axes.low + tick * DECIBELS
        x, y = axes.place(axes.left, decibels)
        end, _ = axes.place(axes.right, decibels)
        parts.append(f'<line x1="{x}" x2="{end}" y1="{y}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="{x - 8}" y="{y + 4}" text-anchor="end">{decibels:g}</text>')
    middle, bottom = axes.place((axes.left + axes.right) / 2, axes.low)
    parts.append(
        f'<text x="{middle}" y="{bottom + 38}" text-anchor="middle">speed-up, processor time of the loop</text>'
    )
    parts.append(f'<text x="14" y="{MARGIN - 20}">PSNR of all videos against the own uncached run, dB</text>')
    return parts


def _line(index: int, name: str, group: Sequence[Mapping[str, Any]], axes: _Axes) -> list[str]:
    """One contender's settings, and its entry in the legend."""
    colour, kind = COLOURS[index % len(COLOURS)], group[0]["kind"]
    style = f'stroke="{colour}" stroke-dasharray="{DASHES[kind]}" stroke-width="2" fill="none"'
    ordered = sorted(group, key=lambda row: float(row["cpu_speedup"]["median"]))
    places = [axes.place(row["cpu_speedup"]["median"], row["psnr_db"]) for row in ordered]
    parts = [f'<polyline points="{" ".join(f"{x},{y}" for x, y in places)}" {style}/>']
    fill = "white" if kind == "adapted" else colour
    for row, (x, y) in zip(ordered, places, strict=True):
        told = f"{row['name']}: {row['cpu_speedup']['median']:.2f}x, {row['psnr_db']:.1f} dB"
        mark = f'<circle cx="{x}" cy="{y}" r="4" fill="{fill}" stroke="{colour}" stroke-width="2">'
        parts.append(f"{mark}<title>{escape(told)}</title></circle>")
    y, left = MARGIN + 18 * index, WIDTH - LEGEND - MARGIN + 24
    parts.append(f'<line x1="{left}" x2="{left + 36}" y1="{y}" y2="{y}" {style}/>')
    told = name if kind != "adapted" else f"{name} (adapted)"
    parts.append(f'<text x="{left + 44}" y="{y + 4}">{escape(told)}</text>')
    return parts
