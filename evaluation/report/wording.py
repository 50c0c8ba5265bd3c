"""Numbers and settings in the words that the report uses."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ...runtime.policies import Policy


def duration(milliseconds: float) -> str:
    """A time with three digits or so, in ms or s."""
    size = abs(milliseconds)
    if size >= 10_000:
        text = f"{size / 1000:.1f} s"
    else:
        text = f"{size:.0f} ms" if size >= 100 else f"{size:.1f} ms" if size >= 10 else f"{size:.2f} ms"
    return f"−{text}" if milliseconds < 0 else text


def memory(count: int) -> str:
    """A number of bytes with three digits."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} bytes"


def decibels(value: float) -> str:
    """A PSNR; infinite means identical."""
    return f"{value:.1f} dB" if math.isfinite(value) else "identical"


def similarity(value: float) -> str:
    """An SSIM; one that only rounds to 1 is not shown as 1."""
    return f"{value:.4f}" if value == 1 or value < 0.99995 else "> 0.9999"


def in_turns(turns: Sequence[int]) -> str:
    """How many steps each of several transformers has."""
    return f"in turns of {' and '.join(map(str, turns))} steps"


def policy_words(policy: Policy, turns: Sequence[int]) -> str:
    """A policy, which counts the steps of each transformer by themselves."""
    return "; then ".join(dict.fromkeys(policy.describe(steps) for steps in turns if steps))
