"""The named profiles of a bundle as policies."""

from __future__ import annotations

from ..engines.bundle import Bundle
from ..engines.errors import BundleError, InvalidRequest, quoted
from ..engines.manifest import Manifest, PolicyProfile
from ..engines.wording import command, plural
from .policies import Policy, policy_from_settings


def policy_of(profile: PolicyProfile) -> Policy:
    """The policy of a profile. Raises InvalidRequest where this version has none of that name or such settings."""
    return policy_from_settings(profile.policy, **profile.settings)


def check_profiles(bundle: Bundle) -> None:
    """Refuse profiles that are none for this version. Raises BundleError."""
    for profile in bundle.manifest.profiles:
        try:
            policy_of(profile)
        except (InvalidRequest, TypeError) as error:
            raise BundleError(
                f"bundle {bundle.path}: profile {profile.name} for {plural(profile.steps, 'step')} is none of this "
                f"version ({error}); upgrade foresight-engines, or export and tune again"
            ) from error


def profile_policy(manifest: Manifest, name: str, steps: int | None = None) -> Policy:
    """The policy of the profile of that name, for that many steps (None: the bundle's default).

    Raises InvalidRequest, with the profiles that there are.
    """
    wanted = manifest.defaults.steps if steps is None else steps
    for profile in manifest.profiles:
        if (profile.name, profile.steps) == (name, wanted):
            return policy_of(profile)
    there = ", ".join(f"{profile.name} for {profile.steps}" for profile in manifest.profiles)
    remedy = f"expected one of {there}" if there else "and the bundle has none"
    raise InvalidRequest(
        f"profile: got {quoted(name)} for {quoted(wanted)} steps, {remedy}; make one with: "
        f"{command('tune BUNDLE --steps N')}"
    )
