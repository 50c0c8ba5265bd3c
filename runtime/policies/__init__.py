"""Reuse policies: one file and one registry row each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from typing import Any

from ...engines.errors import InvalidRequest, quoted
from ..decisions import Decision, Distance, Measure
from .base import Context, Decider, Policy
from .cycle import Cycle, Static
from .forecast import Forecast
from .foresight import Foresight
from .none import NoReuse
from .schedule import FixedSchedule

__all__ = [
    "POLICIES",
    "Context",
    "Cycle",
    "Decider",
    "Decision",
    "Distance",
    "FixedSchedule",
    "Forecast",
    "Foresight",
    "Measure",
    "NoReuse",
    "Policy",
    "Static",
    "default_policy",
    "policy_from_settings",
    "policy_of_settings",
    "policy_settings",
]

_ROWS: tuple[type[Any], ...] = (
    Foresight,
    Forecast,
    FixedSchedule,
    Static,
    NoReuse,
)  # the first is the default
POLICIES: dict[str, type[Any]] = {policy.name: policy for policy in _ROWS}


def policy_from_settings(name: str, **settings: Any) -> Policy:
    """A policy by name; settings that are None keep their default, those that the policy lacks are refused."""
    if name not in POLICIES:
        raise InvalidRequest(f"policy: got {quoted(name)}, expected one of {', '.join(POLICIES)}")
    given = {key: value for key, value in settings.items() if value is not None}
    known = {field.name for field in fields(POLICIES[name])}
    for key in sorted(set(given) - known):
        raise InvalidRequest(f"{key}: policy {name} has no such setting; it has {', '.join(sorted(known)) or 'none'}")
    made: Policy = POLICIES[name](**given)
    return made


def policy_of_settings(settings: Mapping[str, Any]) -> Policy | None:
    """The policy whose `policy_settings` these are; None where it is none of this package's."""
    others = dict(settings)
    name = others.pop("name")
    return policy_from_settings(name, **others) if name in POLICIES else None


def default_policy() -> Policy:
    """The first registered policy, as it comes."""
    policy: Policy = _ROWS[0]()
    return policy


def policy_settings(policy: Policy) -> dict[str, Any]:
    """A policy's name and settings, for traces."""
    settings = asdict(policy) if is_dataclass(policy) and not isinstance(policy, type) else {"cache": policy.cache}
    return {"name": policy.name, **settings}
