"""`foresight evaluate`: what policies skip, and what that costs, over many prompts and seeds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..runtime.policies import POLICIES
from .asked import Asked, asked_options
from .completion import names
from .console import current_session, print_result, progress
from .loading import Engines, engine_options
from .options import OUTPUT_FOLDER, bundle_argument, common

if TYPE_CHECKING:
    from ..evaluation.metrics import Metric
    from ..evaluation.results import Results
    from ..evaluation.summary import Summary

EVALUATIONS = Path("evaluations")
DOCUMENT, PAGE = "evaluation.json", "evaluation.html"


@click.command()
@bundle_argument
@click.option(
    "--policy",
    "policies",
    multiple=True,
    shell_complete=names(POLICIES),
    help="Such as foresight:gamma=1,cache=residual; may be repeated.  [default: a few settings of every policy]",
)
@asked_options
@click.option(
    "--metrics",
    default="psnr,ssim",
    show_default=True,
    help="psnr, ssim, lpips, clip and fvd, with commas between them.",
)
@click.option(
    "--output", type=OUTPUT_FOLDER, help="A folder for all that is made.  [default: evaluations/ and the bundle's name]"
)
@engine_options
@common
def evaluate(
    bundle: Path | None,
    policies: tuple[str, ...],
    asked: Asked,
    metrics: str,
    output: Path | None,
    engines: Engines,
    as_json: bool,
) -> None:
    """Hold policies against no reuse, over prompts and seeds; goes on where it was interrupted."""
    from ..evaluation.evaluate import Evaluation, candidates_of, ladder, pairs_of, settings_of
    from ..evaluation.folder import opened
    from ..evaluation.metrics import find_metrics, load_metrics
    from ..evaluation.report.evaluation import write_evaluation
    from ..evaluation.report.templates import check_libraries
    from ..evaluation.results import results_of
    from ..runtime.policies.notation import policy_from_text
    from ..runtime.request import VideoRequest
    from .outputs import read_prompts

    check_libraries()
    found = load_metrics(find_metrics(name.strip() for name in metrics.split(",") if name.strip()))
    typed = [policy_from_text(text) for text in policies]
    prompts = read_prompts(asked.prompts) if asked.prompts else []
    pipeline = engines.load(bundle)
    prompts = prompts or [pipeline.manifest.defaults.prompt]
    request = VideoRequest(prompts[0], asked.negative_prompt, asked.steps, asked.guidance)
    tried, notes = (typed, []) if typed else ladder(pipeline, request)
    candidates, pairs = candidates_of(tried), pairs_of(prompts, asked.seeds)
    place = output or EVALUATIONS / pipeline.bundle.path.resolve().name
    job = Evaluation(pipeline, request, candidates, pairs, found, videos={})
    job.check()
    with opened(place, settings_of(pipeline, request)) as folder:
        job = replace(job, videos=folder.videos)
        with progress() as show:
            rows = folder.run(job, show, current_session().interrupts)
        results = results_of(job, rows, notes)
        document = {"bundle": str(pipeline.bundle.path), **results.to_dict()}
        files = [folder.write(DOCUMENT, json.dumps(document, indent=1, allow_nan=False))]
        files.append(write_evaluation(results, job.videos, place / PAGE))
    document["files"] = [str(path) for path in files]
    print_result(document, as_json, _describe(results, files))


def _describe(results: Results, files: list[Path]) -> list[str]:
    others = results.metrics[1:]  # the first one is PSNR
    alone = _values(results.reference, others)
    names = [summary.candidate for summary in results.candidates] + (["without reuse"] if alone.strip() else [])
    width = max(map(len, names))
    head = f"{'policy':{width}}  {'calls':>6}  {'steps':>6}  {'PSNR':>6} {'mean':>6} {'worst':>6}"
    lines = [f"{head}{''.join(f'  {metric.name:>7}' for metric in others)}  speed-up"]
    for summary in results.candidates:
        psnr = " ".join(map(_decibels, (summary.psnr_db, summary.mean_psnr_db, summary.worst_psnr_db)))
        lines.append(
            f"{summary.candidate:{width}}  {_percent(summary.share_skipped)}  "
            f"{_percent(summary.share_steps_skipped)}  {psnr}{_values(summary, others)}  {_speed(summary)}"
        )
    if alone.strip():
        lines.append(f"{'without reuse':{width}}  {_percent(0)}  {_percent(0)}  {'':20}{alone}")
    for summary in results.candidates:
        lines += [
            f"worst of {summary.candidate}: {summary.worst_psnr_db:.1f} dB, {row.prompt!r}, seed {row.seed}"
            for row in summary.worst[:1]
        ]
    return [*lines, *(str(path) for path in files), *(f"note: {note}" for note in results.notes)]


def _values(summary: Summary, metrics: Sequence[Metric]) -> str:
    values = [(metric, summary.value(metric)) for metric in metrics]
    return "".join(f"  {'' if value is None else metric.shown(value):>7}" for metric, value in values)


def _percent(share: float) -> str:
    return f"{100 * share:4.1f} %"


def _decibels(value: float | None) -> str:
    return f"{'same' if value is None else f'{value:.1f}':>6}"


def _speed(summary: Summary) -> str:
    speed = summary.speed
    if speed is None:
        return ""
    pairs = "one pair" if speed.pairs == 1 else f"{speed.low:.2f} to {speed.high:.2f} in {speed.pairs} pairs"
    return f"{speed.median:.2f}x ({pairs}){', noisy' if speed.noisy else ''}"
