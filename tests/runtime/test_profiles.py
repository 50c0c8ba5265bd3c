"""Profiles of a bundle as policies of its requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import foresight
from foresight.engines.bundle import open_bundle
from foresight.engines.errors import BundleError, InvalidRequest
from foresight.engines.profiles import write_profiles
from foresight.runtime.policies import POLICIES, Foresight, Static, policy_settings
from foresight.runtime.profiles import check_profiles, policy_of, profile_policy
from tests.support import copy_bundle, profile_of


@pytest.fixture
def copied(bundle: Path, tmp_path: Path) -> Path:
    return copy_bundle(bundle, tmp_path / "copied")


def test_a_profile_is_the_policy_of_a_request(copied: Path) -> None:
    settings = {"warmup": 2, "cache": "residual"}
    write_profiles(open_bundle(copied), [profile_of("fast", policy="static", settings=settings)])
    with foresight.load(copied) as pipeline:
        policy = pipeline.profile("fast", 4)
        assert policy == Static(warmup=2, cache="residual")
        video = pipeline("a dog", steps=4, policy=policy)
    assert video.trace.policy == policy_settings(policy) and video.trace.blocks_reused


@pytest.mark.parametrize("kind", POLICIES.values(), ids=list(POLICIES))
def test_every_policy_can_be_a_profile(kind: Any, copied: Path) -> None:
    policy = kind(**(kind.ladder[0] if kind.ladder else {}))
    named = policy_settings(policy)
    profile = profile_of("fast", policy=named.pop("name"), settings=named)
    (read,) = write_profiles(open_bundle(copied), [profile]).manifest.profiles
    assert policy_of(read) == policy


def test_without_a_number_of_steps_it_is_that_of_the_bundle(copied: Path) -> None:
    profiles = [
        profile_of("fast", policy="foresight", settings={"gamma": steps / 50}, steps=steps) for steps in (10, 50)
    ]
    manifest = write_profiles(open_bundle(copied), profiles).manifest
    assert manifest.defaults.steps == 50
    assert profile_policy(manifest, "fast") == Foresight(gamma=1.0)
    assert profile_policy(manifest, "fast", 10) == Foresight(gamma=0.2)


def test_what_is_no_profile_is_refused_with_those_there_are(copied: Path) -> None:
    opened = open_bundle(copied)
    with pytest.raises(InvalidRequest, match="profile: got 'fast' for 4 steps, and the bundle has none; make one"):
        profile_policy(opened.manifest, "fast", 4)
    manifest = write_profiles(opened, [profile_of("fast"), profile_of("fast", steps=6)]).manifest
    for name, steps in (("slow", 4), ("fast", 5)):
        with pytest.raises(InvalidRequest, match=f"got '{name}' for {steps} steps, expected one of fast for 4, fast"):
            profile_policy(manifest, name, steps)


@pytest.mark.parametrize(
    ("policy", "settings", "message"),
    [
        ("magic", {}, "policy: got 'magic'"),
        ("forecast", {"gamma": 1.0}, "gamma: policy forecast has no such setting"),
        ("forecast", {"tolerance": -1.0}, "tolerance: got -1.0, expected a number above 0"),
        ("foresight", {"gamma": "much"}, "gamma: got 'much'"),
        ("static", {"cache": 3}, "cache"),
        ("static", {"interval": (1, 2)}, "interval: got"),
    ],
)
def test_policies_that_this_version_does_not_know_are_refused_when_a_bundle_is_loaded(
    copied: Path, policy: str, settings: dict[str, Any], message: str
) -> None:
    opened = write_profiles(open_bundle(copied), [profile_of("fast", policy=policy, settings=settings)])
    with pytest.raises(BundleError, match=f"profile fast for 4 steps is none of this version .{message}"):
        check_profiles(opened)
    with pytest.raises(BundleError, match="upgrade foresight-engines"):
        foresight.load(copied)
