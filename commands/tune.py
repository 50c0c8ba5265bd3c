"""`foresight tune`: settings of policies that keep a goal, measured on other videos, into the bundle as profiles."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..engines.errors import InvalidRequest
from ..engines.wording import plural
from ..runtime.policies import POLICIES, FixedSchedule, Forecast
from .asked import Asked, asked_options
from .completion import names
from .console import Row, current_session, print_result, progress
from .loading import Engines, engine_options
from .options import OUTPUT_FOLDER, bundle_argument, common, group
from .rows import decibels

if TYPE_CHECKING:
    from ..evaluation.goals import Goal

TUNINGS = Path("tunings")
SIGN_AGAIN = "bundle: was signed, and is another one with its profiles; sign it again with: foresight sign"
DOCUMENT = "tuning.json"


@dataclass(frozen=True)
class Wanted:
    """One goal, or none: then there are a few with names."""

    psnr: float | None
    speedup: float | None
    name: str | None

    def goals(self) -> Mapping[str, Goal]:
        """By the names of their profiles. Raises InvalidRequest."""
        from ..engines.manifest import PLAIN_NAME
        from ..evaluation.goals import Quality, Speedup
        from ..evaluation.tune import GOALS

        given: list[Goal] = [] if self.psnr is None else [Quality(self.psnr)]
        given += [] if self.speedup is None else [Speedup(self.speedup)]
        if len(given) > 1:
            raise InvalidRequest("psnr: got --psnr and --speedup, expected one of them")
        if not given:
            if self.name is not None:
                raise InvalidRequest(f"name: got {self.name!r} without a goal, expected --psnr or --speedup too")
            return GOALS
        (goal,) = given
        name = goal.slug if self.name is None else self.name
        if not PLAIN_NAME.fullmatch(name):
            raise InvalidRequest(f"name: got {name!r}, expected letters, digits, dots, hyphens and underscores")
        return {name: goal}


@click.command()
@bundle_argument
@click.option(
    "--policy",
    "policy_texts",
    multiple=True,
    default=(Forecast.name, FixedSchedule.name),
    show_default=True,
    shell_complete=names(POLICIES),
    help="May be given more than once; such as foresight:cache=residual. The best one of them is taken for each goal.",
)
@group(
    "wanted",
    Wanted,
    click.option("--psnr", type=float, help="Goal: the worst video has this PSNR, dB; skip the most."),
    click.option("--speedup", type=float, help="Goal: this many times as fast; the worst video is the best."),
    click.option("--name", help="Of the profile.  [default: the goal; without one quality, balanced and fast]"),
)
@asked_options
@click.option("--trials", type=int, default=10, show_default=True, help="Settings of each policy to try for each goal.")
@click.option(
    "--output",
    type=OUTPUT_FOLDER,
    help="A folder to go on from later.  [default: tunings/, the bundle's name and the steps]",
)
@engine_options
@common
def tune(
    bundle: Path | None,
    policy_texts: tuple[str, ...],
    wanted: Wanted,
    asked: Asked,
    trials: int,
    output: Path | None,
    engines: Engines,
    as_json: bool,
) -> None:
    """Find settings that keep a goal, and write them into the bundle as profiles; goes on where it was interrupted."""
    from ..engines.bundle import is_signed
    from ..engines.profiles import write_profiles
    from ..evaluation.evaluate import pairs_of, settings_of
    from ..evaluation.folder import opened
    from ..evaluation.held_out import parts_of
    from ..evaluation.search import check_optuna, check_tunable
    from ..evaluation.tune import InMemory, Tuning
    from ..evaluation.tuned import profiles_of, tuning_document
    from ..runtime.policies.notation import policy_from_text
    from ..runtime.request import VideoRequest
    from .outputs import read_prompts

    check_optuna()
    policies, goals = [check_tunable(policy_from_text(text)) for text in policy_texts], wanted.goals()
    prompts = read_prompts(asked.prompts) if asked.prompts else []
    parts_of(pairs_of(prompts or ["the bundle's"], asked.seeds))
    pipeline = engines.load(bundle)
    prompts = prompts or [pipeline.manifest.defaults.prompt]
    request = VideoRequest(prompts[0], asked.negative_prompt, asked.steps, asked.guidance)
    parts = parts_of(pairs_of(prompts, asked.seeds))
    job = Tuning(pipeline, request, policies, goals, parts, trials, InMemory())
    job.check()
    shared = settings_of(pipeline, request)
    place = output or TUNINGS / f"{pipeline.bundle.path.resolve().name}-{shared['steps']}"
    with opened(place, shared) as folder:
        job = replace(job, kept=folder)
        folder.check_space(*job.kept_videos)
        with progress() as show:
            tuned, tried = job.run(show, current_session().interrupts)
        profiles = profiles_of(job, tuned)
        document = {"bundle": str(pipeline.bundle.path), **tuning_document(job, tuned, tried)}
        document["notes"] += [SIGN_AGAIN] if profiles and is_signed(pipeline.bundle) else []
        folder.write(DOCUMENT, json.dumps(document, indent=1, allow_nan=False))
    if profiles:
        write_profiles(pipeline.bundle, profiles)
    print_result(document, as_json, _describe(document))
    if not profiles:
        raise click.exceptions.Exit(1)


def _describe(document: Row) -> list[str]:
    pairs = document["pairs"]
    policies = " and ".join(document["policies"])
    lines = [f"{len(document['tried'])} settings of {policies} tried, {document['steps']} steps"]
    for profile in document["profiles"]:
        lines.append(f"{profile['name']}: {profile['goal']}: {_chosen(profile)}")
        parts = ("tuning", "held_out") if pairs["reports_what_chose"] else ("tuning", "selection", "held_out")
        lines += [f"  {part.replace('_', ' ') + ',':10} {_part(profile[part])}" for part in parts if profile[part]]
    return [*lines, *(f"note: {note}" for note in document["notes"])]


def _chosen(profile: Row) -> str:
    if profile["policy"] is None:
        return "none found"
    settings = ", ".join(f"{name} {value}" for name, value in profile["policy"].items() if name != "name")
    foreseen = profile["foreseen_worst_psnr_db"]
    told = "" if foreseen is None else f"; of other videos the worst is expected at {decibels(foreseen)} or more"
    return f"{profile['policy']['name']}, {settings}{'' if profile['written'] else ' (not written)'}{told}"


def _part(part: Row) -> str:
    return (
        f"{plural(part['pairs'], 'pair')}: {100 * part['share_skipped']:.1f} % skipped, PSNR "
        f"{decibels(part['worst_psnr_db'])} at worst, {decibels(part['psnr_db'])} pooled, {part['speedup']:.2f}x"
    )
