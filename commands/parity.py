"""`foresight parity`: whether a backend computes what another does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..engines.registry import DEFAULT, REGISTRY
from .completion import names
from .console import parts, print_result, progress
from .options import bundle_argument, common, group

if TYPE_CHECKING:
    from ..evaluation.parity import Difference


@dataclass(frozen=True)
class Sides:
    """The backend to be checked, and the one to be trusted."""

    backend: str
    device: str | None
    against: str
    against_device: str | None


@click.command()
@bundle_argument
@group(
    "sides",
    Sides,
    click.option(
        "--backend",
        default=DEFAULT,
        show_default=True,
        shell_complete=names(REGISTRY),
        help="The backend to be checked.",
    ),
    click.option("--device", help="[default: the backend's own]"),
    click.option(
        "--against",
        default="reference",
        show_default=True,
        shell_complete=names(REGISTRY),
        help="The backend to be trusted.",
    ),
    click.option("--against-device", help="[default: that backend's own]"),
)
@click.option("--part", "wanted", multiple=True, help="Only this part, such as block.003; may be repeated.")
@click.option("--steps", type=int, default=3, show_default=True, help="Steps to run; the last one's inputs are used.")
@click.option("--tolerance", type=float, help="Of the largest value.  [default: by the bundle's dtype]")
@common
def parity(
    bundle: Path | None, sides: Sides, wanted: tuple[str, ...], steps: int, tolerance: float | None, as_json: bool
) -> None:
    """Run every part on two backends over the same inputs, those of a real request; the worst comes first."""
    from ..engines.backend import create_backend
    from ..engines.bundle import newest_bundle, open_bundle, verify_files
    from ..evaluation.parity import compare_backends

    opened = open_bundle(bundle or newest_bundle())
    with progress() as show:
        verify_files(opened, show)
    first = create_backend(sides.backend, sides.device)
    second = create_backend(sides.against, sides.against_device)
    with progress() as show:
        differences = compare_backends(
            opened, first, second, steps=steps, tolerance=tolerance, parts=wanted or None,
            progress=parts(show, "comparing"),
        )  # fmt: skip
    beyond = [difference.part for difference in differences if not difference.within]
    row = {
        "bundle": str(opened.path),
        "backend": first.describe(),
        "against": second.describe(),
        "differences": [_row(difference) for difference in differences],
        "beyond_tolerance": beyond,
    }
    print_result(row, as_json, _describe(differences))
    if beyond:
        parted = f"{', '.join(beyond)} on {sides.backend} differ from {sides.against} by more than the tolerance"
        click.echo(f"error: parity: {parted}", err=True)
        raise click.exceptions.Exit(1)


def _row(difference: Difference) -> dict[str, object]:
    return {name: None if value == math.inf else value for name, value in asdict(difference).items()}


def _describe(differences: Sequence[Difference]) -> list[str]:
    lines = [f"{'part':14} {'kind':16} {'output':14} {'largest':>9} {'of scale':>9} {'tolerance':>9}"]
    lines += [
        f"{row.part:14} {row.kind:16} {row.output:14} {row.max_abs:9.2g} {row.relative:9.2g} {row.tolerance:9.2g}"
        f"{'' if row.within else '  beyond'}"
        for row in differences
    ]
    return lines
