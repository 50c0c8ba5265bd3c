"""An evaluation that is done: its summaries, and all of it as one document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..runtime.policies import policy_settings
from .evaluate import REFERENCE, Evaluation, Row, settings_of
from .metrics import PSNR, Metric
from .summary import Summary, summarise


@dataclass(frozen=True)
class Results:
    """What came of an evaluation.

    `settings` are those of `settings_of`; `policies` each candidate's name and settings; `reference` sums up what no
    policy took part in, and has the metrics that compare nothing. `rows` are all videos.
    """

    model: str
    settings: dict[str, Any]
    prompts: tuple[str, ...]
    seeds: int
    fps: int
    metrics: tuple[Metric, ...]
    policies: dict[str, dict[str, Any]]
    reference: Summary
    candidates: tuple[Summary, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    def rows_of(self, candidate: str) -> list[Row]:
        """Its videos."""
        return [row for row in self.rows if row.candidate == candidate]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; the rows in short."""
        return {
            "model": self.model,
            **self.settings,
            "prompts": list(self.prompts),
            "seeds": self.seeds,
            "metrics": {metric.name: metric.label for metric in self.metrics},
            "reference": _summary(self.reference),
            "policies": [
                {"settings": self.policies[summary.candidate], **_summary(summary)} for summary in self.candidates
            ],
            "rows": [_row(row) for row in self.rows],
            "notes": list(self.notes),
        }


def results_of(job: Evaluation, rows: Sequence[Row], notes: Sequence[str] = ()) -> Results:
    """Sum up all rows of a job; metrics of sets are computed here, from its videos."""
    metrics = tuple(loaded.metric for loaded in job.metrics)
    prompts = tuple(dict.fromkeys(pair.prompt for pair in job.pairs))
    of = {name: [row for row in rows if row.candidate == name] for name in job.names}
    summaries = tuple(summarise(of[candidate.name], metrics, job.of_sets(candidate)) for candidate in job.candidates)
    return Results(
        model=job.pipeline.manifest.model,
        settings=settings_of(job.pipeline, job.request),
        prompts=prompts,
        seeds=len(job.pairs) // len(prompts),
        fps=job.pipeline.manifest.defaults.fps,
        metrics=metrics,
        policies={candidate.name: policy_settings(candidate.policy) for candidate in job.candidates},
        reference=summarise(of[REFERENCE], metrics),
        candidates=summaries,
        rows=tuple(rows),
        notes=(*job.pipeline.manifest.cautions, *notes, *_notes(prompts, of[REFERENCE], summaries)),
    )


def _notes(prompts: Sequence[str], reference: Sequence[Row], summaries: Sequence[Summary]) -> list[str]:
    videos, notes = len(reference), []
    if len(prompts) == 1:
        made = "1 video of a single prompt tells" if videos == 1 else f"{videos} videos of a single prompt tell"
        notes.append(f"prompts: {made} little of others; give a file of them")
    cut = {row.prompt for row in reference if row.truncated}
    if cut:
        notes.append(f"prompts: {len(cut)} of {len(prompts)} were longer than the text encoder takes, and were cut")
    noisy = [summary.candidate for summary in summaries if summary.speed and summary.speed.noisy]
    if noisy:
        notes.append(
            f"speed-up: the machine is noisy, so the times of {', '.join(noisy)} tell little; measure again when it is "
            "idle"
        )
    return notes


def _summary(summary: Summary) -> dict[str, Any]:
    worst = [{"prompt": row.prompt, "seed": row.seed, "psnr_db": row.metrics.get(PSNR.name)} for row in summary.worst]
    return {**asdict(summary), "worst": worst}


def _row(row: Row) -> dict[str, Any]:
    shares = {"share_skipped": row.share_skipped, "share_steps_skipped": row.share_steps_skipped}
    return {**asdict(row), **shares, "speedup": row.speedup}
