"""Summaries of videos that were never made."""

from __future__ import annotations

from foresight.evaluation.summary import Numbers, Speed, Summary


def summary(*, worst: float | None = 45.0, skipped: float = 0.25, speedup: float = 1.5) -> Summary:
    """Of two videos; all of them as bad as the worst one."""
    return Summary(
        candidate="some",
        videos=2,
        identical=2 if worst is None else 0,
        share_skipped=skipped,
        share_steps_skipped=skipped,
        psnr_db=worst,
        metrics={"psnr": Numbers(worst, worst)},
        sets={},
        speed=Speed(speedup, speedup, speedup, 2, None, False),
        worst=(),
        foreseen_worst_psnr_db=worst,
    )
