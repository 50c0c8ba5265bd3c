"""What came of a tuning: the profiles that are written, and all of it as one document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from ..engines.manifest import HeldOut, PolicyProfile
from ..engines.wording import plural
from ..runtime.policies import Policy, policy_settings
from ..runtime.policies.notation import text_of
from .evaluate import settings_of
from .summary import Summary
from .tune import Tuned, Tuning


def profiles_of(job: Tuning, tuned: Sequence[Tuned]) -> list[PolicyProfile]:
    """The profiles of those goals that were kept."""
    common = settings_of(job.pipeline, job.request)
    found = []
    for one in tuned:
        if one.policy is None or one.held_out is None or not one.kept:
            continue
        settings = policy_settings(one.policy)
        found.append(
            PolicyProfile(
                name=one.name,
                steps=common["steps"],
                policy=settings.pop("name"),
                settings=settings,
                goal=one.goal.words,
                guidance=common["guidance"],
                held_out=measured(one.held_out),
            )
        )
    return found


def measured(summary: Summary) -> HeldOut:
    """The numbers of a part that are shown and written."""
    assert summary.speed is not None
    return HeldOut(
        pairs=summary.videos,
        worst_psnr_db=_two_digits(summary.worst_psnr_db),
        mean_psnr_db=_two_digits(summary.mean_psnr_db),
        psnr_db=_two_digits(summary.psnr_db),
        share_skipped=round(summary.share_skipped, 4),
        speedup=round(summary.speed.median, 2),
    )


def tuning_document(job: Tuning, tuned: Sequence[Tuned], tried: Mapping[Policy, Summary]) -> dict[str, Any]:
    """All of it as plain JSON values."""
    parts = job.parts
    return {
        "model": job.pipeline.manifest.model,
        **settings_of(job.pipeline, job.request),
        "policy": job.policy.name,
        "trials": job.trials,
        "pairs": {
            "tuning": len(parts.tuning),
            "selection": len(parts.selection),
            "held_out": len(parts.held_out),
            "reports_what_chose": parts.reports_what_chose,
        },
        "tried": [{"policy": text_of(policy), **_part(summary)} for policy, summary in tried.items()],
        "profiles": [_profile(one) for one in tuned],
        "notes": [*job.pipeline.manifest.cautions, *notes_on_tuning(job, tuned)],
    }


def notes_on_tuning(job: Tuning, tuned: Sequence[Tuned]) -> list[str]:
    """What the reader should know: what was not written, and why; what was held out."""
    notes = [note for one in tuned if (note := _why_not(one))]
    if job.parts.reports_what_chose:
        notes.append(
            f"held out: {plural(len(job.parts.held_out), 'pair')} chose among settings, so what is reported of them is "
            "flattering; give more prompts, and a third part is held out"
        )
    if any(one.held_out and one.held_out.speed and one.held_out.speed.noisy for one in tuned):
        notes.append("speed-up: the machine is noisy, so the times tell little; measure again when it is idle")
    return notes


def _why_not(one: Tuned) -> str | None:
    if one.kept:
        return None
    if one.held_out is not None:
        return (
            f"{one.name}: not written, as the goal was missed on the pairs held out; give more prompts, or a stricter "
            "goal"
        )
    if one.rejected:
        return (
            f"{one.name}: not written, as none of {plural(one.rejected, 'setting')} kept the goal on other pairs; give "
            "more prompts, more trials, or a weaker goal"
        )
    return f"{one.name}: not written, as no setting that was tried kept the goal; give more trials, or a weaker goal"


def _profile(one: Tuned) -> dict[str, Any]:
    parts = {"tuning": one.tuning, "selection": one.selection, "held_out": one.held_out}
    return {
        "name": one.name,
        "goal": one.goal.words,
        "policy": None if one.policy is None else policy_settings(one.policy),
        "rejected": one.rejected,
        "written": one.kept,
        **{name: None if part is None else _part(part) for name, part in parts.items()},
    }


def _part(summary: Summary) -> dict[str, Any]:
    numbers: dict[str, Any] = msgspec.to_builtins(measured(summary))
    return numbers


def _two_digits(value: float | None) -> float | None:
    return None if value is None else round(value, 2)
