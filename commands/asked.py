"""The options that say of what videos are made, for the commands that make many."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from .options import PATH, Command, group


@dataclass(frozen=True)
class Asked:
    """What is made with every policy; None is the bundle's default."""

    prompts: Path | None
    seeds: int
    negative_prompt: str | None
    steps: int | None
    guidance: float | None


def asked_options(command: Command) -> Command:
    """The options of `Asked`; the command is given `asked`."""
    return group(
        "asked",
        Asked,
        click.option(
            "--prompts", type=PATH, help="A file with one prompt a line.  [default: the bundle's sample prompt]"
        ),
        click.option("--seeds", type=int, default=1, show_default=True, help="Videos of each prompt."),
        click.option("--negative-prompt", help="[default: the bundle's]"),
        click.option("--steps", type=int, help="Denoising steps, 1 to 100.  [default: the bundle's]"),
        click.option("--guidance", type=float, help="1 switches it off.  [default: the bundle's]"),
    )(command)
