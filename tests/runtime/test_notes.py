"""Settings that change nothing are named, and no others."""

from __future__ import annotations

from typing import Any

import pytest

from foresight.engines.manifest import HeldOut, PolicyProfile
from foresight.runtime.decisions import Decision
from foresight.runtime.notes import next_setting, notes_on
from foresight.runtime.policies import FixedSchedule, Forecast, Foresight, NoReuse, Policy, Static
from foresight.runtime.trace import Trace


def trace(policy: Policy | None = None, **changes: Any) -> Trace:
    from foresight.runtime.policies import policy_settings

    values: dict[str, Any] = {
        "model": "latte",
        "bundle": "0" * 64,
        "blocks": ("block.000",),
        "kinds": ("spatial",),
        "policy": policy_settings(policy or Foresight()),
        "backend": {"backend": "onnxruntime", "device": "cpu"},
        "prompts": ("a dog",),
        "negative_prompts": ("",),
        "steps_requested": 50,
        "guidances": (2.0,),
        "seeds": (0,),
        "latents_given": False,
    }
    return Trace(**values | changes)


def in_turns(first: int, second: int, policy: Policy | None = None) -> Trace:
    """Of two transformers, which had so many steps."""
    record = trace(policy, steps_requested=first + second)
    for step in range(first + second):
        record.record(1.0, 1.0, [Decision.COMPUTE], [None], expert=int(step >= first))
    return record


ALL = {"seed", "threads", "negative_prompt", "cache_profile", "compare"}


@pytest.mark.parametrize(
    ("record", "given", "subject"),
    [
        (trace(Foresight(warmup=200)), set(), "warmup"),
        (trace(Static(warmup=49)), set(), "warmup"),
        (trace(steps_requested=3), set(), "warmup"),
        (trace(guidances=(1.0,)), {"negative_prompt"}, "negative_prompt"),
        (trace(latents_given=True), {"seed"}, "seed"),
        (trace(), {"cache_profile"}, "cache_profile"),
        (trace(backend={"device": "cuda:0"}), {"threads"}, "threads"),
        (trace(NoReuse()), {"compare"}, "compare"),
        (trace(guidances=(1.0,)), {"split_guidance"}, "split_guidance"),
        (trace(FixedSchedule()), set(), "policy"),
        (trace(FixedSchedule("1-50")), set(), "policy"),
        (in_turns(8, 0), {"guidance_2"}, "guidance_2"),
        (in_turns(4, 4, Foresight(warmup=4)), {"guidance_2"}, "warmup"),
    ],
)
def test_a_setting_without_effect_is_named(record: Trace, given: set[str], subject: str) -> None:
    (note,) = notes_on(record, given)
    assert note.startswith(f"{subject}: ")


@pytest.mark.parametrize(
    ("record", "given"),
    [
        (trace(), ALL - {"cache_profile"}),
        (trace(uncached=("block.000",)), ALL),
        (trace(Foresight(warmup=48)), set()),
        (trace(NoReuse(), steps_requested=1), set()),
        (trace(guidances=(1.0,), latents_given=True), set()),
        (trace(guidances=(1.0,), later_guidances=((3.0,),)), {"negative_prompt", "split_guidance"}),
        (trace(FixedSchedule("1-4 50")), set()),
        (in_turns(4, 4), {"guidance_2", "split_guidance"}),
        (in_turns(2, 6, Foresight(warmup=4)), {"guidance_2"}),
    ],
)
def test_a_setting_with_one_is_not(record: Trace, given: set[str]) -> None:
    assert notes_on(record, given) == []


def test_a_seed_beside_latents_has_an_effect_where_later_steps_add_noise() -> None:
    assert notes_on(trace(latents_given=True), {"seed"}, draws_noise=True) == []


# What to try next


def skipping(share: float, policy: Policy | None = None, **changes: Any) -> Trace:
    """A request of ten calls, of which a share was reused."""
    record = trace(policy, steps_requested=10, **changes)
    for step in range(10):
        record.record(10.0 - step, 1.0, [Decision.REUSE if step < 10 * share else Decision.COMPUTE], [None])
    return record


def profile(name: str, share: float, tolerance: float = 0.01, steps: int = 10) -> PolicyProfile:
    held_out = HeldOut(pairs=50, worst_psnr_db=41.25, mean_psnr_db=50.0, psnr_db=48.0, share_skipped=share, speedup=1.5)
    return PolicyProfile(
        name=name,
        steps=steps,
        policy="forecast",
        settings={"tolerance": tolerance},
        goal="worst PSNR of 40 dB or more",
        guidance=2.0,
        held_out=held_out,
    )


PROFILES = [profile("fast", 0.7, 0.03), profile("quality", 0.4), profile("balanced", 0.6, 0.02)]


@pytest.mark.parametrize(
    ("record", "setting"),
    [
        (skipping(0.3), "--profile quality"),
        (skipping(0.4), "--profile balanced"),  # as much as a profile skips is no more than it
        (skipping(0.6, Static()), "--profile fast"),
        (skipping(0.3, Forecast(tolerance=0.01)), "--profile balanced"),  # skipped less of this prompt, and is quality
        (skipping(0.3, Forecast(tolerance=0.02)), "--profile fast"),
    ],
)
def test_the_most_exact_profile_that_skips_more_is_next(record: Trace, setting: str) -> None:
    advice = next_setting(record, PROFILES)
    assert advice is not None and advice.setting == setting


@pytest.mark.parametrize(
    "record",
    [skipping(0.7), skipping(0.9, Static()), skipping(0.1, Forecast(tolerance=0.03)), skipping(0.0, NoReuse())],
)
def test_nothing_is_next_after_the_fastest_profile_or_where_no_reuse_was_wanted(record: Trace) -> None:
    assert next_setting(record, PROFILES) is None


def test_the_reason_is_what_was_measured_of_the_profile() -> None:
    advice = next_setting(skipping(0.3), PROFILES)
    assert advice is not None
    assert advice.reason == "forecast: 40.0 % skipped, worst PSNR 41.2 dB on 50 pairs held out"


@pytest.mark.parametrize("profiles", [[], [profile("fast", 0.7, steps=20)]])
def test_without_a_profile_for_the_number_of_steps_whole_steps_and_tuning_are_next(
    profiles: list[PolicyProfile],
) -> None:
    advice = next_setting(skipping(0.3), profiles)
    assert advice is not None and advice.setting == "--policy forecast"
    assert "foresight tune --steps 10 finds profiles" in advice.reason
    for policy in (Forecast(), FixedSchedule()):
        advice = next_setting(skipping(0.3, policy), profiles)
        assert advice is not None and advice.setting == "foresight tune --steps 10"
    assert next_setting(skipping(0.0, NoReuse()), profiles) is None


def test_a_request_of_a_few_steps_has_none_to_skip() -> None:
    assert next_setting(trace(steps_requested=5), []) is None


def test_what_a_sampler_does_not_allow_is_not_next() -> None:
    advice = next_setting(skipping(0.3), [], can_forecast=False)
    assert advice is not None and advice.setting == "foresight tune --steps 10"
