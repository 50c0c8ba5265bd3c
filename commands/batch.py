"""`foresight batch`: a video of every line of a file, resumed where it was interrupted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..engines.errors import InvalidRequest, OutputError
from ..engines.progress import Progress
from .completion import bundle_folders
from .console import Row, current_session, print_lines, print_result, progress
from .loading import Engines, engine_options
from .options import OUTPUT_FOLDER, PATH, common, group

if TYPE_CHECKING:
    from ..serving.batch import BatchFolder, Outcome
    from ..serving.batch import Row as BatchRow
    from ..serving.batch_ray import RayWorkers
    from ..serving.settings import WorkerSettings


@dataclass(frozen=True)
class Cluster:
    """Who makes the videos: this process, or workers of Ray."""

    ray: str | None
    workers: int | None
    worker_gpus: float | None

    def check(self) -> None:
        """Raises InvalidRequest."""
        for name in ("workers", "worker_gpus"):
            if self.ray is None and getattr(self, name) is not None:
                raise InvalidRequest(f"{name}: got one without --ray, expected both: this process makes all videos")

    def on_ray(self) -> RayWorkers:
        """What Ray is asked for."""
        from ..serving.batch_ray import RayWorkers

        return RayWorkers(self.ray or "local", self.workers or 1, self.worker_gpus or 0.0)


@click.command()
@click.argument("prompts", type=PATH, metavar="PROMPTS.jsonl")
@click.option("--bundle", type=PATH, shell_complete=bundle_folders, help="[default: the newest under bundles/]")
@click.option(
    "--output", type=OUTPUT_FOLDER, required=True, help="A folder for the videos; with --ray, one that all share."
)
@click.option(
    "--format", "kind", type=click.Choice(["mp4", "gif", "npy"]), default="mp4", show_default=True, help="Of the files."
)
@group(
    "cluster",
    Cluster,
    click.option(
        "--ray", metavar="ADDRESS", help="Let Ray make them: local, auto or HOST:PORT.  [default: this process]"
    ),
    click.option("--workers", type=click.IntRange(1), help="With --ray: processes that make videos.  [default: 1]"),
    click.option("--worker-gpus", type=click.FloatRange(0), help="With --ray: GPUs of each of them.  [default: 0]"),
)
@engine_options
@common
def batch(
    prompts: Path, bundle: Path | None, output: Path, kind: str, cluster: Cluster, engines: Engines, as_json: bool
) -> None:
    """Make a video of every line of a file of JSON: {"prompt": "a dog", "seed": 1}. What is there is not made again."""
    from ..engines.bundle import newest_bundle
    from ..serving.batch import BatchFolder, rows_of
    from ..serving.spec import open_models
    from .outputs import check_writable, read_lines

    cluster.check()
    path = (bundle or newest_bundle()).absolute()
    settings = engines.worker({path.resolve().name: path})
    (model,) = open_models(settings).values()
    rows = rows_of(read_lines(prompts, "row"), model, settings.cache_memory)
    folder = BatchFolder(output.absolute(), kind)
    check_writable(folder.file(rows[0]))
    finished = current_session().finished
    with folder.opened():
        missing = folder.missing(rows)
        there = set(rows).difference(missing)
        finished += [_row(folder.outcome(row, "there")) for row in there]
        if cluster.ray is None:
            outcomes = _made_here(folder, missing, engines, path)
        else:
            outcomes = _made_by_ray(folder, missing, settings, cluster)
        for outcome in outcomes:
            finished.append(_row(outcome))
            if not as_json:
                print_lines(_describe(finished[-1]))
    counts = Counter(row["status"] for row in finished)
    cautions = list(model.cautions)
    document: Row = {"bundle": str(path), "output": str(folder.path), "notes": cautions}
    document |= {status: counts[status] for status in ("made", "there", "failed")}
    summary = "{made} made, {there} were there, {failed} failed; {output}".format(**document)
    lines = [f"note: {caution}" for caution in cautions]
    print_result({**document, "rows": sorted(finished, key=lambda row: int(row["line"]))}, as_json, [summary, *lines])
    if failed := counts["failed"]:
        click.echo(f"error: batch: {failed} of {len(rows)} rows failed; the same command tries them again", err=True)
        raise click.exceptions.Exit(1)


def _made_here(folder: BatchFolder, missing: Sequence[BatchRow], engines: Engines, bundle: Path) -> Iterator[Outcome]:
    if not missing:
        return
    pipeline, interrupts = engines.load(bundle), current_session().interrupts
    for place, row in enumerate(missing, 1):
        with progress(f"{place} of {len(missing)}: ") as show:
            outcome = folder.make(pipeline, row, show, interrupts)
        yield outcome


def _made_by_ray(
    folder: BatchFolder, missing: Sequence[BatchRow], settings: WorkerSettings, cluster: Cluster
) -> Iterator[Outcome]:
    if not missing:
        return
    try:
        from ..serving.batch_ray import make_rows
    except ModuleNotFoundError as error:
        raise OutputError(f'ray: {error.name} is not installed; pip install "foresight-engines[ray]"') from error
    with progress() as show:
        for done, outcome in enumerate(make_rows(folder, missing, settings, cluster.on_ray()), 1):
            show(Progress("making", done, len(missing), "videos", outcome.row.stem))
            yield outcome


def _row(outcome: Outcome) -> Row:
    row, failure = outcome.row, outcome.failure
    return {
        "line": row.line,
        "name": row.name,
        "seed": row.spec.seed,
        "file": outcome.file,
        "status": outcome.status,
        "error": None if failure is None else {"code": failure.code, "message": failure.message},
        "notes": list(outcome.notes),
    }


def _describe(row: Row) -> list[str]:
    error = row["error"]
    if error is not None:
        return [f"line {row['line']} failed: {error['code']}: {error['message']}"]
    return [row["file"], *(f"note: line {row['line']}: {note}" for note in row["notes"])]
