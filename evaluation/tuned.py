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
from .tune import Candidate, Tuned, Tuning


def profiles_of(job: Tuning, tuned: Sequence[Tuned]) -> list[PolicyProfile]:
    """The profiles of those goals that were kept, or missed by little; see `Tuned.written`."""
    common = settings_of(job.pipeline, job.request)
    found = []
    for one in tuned:
        if one.policy is None or one.held_out is None or not one.written:
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
                later_guidances=tuple(common.get("later_guidances", ())),
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
        "policies": [text_of(policy) for policy in job.policies],
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
    notes = [note for one in tuned if (note := _note(one))]
    if job.parts.reports_what_chose:
        notes.append(
            f"held out: {plural(len(job.parts.held_out), 'pair')} chose among settings, so what is reported of them is "
            "flattering; give more prompts, and a third part is held out"
        )
    if any(one.held_out and one.held_out.speed and one.held_out.speed.noisy for one in tuned):
        notes.append("speed-up: the machine is noisy, so the times tell little; measure again when it is idle")
    return notes


def _note(one: Tuned) -> str | None:
    if one.missed is not None:
        return (
            f"{one.name}: the setting that was chosen first missed the goal on the pairs held out; that of another "
            "goal, which keeps this one too, takes its place"
        )
    if one.kept:
        return None
    if one.written:
        return (
            f"{one.name}: written, though the goal was missed on the pairs held out, by little; see what it did there"
        )
    if one.held_out is not None:
        return (
            f"{one.name}: not written, as the goal was missed on the pairs held out; give more prompts, or a stricter "
            "goal"
        )
    if rejected := sum(candidate.rejected for candidate in one.candidates):
        return (
            f"{one.name}: not written, as none of {plural(rejected, 'setting')} kept the goal with other pairs; give "
            "more prompts, more trials, or a weaker goal"
        )
    return f"{one.name}: not written, as no setting that was tried kept the goal; give more trials, or a weaker goal"


def _profile(one: Tuned) -> dict[str, Any]:
    parts = {"tuning": one.best.tuning, "selection": one.best.selection, "held_out": one.held_out}
    return {
        "name": one.name,
        "goal": one.goal.words,
        "policy": None if one.policy is None else policy_settings(one.policy),
        "kept": one.kept,
        "written": one.written,
        "foreseen_worst_psnr_db": _foreseen(one.best),
        **{name: None if part is None else _part(part) for name, part in parts.items()},
        "missed": None if one.missed is None else _missed(one.missed),
        "candidates": [_candidate(candidate) for candidate in one.candidates],
    }


def _missed(one: Tuned) -> dict[str, Any]:
    """A setting that was chosen first, and missed the goal on the pairs held out."""
    assert one.policy is not None and one.held_out is not None
    return {"policy": text_of(one.policy), "held_out": _part(one.held_out)}


def _candidate(one: Candidate) -> dict[str, Any]:
    return {
        "of": one.name,
        "policy": None if one.policy is None else text_of(one.policy),
        "rejected": one.rejected,
        "foreseen_worst_psnr_db": _foreseen(one),
        "selection": None if one.selection is None else _part(one.selection),
    }


def _foreseen(one: Candidate) -> float | None:
    return None if one.choosing is None else _two_digits(one.choosing.foreseen_worst_psnr_db)


def _part(summary: Summary) -> dict[str, Any]:
    numbers: dict[str, Any] = msgspec.to_builtins(measured(summary))
    return numbers


def _two_digits(value: float | None) -> float | None:
    return None if value is None else round(value, 2)
