"""`foresight build`: a bundle's engines, compiled for this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..engines.registry import COMPILERS, check_compiler
from ..engines.wording import MEBI
from .completion import names
from .console import parts, print_result, progress
from .options import bundle_argument, common
from .rows import compiled_row, describe_compiled

if TYPE_CHECKING:
    from ..engines.bundle import Bundle
    from ..engines.compiled import Compiled
    from ..engines.tensorrt.compiler import BuildSettings


@click.command()
@bundle_argument
@click.option(
    "--backend",
    required=True,
    shell_complete=names(COMPILERS),
    help="tensorrt, or tensorrt-rtx, which needs no GPU for this.",
)
@click.option("--device", default="cuda", show_default=True, help="tensorrt compiles for this GPU.")
@click.option("--level", type=int, default=3, show_default=True, help="Optimisation level, 0 to 5.")
@click.option("--workspace", type=int, help="Most scratch memory a part may need, MiB.  [default: all there is]")
@click.option("--split-guidance", is_flag=True, help="For one half of a guided batch at a time: half the scratch.")
@click.option("--jobs", type=int, default=1, show_default=True, help="Engines built side by side.")
@common
def build(
    bundle: Path | None,
    backend: str,
    device: str,
    level: int,
    workspace: int | None,
    split_guidance: bool,
    jobs: int,
    as_json: bool,
) -> None:
    """Compile a bundle's engines for this machine; goes on where it was interrupted."""
    from ..engines.bundle import newest_bundle, open_bundle
    from ..engines.tensorrt.compiler import BuildSettings

    check_compiler(backend)
    workspace_bytes = None if workspace is None else workspace * MEBI
    settings = BuildSettings(level, workspace_bytes, split_guidance)
    compiled = compile_engines(open_bundle(bundle or newest_bundle()), backend, device, settings, jobs)
    print_result(compiled_row(compiled), as_json, describe_compiled(compiled))


def check_target(backend: str) -> None:
    """Before anything is written: can this machine build for that backend at all? Raises EngineError."""
    from ..engines.tensorrt.library import find_target

    find_target(backend)


def compile_engines(
    bundle: Bundle, backend: str, device: str = "cuda", settings: BuildSettings | None = None, jobs: int = 1
) -> Compiled:
    """Compile a bundle's engines, and show how far that is."""
    from ..engines.build import build_engines

    with progress() as show:
        return build_engines(bundle, backend, device, settings, jobs, parts(show, "building"))
