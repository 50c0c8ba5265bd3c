"""What a caller may pass: every check that needs no bundle. All raise InvalidRequest, before anything runs."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any, SupportsFloat

import numpy as np

from ..engines.errors import InvalidRequest
from .policies import CACHE_MODES, Foresight, Policy


def check_prompts(prompts: Any) -> tuple[str, ...]:
    """One prompt, or a list or tuple of several; each some text."""
    listed = tuple(prompts) if isinstance(prompts, (list, tuple)) else (prompts,)
    if not listed:
        raise InvalidRequest("prompt: got none, expected at least one")
    return tuple(check_text("prompt", prompt) for prompt in listed)


def check_text(name: str, text: Any, may_be_empty: bool = False) -> str:
    """Text that a tokenizer can read."""
    if not isinstance(text, str) or not (may_be_empty or text.strip()):
        raise InvalidRequest(f"{name}: got {text!r}, expected some text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"{name}: got {text!r}, expected Unicode text, without surrogates") from error
    return text


def check_guidance(guidance: SupportsFloat) -> float:
    """A number of 1 (no guidance) or more, that fp32 can hold."""
    try:
        value = float(guidance)
    except (TypeError, ValueError):
        value = float("nan")
    if not 1 <= value <= float(np.finfo(np.float32).max):
        raise InvalidRequest(f"guidance: got {guidance}, expected a finite number of 1 (none) or more")
    return value


def check_seeds(seed: int | Sequence[int], prompts: int) -> tuple[int, ...]:
    """One seed per prompt: those given, or the one given and those that follow it."""
    wrong = InvalidRequest(f"seed: got {seed!r}, expected a number of 0 or more, or one per prompt ({prompts})")
    try:
        seeds = tuple(map(operator.index, seed)) if isinstance(seed, Iterable) else _following(seed, prompts)
    except TypeError as error:
        raise wrong from error
    if len(seeds) != prompts or min(seeds) < 0:
        raise wrong
    return seeds


def check_policy(policy: Policy | None) -> Policy:
    """The policy itself, or the default for None; anything with the methods of one will do."""
    if policy is None:
        return Foresight()
    known = callable(getattr(policy, "begin", None)) and getattr(policy, "cache", None) in CACHE_MODES
    if not known or isinstance(policy, type):
        raise InvalidRequest(f"policy: got {policy!r}, expected Foresight(…), Static(…) or NoReuse()")
    return policy


def check_count(name: str, value: Any) -> None:
    """A whole number of 1 or more, or None."""
    try:
        fits = value is None or operator.index(value) >= 1
    except TypeError:
        fits = False
    if not fits:
        raise InvalidRequest(f"{name}: got {value!r}, expected a whole number of 1 or more")


def _following(seed: int, prompts: int) -> tuple[int, ...]:
    first = operator.index(seed)
    return tuple(range(first, first + prompts))
