"""What a caller should know of a request that ran: settings that had no effect, and which to try next."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple, TypeGuard

from ..engines.manifest import PolicyProfile
from ..engines.wording import command, plural
from .policies import Cycle, Forecast, NoReuse, Policy, policy_of_settings
from .profiles import policy_of
from .trace import Trace, turns_of

FEWEST_STEPS = 6  # with fewer hardly one can be forecast
WORTH_TRYING = 0.02  # of the block calls: what a profile has to skip beyond a request that did without


def notes_on(trace: Trace, given: Collection[str], *, draws_noise: bool = False) -> list[str]:
    """One sentence for each setting of a finished request that changed nothing.

    `given` names the settings that the caller chose, whatever their values: `seed`, `threads`, `negative_prompt`,
    `guidance_2`, `split_guidance`, `cache_profile`, `compare`. `draws_noise` says that the sampler adds noise from the
    seed in later steps.
    """
    policy = policy_of_settings(trace.policy)
    notes = [] if policy is None else list(_on_reuse(trace, policy))
    if {*trace.guidances, *(one for own in trace.later_guidances for one in own)} == {1}:
        if "negative_prompt" in given:
            notes.append("negative_prompt: not read, as guidance 1 runs without it; choose a guidance above 1")
        if "split_guidance" in given:
            notes.append("split_guidance: not used, as guidance 1 has no second half; leave it out")
    if "guidance_2" in given and {step.expert for step in trace.steps} == {0}:
        notes.append(
            f"guidance_2: not used, as all of the {plural(len(trace.steps), 'step')} were the first transformer's; "
            "choose more steps"
        )
    if trace.latents_given and "seed" in given and not draws_noise:
        notes.append("seed: not used, as the noise was given as latents; leave one of them out")
    if "cache_profile" in given and not trace.uncached:
        why = f"policy {policy.name} caches no block" if _skips_steps(policy) else "the outputs of all blocks fit"
        notes.append(f"cache_profile: not used, as {why}; it is for blocks' outputs and a smaller cache_memory")
    if "threads" in given and not trace.backend.get("device", "").startswith("cpu"):
        notes.append(f"threads: not used on {trace.backend.get('device')}, where the device computes")
    if "compare" in given and trace.policy["name"] == NoReuse.name:
        notes.append("compare: both runs are the same, as policy none reuses nothing")
    return notes


def _on_reuse(trace: Trace, policy: Policy) -> Iterator[str]:
    """Where the settings, and not what was measured, have kept everything from being reused."""
    steps, turns = trace.steps_requested, [len(turn) for turn in turns_of(trace)]
    if isinstance(policy, NoReuse):
        return
    if "warmup" not in trace.policy:
        if not policy.may_reuse(steps):
            yield f"policy: {policy.name} is one in which all {steps} steps run, so nothing could be reused"
    elif len(turns) > 1:  # each transformer has a warm-up, and a last step, of its own
        if not any(map(policy.may_reuse, turns)):
            yield (
                f"warmup: each transformer begins with one and computes its last step, and they have "
                f"{' and '.join(map(str, turns))} steps, so nothing could be reused; choose a "
                "shorter one, or more steps"
            )
    elif not policy.may_reuse(steps):
        yield (
            f"warmup: ends after step {policy.warmup_steps(steps)}, and the last of the {steps} is always computed, so "
            "nothing could be reused; choose a shorter one, or more steps"
        )


class Advice(NamedTuple):
    """What to try next, as one would type it, and why."""

    setting: str
    reason: str


def next_setting(trace: Trace, profiles: Iterable[PolicyProfile], *, can_forecast: bool = True) -> Advice | None:
    """What to try after this request; None where there is nothing, and after one that was to reuse nothing.

    Of the bundle's profiles for this number of steps that skip more, the most exact one. Where there is none for this
    number, a policy that skips whole steps, if the sampler can be foretold (`can_forecast`), and how to get a profile.
    """
    policy, steps = policy_of_settings(trace.policy), trace.steps_requested
    if isinstance(policy, NoReuse):
        return None
    tuned = [profile for profile in profiles if profile.steps == steps]
    if not tuned and steps < FEWEST_STEPS:
        return None
    if not tuned:
        tune = command(f"tune --steps {steps}")
        if not can_forecast or _skips_steps(policy):
            return Advice(tune, "it finds profiles of this bundle")
        return Advice(f"--policy {Forecast.name}", f"it skips whole steps; {tune} finds profiles of this bundle")
    used = [profile.held_out.share_skipped for profile in tuned if policy_of(profile) == policy]
    least = max(used) if used else trace.share_skipped + WORTH_TRYING
    faster = [profile for profile in tuned if profile.held_out.share_skipped > least]
    if not faster:
        return None
    profile = min(faster, key=lambda one: one.held_out.share_skipped)
    measured = profile.held_out
    quality = "identical" if measured.worst_psnr_db is None else f"worst PSNR {measured.worst_psnr_db:.1f} dB"
    return Advice(
        f"--profile {profile.name}",
        f"{profile.policy}: {100 * measured.share_skipped:.1f} % skipped, {quality} on "
        f"{plural(measured.pairs, 'pair')} held out",
    )


def _skips_steps(policy: Policy | None) -> TypeGuard[Policy]:
    return policy is not None and policy.outputs > 0


def cycle_of(trace: Trace) -> Cycle | None:
    """When the policy allowed reuse; None if it never did, or is none of this package's."""
    policy = policy_of_settings(trace.policy)
    return policy if isinstance(policy, Cycle) else None
