"""No reuse: what every other policy is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..caches import find_mode
from .base import Context, Decider, Policy, cache_setting


@dataclass(frozen=True)
class NoReuse(Policy):
    """Every block runs in every step."""

    name: ClassVar[str] = "none"
    cache: str = cache_setting()

    def __post_init__(self) -> None:
        find_mode(self.cache)

    def begin(self, context: Context) -> Decider:
        """See Policy.begin."""
        return Decider(context)

    def describe(self, steps: int) -> str:
        """See Policy.describe."""
        return "none: every block runs in every step"
