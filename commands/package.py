"""`foresight package`: bundles in the form that another server's host reads."""

from __future__ import annotations

from pathlib import Path

import click

from .console import print_result, progress
from .loading import Engines, engine_options
from .options import OUTPUT_FOLDER, PATH, common


@click.command()
@click.argument("bundles", nargs=-1, metavar="[BUNDLE | NAME=BUNDLE]...")
@click.option(
    "--triton", type=OUTPUT_FOLDER, required=True, metavar="DIR", help="The model repository to write; a new folder."
)
@click.option("--signed-by", type=PATH, multiple=True, help="Public key, PEM, here and on the host; may be repeated.")
@click.option("--waiting", type=click.IntRange(1), default=16, show_default=True, help="Most requests that wait.")
@click.option("--max-steps", type=click.IntRange(1), default=100, show_default=True, help="Of a request.")
@engine_options
@common
def package(
    bundles: tuple[str, ...],
    triton: Path,
    signed_by: tuple[Path, ...],
    waiting: int,
    max_steps: int,
    engines: Engines,
    as_json: bool,
) -> None:
    """Write a model repository for Triton Inference Server, with copies of bundles, whole or not at all."""
    from ..engines.bundle import newest_bundle
    from ..serving.spec import named_bundles
    from ..serving.triton_repository import Triton, write_repository

    worker = engines.worker(named_bundles(bundles or (str(newest_bundle()),)), signed_by)
    with progress() as show:
        models = write_repository(triton.absolute(), Triton(worker, waiting, max_steps, signed_by), show)
    rows = [
        {"name": model.name, "path": str(model.path), "bundle": model.bundle, "instances": model.kind}
        for model in models
    ]
    lines = [f"{model.path}: {model.kind}, one instance{' a GPU' * (model.kind == 'KIND_GPU')}" for model in models]
    print_result({"repository": str(triton), "models": rows}, as_json, lines)
