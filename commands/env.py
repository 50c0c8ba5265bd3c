"""`foresight env`: this machine, and what it can run."""

from __future__ import annotations

import click

from .console import print_result
from .options import common


@click.command()
@common
def env(as_json: bool) -> None:
    """Show this machine, the libraries that are installed, and what can be run."""
    from ..engines.environment import describe_environment

    found = describe_environment()
    lines = [
        f"{name:22} {value if not isinstance(value, list) else ', '.join(value)}"
        for name, value in (*found["machine"].items(), *found["libraries"].items(), *found["can"].items())
    ]
    print_result(found, as_json, lines)
