"""Settings that change nothing are named, and no others."""

from __future__ import annotations

from typing import Any

import pytest

from foresight.runtime.notes import notes_on
from foresight.runtime.policies import Foresight, NoReuse, Policy, Static
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
        "negative_prompt": "",
        "steps_requested": 50,
        "guidance": 2.0,
        "seeds": (0,),
        "latents_given": False,
    }
    return Trace(**values | changes)


ALL = {"seed", "threads", "negative_prompt", "cache_profile", "compare"}


@pytest.mark.parametrize(
    ("record", "given", "subject"),
    [
        (trace(Foresight(warmup=200)), set(), "warmup"),
        (trace(Static(warmup=49)), set(), "warmup"),
        (trace(steps_requested=3), set(), "warmup"),
        (trace(guidance=1.0), {"negative_prompt"}, "negative_prompt"),
        (trace(latents_given=True), {"seed"}, "seed"),
        (trace(), {"cache_profile"}, "cache_profile"),
        (trace(backend={"device": "cuda:0"}), {"threads"}, "threads"),
        (trace(NoReuse()), {"compare"}, "compare"),
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
        (trace(guidance=1.0, latents_given=True), set()),
    ],
)
def test_a_setting_with_one_is_not(record: Trace, given: set[str]) -> None:
    assert notes_on(record, given) == []


def test_a_seed_beside_latents_has_an_effect_where_later_steps_add_noise() -> None:
    assert notes_on(trace(latents_given=True), {"seed"}, draws_noise=True) == []
