"""What a caller may pass: every check that needs no bundle. All raise InvalidRequest, before anything runs."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any, SupportsFloat

import numpy as np

from ..engines.errors import InvalidRequest, quoted
from .policies import CACHE_MODES, Foresight, Policy

MAX_CHARACTERS = 4000  # of a prompt; no model reads more than 300 tokens, which take about 1500


def check_prompts(prompts: Any, most: int | None = None) -> tuple[str, ...]:
    """One prompt, or a list or tuple of up to `most` (None: any number); each some text."""
    listed = prompts if isinstance(prompts, (list, tuple)) else (prompts,)
    if not listed:
        raise InvalidRequest("prompt: got none, expected at least one")
    if most is not None and len(listed) > most:
        raise InvalidRequest(
            f"prompts: got {len(listed)} at once, this bundle takes {most}; send fewer, or export with a larger "
            "--max-batch"
        )
    return tuple(check_text("prompt", prompt) for prompt in listed)


def check_text(name: str, text: Any, may_be_empty: bool = False) -> str:
    """Text that a tokenizer can read, of at most `MAX_CHARACTERS`."""
    if isinstance(text, str) and len(text) > MAX_CHARACTERS:
        raise InvalidRequest(
            f"{name}: got {len(text)} characters, expected at most {MAX_CHARACTERS}; shorten it, no model reads so much"
        )
    if not isinstance(text, str) or not (may_be_empty or text.strip()):
        raise InvalidRequest(f"{name}: got {quoted(text)}, expected some text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"{name}: got {quoted(text)}, expected Unicode text, without surrogates") from error
    return text


def check_guidance(guidance: SupportsFloat) -> float:
    """A number of 1 (no guidance) or more, that fp32 can hold."""
    try:
        value = float(guidance)
    except (TypeError, ValueError, OverflowError):
        value = float("nan")
    if not 1 <= value <= float(np.finfo(np.float32).max):
        raise InvalidRequest(f"guidance: got {quoted(guidance)}, expected a finite number of 1 (none) or more")
    return value


def check_seeds(seed: int | Sequence[int], prompts: int) -> tuple[int, ...]:
    """One seed per prompt: those given, or the one given and those that follow it."""
    wrong = InvalidRequest(f"seed: got {quoted(seed)}, expected a number of 0 or more, or one per prompt ({prompts})")
    try:
        seeds = _given(seed, prompts) if isinstance(seed, Iterable) else _following(seed, prompts)
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
        raise InvalidRequest(f"policy: got {quoted(policy)}, expected Foresight(…), Static(…) or NoReuse()")
    return policy


def check_count(name: str, value: Any) -> None:
    """A whole number of 1 or more, or None."""
    try:
        fits = value is None or operator.index(value) >= 1
    except TypeError:
        fits = False
    if not fits:
        raise InvalidRequest(f"{name}: got {quoted(value)}, expected a whole number of 1 or more")


def _given(seeds: Iterable[int], prompts: int) -> tuple[int, ...]:
    return tuple(map(operator.index, islice(seeds, prompts + 1)))


def _following(seed: int, prompts: int) -> tuple[int, ...]:
    first = operator.index(seed)
    return tuple(range(first, first + prompts))
