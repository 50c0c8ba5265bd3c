"""Which blocks get a cache slot where there is no room for all of them.

All blocks write the same stream tensors, so a slot costs the same for each, and the question is which of them would be
reused most. A trace of an earlier request answers it: it holds what every block measured in every step, from which
follows what the policy would have done with any set of slots.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..engines.errors import InvalidRequest, quoted
from ..engines.wording import mebibytes
from .caches import CacheMode, Layout
from .decisions import Decision


@dataclass(frozen=True)
class Profile:
    """What a policy wanted to reuse, step by step: the blocks whose change was within their limit."""

    blocks: int
    wanted: tuple[frozenset[int], ...]

    @classmethod
    def from_trace(cls, trace: Mapping[str, Any]) -> Profile:
        """The profile of a request, from `Trace.to_dict()`. Raises InvalidRequest."""
        try:
            return cls(len(trace["blocks"]), tuple(_wanted(step) for step in trace["steps"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise InvalidRequest(
                f"cache_profile: got no trace of a request ({quoted(error)}), expected what Trace.to_dict() makes"
            ) from error

    @property
    def digest(self) -> str:
        """The same for profiles that are alike, and for no others."""
        return hashlib.sha256(repr([sorted(step) for step in self.wanted]).encode()).hexdigest()


def choose_cached(
    layout: Layout,
    reusable: Sequence[bool],
    buffer_bytes: int,
    limit: int | None = None,
    profile: Profile | None = None,
) -> tuple[bool, ...]:
    """Which of the `reusable` blocks get a slot, so that all buffers, `buffer_bytes` each, stay within `limit` bytes.

    With a profile those that save the most block calls of its request; without one the deepest, as reusing one of
    them saves all before it (or, of residuals, as they change least). Raises InvalidRequest where not even a request
    without slots fits.
    """
    if limit is None:
        return tuple(reusable)
    blocks = len(reusable)
    if profile is not None and profile.blocks != blocks:
        raise InvalidRequest(f"cache_profile: got a trace of {profile.blocks} blocks, this bundle has {blocks}")
    slots = layout.slots(blocks, limit // buffer_bytes)
    if slots < 0:
        got, least = mebibytes(limit, layout.buffers(blocks, 0) * buffer_bytes)
        raise InvalidRequest(f"cache_memory: got {got} MiB, expected at least {least} for a request of this size")
    ranked = [block for block in rank_blocks(layout.mode, blocks, profile) if reusable[block]]
    chosen = set(ranked[:slots])
    return tuple(block in chosen for block in range(blocks))


def rank_blocks(mode: CacheMode, blocks: int, profile: Profile | None) -> list[int]:
    """All blocks, the one whose slot saves most first; ties go to the deeper one."""
    ranked: list[int] = []
    rest = list(reversed(range(blocks)))
    while rest:
        gains = {block: _saved(mode, profile, {*ranked, block}) for block in rest}
        best = max(rest, key=lambda block: gains[block])
        ranked.append(best)
        rest.remove(best)
    return ranked


def _saved(mode: CacheMode, profile: Profile | None, slots: set[int]) -> int:
    """Block calls that the profile's request would not have made with those slots."""
    return 0 if profile is None else sum(mode.spared(slots & wanted) for wanted in profile.wanted)


def _wanted(step: Mapping[str, Any]) -> frozenset[int]:
    """The blocks that a step reused, or would have if a later one had not made them dead."""
    if Decision.REUSE.value not in step["decisions"]:
        return frozenset()
    return frozenset(
        block
        for block, (decision, metric, limit) in enumerate(
            zip(step["decisions"], step["metrics"], step["limits"], strict=True)
        )
        if decision == Decision.REUSE.value or (decision == Decision.DEAD.value and _within(metric, limit))
    )


def _within(metric: Sequence[float] | float | None, limit: float | None) -> bool:
    """Without numbers (of the static policy) a dead block would have been reused as well."""
    return metric is None or limit is None or metric <= limit  # type: ignore[operator]
