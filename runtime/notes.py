"""What a caller should know of a request that ran: settings that had no effect, sizes the model was not made for."""

from __future__ import annotations

from collections.abc import Collection

from .policies import Cycle, NoReuse, policy_of_settings
from .trace import Trace


def notes_on(trace: Trace, given: Collection[str], *, draws_noise: bool = False) -> list[str]:
    """One sentence for each setting of a finished request that changed nothing.

    `given` names the settings that the caller chose, whatever their values: `seed`, `threads`, `negative_prompt`,
    `cache_profile`, `compare`. `draws_noise` says that the sampler adds noise from the seed in later steps.
    """
    notes = []
    policy, steps = policy_of_settings(trace.policy), trace.steps_requested
    if policy is not None and not isinstance(policy, NoReuse) and not policy.may_reuse(steps):
        notes.append(
            f"warmup: ends after step {policy.warmup_steps(steps)}, and the last of the {steps} is always computed, so "
            "nothing could be reused; choose a shorter one, or more steps"
        )
    if trace.guidance == 1 and "negative_prompt" in given:
        notes.append("negative_prompt: not read, as guidance 1 runs without it; choose a guidance above 1")
    if trace.latents_given and "seed" in given and not draws_noise:
        notes.append("seed: not used, as the noise was given as latents; leave one of them out")
    if "cache_profile" in given and not trace.uncached:
        notes.append("cache_profile: not used, as the outputs of all blocks fit; it is for a smaller cache_memory")
    if "threads" in given and not trace.backend.get("device", "").startswith("cpu"):
        notes.append(f"threads: not used on {trace.backend.get('device')}, where the device computes")
    if "compare" in given and trace.policy["name"] == NoReuse.name:
        notes.append("compare: both runs are the same, as policy none reuses nothing")
    return notes


def cycle_of(trace: Trace) -> Cycle | None:
    """When the policy allowed reuse; None if it never did, or is none of this package's."""
    policy = policy_of_settings(trace.policy)
    return policy if isinstance(policy, Cycle) else None
