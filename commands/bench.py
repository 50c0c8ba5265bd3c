"""`foresight bench`: the policies and other people's caches on the same requests."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from ..engines.registry import DEFAULT
from .completion import names
from .console import print_result, progress
from .options import OUTPUT_FOLDER, PATH, bundle_argument, common, group

RESULTS, PLOT = "bench.json", "bench.svg"


def _contenders(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Completes a peer or a policy; whoever completes nothing of the kind does without their modules."""
    from ..evaluation import lineup

    return names(lineup.names())(context, parameter, incomplete)


@dataclass(frozen=True)
class Asked:
    """What is asked of every contender; None is the bundle's default."""

    prompts: Path | None
    pairs: int
    steps: int | None
    guidance: float | None
    threads: int | None


@click.command()
@bundle_argument
@group(
    "asked",
    Asked,
    click.option("--prompts", type=PATH, help="A file with one prompt a line.  [default: the bundle's sample prompt]"),
    click.option("--pairs", type=int, default=8, show_default=True, help="Videos of each; every one has its own seed."),
    click.option("--steps", type=int, help="Denoising steps, 1 to 100.  [default: the bundle's]"),
    click.option("--guidance", type=float, help="1 switches it off.  [default: the bundle's]"),
    click.option("--threads", type=int, help="CPU threads, of all contenders.  [default: the cores, up to 16]"),
)
@click.option("--checkpoint", help="What the bundle was exported from, for the peers.  [default: where it is known]")
@click.option(
    "--only",
    multiple=True,
    metavar="NAME",
    shell_complete=_contenders,
    help="Only this peer or policy, such as pab; may be repeated.",
)
@click.option("--all", "optional", is_flag=True, help="Those too that take long: torch-compile.")
@click.option("--output", type=OUTPUT_FOLDER, help=f"A folder for {RESULTS} and {PLOT}.")
@common
def bench(
    bundle: Path | None,
    asked: Asked,
    checkpoint: str | None,
    only: tuple[str, ...],
    optional: bool,
    output: Path | None,
    as_json: bool,
) -> None:
    """Hold the policies against diffusers and the caches made for it, on CPUs, in turns: quality, speed, aborts."""
    from ..engines.bundle import newest_bundle
    from ..evaluation.bench import pairs_around
    from ..evaluation.lineup import BenchRequest, run_bench
    from ..exporter.registry import checkpoint_of
    from ..runtime.pipeline import load
    from .outputs import check_writable, read_prompts

    if output is not None:
        check_writable(output / RESULTS)
    with progress() as show:
        pipeline = load(
            bundle or newest_bundle(), backend=DEFAULT, device="cpu", threads=asked.threads, on_progress=show
        )
    manifest = pipeline.manifest
    prompts = [manifest.defaults.prompt] if asked.prompts is None else read_prompts(asked.prompts)
    request = BenchRequest(
        pairs=pairs_around(prompts, asked.pairs),
        checkpoint=checkpoint or checkpoint_of(manifest),
        revision=None if checkpoint else manifest.source.revision,
        steps=asked.steps,
        guidance=asked.guidance,
        only=only,
        optional=optional,
    )
    with progress() as show:
        document = run_bench(pipeline, request, show)
    written = [] if output is None else _write(document, output)
    print_result({**document, "written": [str(path) for path in written]}, as_json, _describe(document, written))


def _write(document: dict[str, Any], folder: Path) -> list[Path]:
    """The results on one line, and the plot. Raises OutputError."""
    from ..evaluation.plot import plot
    from ..runtime.whole import write_whole

    texts = {RESULTS: json.dumps(document, allow_nan=False), PLOT: plot(document["rows"])}
    return [
        write_whole(folder / name, lambda path, text=text: path.write_text(f"{text}\n", encoding="utf-8"))  # type: ignore[misc]
        for name, text in texts.items()
    ]


def _describe(document: dict[str, Any], written: list[Path]) -> list[str]:
    width = max(len(row["name"]) for row in document["rows"])
    head = f"{'':{width}}  {'':12} {'PSNR':>9} {'mean':>6} {'worst':>6} {'spared':>6}  {'CPU':>7}"
    asked = (
        f"{document['model']}: {len(document['pairs'])} pairs, {document['steps']} steps, guidance "
        f"{document['guidance']:g}, threads {document['threads']}"
    )
    lines = [asked, *map(_agreement, document["agreements"]), ""]
    lines.append(f"{head}  {'speed-up':>18} {'wall':>5}  after an abort")
    lines += [_line(row, width) for row in document["rows"]]
    told = {row["name"].partition(":")[0]: row["adapted"] for row in document["rows"] if row["adapted"]}
    lines += ["", *(f"{name} is adapted: {how}" for name, how in told.items())] if told else []
    lines += [f"{missing['name']} did not run: {missing['reason']}" for missing in document["unavailable"]]
    lines += [f"note: {note}" for note in document["notes"]]
    return [*lines, *map(str, written)]


def _line(row: dict[str, Any], width: int) -> str:
    cpu, abort = row["cpu_speedup"], row["after_abort"]
    speed = f"{cpu['median']:.2f}x ({cpu['low']:.2f}-{cpu['high']:.2f})"
    after = "" if abort is None else "same bytes" if abort["same"] else f"{abort['psnr_db']:.1f} dB"
    keys = (("psnr_db", 9), ("mean_psnr_db", 6), ("worst_psnr_db", 6))
    quality = " ".join(f"{_decibels(row[key]):>{size}}" for key, size in keys)
    if row["name"] == row["reference"]:
        quality = f"{'reference':>9} {'':6} {'':6}"
    elif row["psnr_db"] is None:
        quality = f"{'identical':>9} {'':6} {'':6}"
    saved = row["block_work_saved"]
    spared = "" if saved is None else f"{100 * saved:.1f}%"
    return (
        f"{row['name']:{width}}  {row['kind']:12} {quality} {spared:>6}  {row['cpu_ms'] / 1e3:5.2f} s  {speed:>18} "
        f"{row['wall_speedup']['median']:.2f}x  {after}"
    )


def _agreement(found: dict[str, Any]) -> str:
    worst = "" if found["worst_psnr_db"] is None else f", the worst at {found['worst_psnr_db']:.1f} dB"
    return f"without a cache {found['one']} and {found['other']} make {found['identical']} identical videos{worst}"


def _decibels(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
