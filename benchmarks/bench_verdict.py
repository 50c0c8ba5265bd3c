"""Which of the peers' points in a benchmark lie above this package's, in a few lines: computed from its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

GOAL_DB = 35.0  # mean PSNR of points that have to be beaten
NO_CACHES = ("diffusers", "torch-compile")
FIGURES = ("mean_psnr_db", "worst_psnr_db")


def bench_verdict(*results: Mapping[str, Any]) -> str:
    """Which points of peers lie above this package's, at the same speed-up and at the same work."""
    told = []
    for result in results:
        own = [row for row in result["rows"] if row["kind"] == "this project" and row["psnr_db"] is not None]
        peers = [row for row in result["rows"] if _counts(row)]
        found = [line for row in peers for line in _above(row, own)]
        told.append(f"{result['model']}: {len(peers)} points of peers have {GOAL_DB:g} dB or more; above ours:")
        told += [f"- {line}" for line in found] or ["- none"]
        told.append("")
    return "\n".join(told).rstrip()


def _counts(row: Mapping[str, Any]) -> bool:
    is_peer = row["kind"] != "this project" and row["name"] not in NO_CACHES
    return is_peer and row["psnr_db"] is not None and row["mean_psnr_db"] >= GOAL_DB


def _above(peer: Mapping[str, Any], own: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for measure, saved in (("speed-up", _speed), ("block work", _work)):
        if (of_peer := saved(peer)) is None:
            continue
        as_fast = [row for row in own if (saved(row) or 0) >= of_peer]
        for name in FIGURES:
            best = max((row[name] for row in as_fast), default=None)
            if best is None or peer[name] > best:
                against = "we have none as fast" if best is None else f"ours {best:.1f} dB"
                figure = name.partition("_")[0]
                lines.append(f"`{peer['name']}` in {figure} at equal {measure}: {peer[name]:.1f} dB, {against}")
    return lines


def _speed(row: Mapping[str, Any]) -> float | None:
    return float(row["cpu_speedup"]["median"])


def _work(row: Mapping[str, Any]) -> float | None:
    saved = row.get("block_work_saved")
    return None if saved is None else float(saved)
