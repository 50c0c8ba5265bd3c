"""Caches what blocks add to the stream: a reused block adds the same once more, whatever came before it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ..decisions import Decision
from .base import BlockCache, Buffers, Pool, bindings


@dataclass(frozen=True)
class ResidualMode:
    """See CacheMode."""

    name = "residual"
    words = "what blocks add to the stream is cached"
    measured = "adds to the stream"

    def buffers(self, blocks: int, slots: int, fixed: bool, passes: int) -> int:
        """See CacheMode.buffers. Addresses are fixed in any case."""
        return slots * passes + (3 if slots else 2)

    def create(self, pool: Pool, cached: Sequence[bool], fixed: bool) -> BlockCache:
        """See CacheMode.create."""
        return ResidualCache(pool, cached)

    def eliminate_dead(self, decisions: Sequence[Decision]) -> list[Decision]:
        """None is: every block's output is part of the stream that the next one adds to."""
        return list(decisions)

    def spared(self, reused: Collection[int]) -> int:
        """Those that are reused."""
        return len(reused)


class ResidualCache:
    """Caches what blocks add to the stream: S slots and three stream buffers per stream tensor, two without slots.

    A block is given the stream plus its cached residual as its cached output, which is just what reusing it would
    have handed on. So its distance is the change of its residual, and the very error that reuse would have made, by
    the same graph. The addresses that a block meets are few and fixed.
    """

    def __init__(self, pool: Pool, cached: Sequence[bool]) -> None:
        self.cached = cached
        self._xp = pool.xp
        self.stream, self._next, *predicted = pool.loose(3 if any(cached) else 2)
        self._predicted = predicted[0] if predicted else {}
        self._residuals = [pool.take() if wanted else {} for wanted in cached]
        self._filled = [False] * len(cached)
        self.nbytes = pool.nbytes

    def enter(self, step: int) -> Buffers:
        """See BlockCache.enter."""
        return self.stream

    def bind(self, block: int) -> tuple[Buffers, bool]:
        """See BlockCache.bind."""
        known = self._filled[block]
        if known:
            self._add_residual(block, self._predicted)
        return bindings(self.stream, self._predicted if known else self.stream, self._next), known

    def commit(self, block: int) -> None:
        """See BlockCache.commit."""
        for name, residual in self._residuals[block].items():
            self._xp.subtract(self._next[name], self.stream[name], out=residual)
        self._filled[block] = self.cached[block]
        self.stream, self._next = self._next, self.stream

    def reuse(self, block: int) -> None:
        """See BlockCache.reuse."""
        assert self._filled[block], "a block must have run before it can be reused"
        self._add_residual(block, self.stream)

    def leave(self) -> None:
        """See BlockCache.leave."""

    def _add_residual(self, block: int, out: Buffers) -> None:
        for name, residual in self._residuals[block].items():
            self._xp.add(self.stream[name], residual, out=out[name])
