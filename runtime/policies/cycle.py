"""Reuse on a fixed beat: when a cycle allows it, and the policy that then reuses all blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ...engines.errors import InvalidRequest, quoted
from ...engines.wording import plural
from ..caches import find_mode
from ..decisions import Decision
from .base import Context, Decider, Policy, SearchRange, cache_setting

WARMUP_SHARE = 0.15  # of all steps (arXiv 2506.00329, section 4: 8 of 50)


@dataclass(frozen=True)
class Cycle(Policy):
    """When reuse is allowed: after `warmup` steps (None: 15 % of all) the first `reuse_steps` of every `interval`."""

    reuse_steps: int = field(
        default=1, metadata={"help": "Steps of a cycle that may reuse.", "search": SearchRange(1, 3)}
    )
    interval: int = field(default=2, metadata={"help": "Steps of a cycle.", "search": SearchRange(2, 4)})
    warmup: int | None = field(
        default=None, metadata={"help": "Steps before any reuse.", "default": f"{100 * WARMUP_SHARE:.0f} % of all"}
    )

    def __post_init__(self) -> None:
        find_mode(self.cache)
        for name in ("reuse_steps", "interval", "warmup"):
            value = getattr(self, name)
            if not isinstance(value, int) and not (name == "warmup" and value is None):
                raise InvalidRequest(f"{name}: got {quoted(value)}, expected a whole number")
        if self.reuse_steps < 1:
            raise InvalidRequest(
                f"reuse_steps: got {quoted(self.reuse_steps)}, expected 1 or more; for none use policy none"
            )
        if self.interval <= self.reuse_steps:
            raise InvalidRequest(
                f"interval: got {quoted(self.interval)}, expected more than reuse_steps ({quoted(self.reuse_steps)}), "
                "so that every cycle computes all blocks once"
            )
        if self.warmup is not None and self.warmup < 2:
            raise InvalidRequest(f"warmup: got {quoted(self.warmup)}, expected 2 or more: a change needs two steps")

    def warmup_steps(self, steps: int) -> int:
        """See Policy.warmup_steps."""
        return self.warmup if self.warmup is not None else max(2, math.ceil(WARMUP_SHARE * steps))

    def may_reuse(self, steps: int) -> bool:
        """See Policy.may_reuse."""
        return any(self.allows(step, steps) for step in range(steps))

    def allows(self, step: int, steps: int) -> bool:
        """Whether blocks may be reused in `step`; the last step is always computed."""
        since = step - self.warmup_steps(steps)
        return since >= 0 and step < steps - 1 and since % self.interval < self.reuse_steps

    def describe(self, steps: int) -> str:
        """See Policy.describe."""
        which = "reuses" if self.reuse_steps == 1 else "reuse"
        return (
            f"{self.title}: after {plural(self.warmup_steps(steps), 'warm-up step')}, {self.reuse_steps} of every "
            f"{self.interval} steps {which} {self.reused}; {find_mode(self.cache).words}"
        )

    @property
    def title(self) -> str:
        """The policy's name, with what else sets it apart."""
        return self.name

    @property
    def reused(self) -> str:
        """Which blocks are reused where it is allowed."""
        return "all blocks"


@dataclass(frozen=True)
class Static(Cycle):
    """All blocks are reused in every step that the cycle allows, whatever they measure."""

    name: ClassVar[str] = "static"
    ladder: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)
    cache: str = cache_setting()

    def begin(self, context: Context) -> Decider:
        """See Policy.begin."""
        return _ByCycle(self, context)


class _ByCycle(Decider):
    def __init__(self, policy: Static, context: Context) -> None:
        super().__init__(context)
        self._policy = policy

    def plan(self, step: int) -> list[Decision]:
        reuse = self._policy.allows(step, self.context.steps)
        return [Decision.REUSE if reuse else Decision.COMPUTE] * self.context.blocks
