"""Caches what blocks put out: a reused block hands its last output on, and no block before it need run."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ..decisions import Decision
from .base import BlockCache, Buffers, Pool, bindings


@dataclass(frozen=True)
class OutputMode:
    """See CacheMode."""

    name = "output"
    words = "block outputs are cached"
    measured = "puts out"

    def buffers(self, blocks: int, slots: int, fixed: bool, passes: int) -> int:
        """See CacheMode.buffers."""
        if fixed:
            return 2 * slots * passes + (1 if slots == blocks else 2)
        return slots * passes + 2

    def create(self, pool: Pool, cached: Sequence[bool], fixed: bool) -> BlockCache:
        """See CacheMode.create."""
        return FixedOutputCache(pool, cached) if fixed else OutputCache(pool, cached)

    def eliminate_dead(self, decisions: Sequence[Decision]) -> list[Decision]:
        """Every block before the deepest reused one is dead: its output would be replaced."""
        deepest = max((index for index, decision in enumerate(decisions) if decision is Decision.REUSE), default=0)
        return [Decision.DEAD] * deepest + list(decisions[deepest:])

    def spared(self, reused: Collection[int]) -> int:
        """The deepest reused block and all before it."""
        return max(reused, default=-1) + 1


class OutputCache:
    """Caches block outputs in slots that rotate: S slots and two more buffers per stream tensor.

    A block's output goes to a free buffer, which becomes its slot; then its old slot is free. Nothing is ever copied.
    Another cache of the pool adds its slots alone.
    """

    def __init__(self, pool: Pool, cached: Sequence[bool]) -> None:
        self.cached = cached
        self._free = pool.free
        self._free += [pool.take() for _ in range(sum(cached) + (0 if pool.nbytes else 2))]
        self._slots: list[Buffers | None] = [None] * len(cached)
        self._in_slot = True
        self.stream: Buffers = {}
        self.nbytes = pool.nbytes

    def enter(self, step: int) -> Buffers:
        """See BlockCache.enter."""
        self._move_to(self._free.pop(), in_slot=False)
        return self.stream

    def bind(self, block: int) -> tuple[Buffers, bool]:
        """See BlockCache.bind. A block whose output is not cached gets its own input for it."""
        slot = self._slots[block]
        return bindings(self.stream, slot or self.stream, self._free[-1]), slot is not None

    def commit(self, block: int) -> None:
        """See BlockCache.commit."""
        output, slot = self._free.pop(), self._slots[block]
        self._move_to(output, in_slot=self.cached[block])
        if self.cached[block]:
            self._slots[block] = output
            if slot is not None:
                self._free.append(slot)

    def reuse(self, block: int) -> None:
        """See BlockCache.reuse."""
        slot = self._slots[block]
        assert slot is not None, "a block must have run before it can be reused"
        self._move_to(slot, in_slot=True)

    def leave(self) -> None:
        """See BlockCache.leave."""
        self._move_to({}, in_slot=True)

    def _move_to(self, buffers: Buffers, in_slot: bool) -> None:
        """Let `buffers` be the stream; what was it before is free, unless a slot holds it."""
        if not self._in_slot:
            self._free.append(self.stream)
        self.stream, self._in_slot = buffers, in_slot


class FixedOutputCache:
    """Caches block outputs in two slots per block that take turns: 2 S + 1 buffers per stream tensor, or 2 S + 2.

    So a block only ever meets two inputs and two outputs, and four recordings of its kernels serve a whole request.
    """

    def __init__(self, pool: Pool, cached: Sequence[bool]) -> None:
        self.cached = cached
        self._loose = pool.loose(1 if all(cached) else 2)
        self._pairs = [[pool.take(), pool.take()] if wanted else self._loose for wanted in cached]
        self._slots: list[Buffers | None] = [None] * len(cached)
        self._output: Buffers = {}
        self.stream = self._loose[0]
        self.nbytes = pool.nbytes

    def enter(self, step: int) -> Buffers:
        """See BlockCache.enter."""
        self.stream = self._loose[0]
        return self.stream

    def bind(self, block: int) -> tuple[Buffers, bool]:
        """See BlockCache.bind. A block whose output is not cached gets its own input for it."""
        slot = self._slots[block]
        taken = slot if self.cached[block] else self.stream
        self._output = next(buffers for buffers in self._pairs[block] if buffers is not taken)
        return bindings(self.stream, slot or self.stream, self._output), slot is not None

    def commit(self, block: int) -> None:
        """See BlockCache.commit."""
        self.stream = self._output
        if self.cached[block]:
            self._slots[block] = self._output

    def reuse(self, block: int) -> None:
        """See BlockCache.reuse."""
        slot = self._slots[block]
        assert slot is not None, "a block must have run before it can be reused"
        self.stream = slot

    def leave(self) -> None:
        """See BlockCache.leave."""
