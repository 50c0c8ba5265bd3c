"""Policies as one word, the name and the settings that are not the default: `forecast:tolerance=0.01,warmup=4`."""

from __future__ import annotations

from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

from ...engines.errors import InvalidRequest, quoted
from . import policy_from_settings
from .base import Policy


def policy_from_text(text: str) -> Policy:
    """The policy of such a word; names of settings may have hyphens. Raises InvalidRequest."""
    name, _, listed = text.partition(":")
    settings: dict[str, Any] = {}
    for item in listed.split(",") if listed else ():
        setting, equals, value = (piece.strip() for piece in item.partition("="))
        setting = setting.replace("-", "_")
        if not equals or not value or setting in settings:
            raise InvalidRequest(
                f"policy: got {quoted(text)}, expected a name and each setting once, such as name:setting=1,other=2"
            )
        settings[setting] = _value(value)
    return policy_from_settings(name.strip(), **settings)


def text_of(policy: Policy) -> str:
    """A policy in one word, from which `policy_from_text` makes it again if it is one of this package's."""
    known: tuple[Field[Any], ...] = fields(policy) if is_dataclass(policy) else ()
    values = {field.name: getattr(policy, field.name) for field in known}
    defaults = {field.name: field.default for field in known if field.default is not MISSING}
    chosen = {name: value for name, value in values.items() if name not in defaults or value != defaults[name]}
    settings = ",".join(f"{name}={_number(value)}" for name, value in chosen.items())
    return f"{policy.name}:{settings}" if settings else policy.name


def _value(text: str) -> int | float | str:
    """A number where it is one; what a setting may be is for its policy to say."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _number(value: Any) -> Any:
    """So that 1.0 and 1 are written alike."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
