"""The stream and the cached block outputs of one request, in a fixed number of buffers.

Blocks write straight into cache slots and the next block reads from there; reusing a block is pointing at its slot.
All caches have one life: `enter` gives the buffers the prologue writes; then, block by block, either `bind`, run and
`commit`, or `reuse`; at last `stream` is what the epilogue reads. A cache belongs to one request and goes with it.
Which blocks have a slot is said when a cache is made, see budget.py; the others are run every time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..engines.arrays import Array, Arrays
from ..engines.manifest import Manifest, TensorSpec
from .policies import CacheMode

Buffers = dict[str, Array]


class BlockCache(Protocol):
    """What the loop asks of a cache. Every mapping is from stream name, or graph tensor name, to array.

    `cached` says per block whether there is a slot for its output; `nbytes` is what all buffers take.
    """

    cached: Sequence[bool]
    stream: Buffers
    nbytes: int

    def enter(self) -> Buffers:
        """The buffers for the prologue's outputs, which become the stream."""

    def bind(self, block: int) -> tuple[Buffers, bool]:
        """The stream tensors for running a block, and whether its distance will mean anything (not the first time)."""

    def commit(self, block: int) -> None:
        """The block has run: its output is the stream now, and cached if it has a slot."""

    def reuse(self, block: int) -> None:
        """The block's cached output, or the stream plus its cached residual, is the stream now."""


@dataclass(frozen=True)
class Layout:
    """How a cache of some mode is laid out. `fixed`: every block has addresses of its own, as CUDA graphs need them."""

    mode: CacheMode = "output"
    fixed: bool = False

    def buffers(self, blocks: int, slots: int) -> int:
        """How many buffers per stream tensor a cache has that keeps the outputs of `slots` of `blocks`."""
        if self.mode == "residual":
            return slots + (3 if slots else 2)
        if self.fixed:
            return 2 * slots + (1 if slots == blocks else 2)
        return slots + 2

    def slots(self, blocks: int, buffers: int) -> int:
        """The most slots that so many buffers allow; -1 where they are too few to run at all."""
        return max((count for count in range(blocks + 1) if self.buffers(blocks, count) <= buffers), default=-1)


def create_cache(layout: Layout, manifest: Manifest, arrays: Arrays, rows: int, cached: Sequence[bool]) -> BlockCache:
    """The cache of one request of that many rows, with slots for the blocks that are `cached`."""
    sizes = {name: largest for name, (_, largest) in manifest.ranges.items()} | {"batch": rows}
    specs = {stream: manifest.blocks[0].output(f"new_{stream}") for stream in manifest.streams}
    pool = Pool(arrays, specs, sizes)
    if layout.mode == "residual":
        return ResidualCache(pool, cached)
    return FixedOutputCache(pool, cached) if layout.fixed else OutputCache(pool, cached)


class Pool:
    """Allocates sets of stream buffers and counts their bytes."""

    def __init__(self, arrays: Arrays, specs: dict[str, TensorSpec], sizes: dict[str, int]) -> None:
        self.xp: Any = arrays.xp
        self.nbytes = 0
        self._empty: Callable[[tuple[int, ...], str], Array] = arrays.empty
        self._specs = {stream: (spec.resolve(sizes), spec.dtype) for stream, spec in specs.items()}

    def take(self) -> Buffers:
        """One buffer per stream tensor, uninitialised."""
        made = {stream: self._empty(shape, dtype) for stream, (shape, dtype) in self._specs.items()}
        self.nbytes += sum(array.nbytes for array in made.values())
        return made


def _bindings(stream: Buffers, cached: Buffers, new: Buffers) -> Buffers:
    return (
        dict(stream)
        | {f"cached_{name}": array for name, array in cached.items()}
        | {f"new_{name}": array for name, array in new.items()}
    )


class OutputCache:
    """Caches block outputs in slots that rotate: S slots and two more buffers per stream tensor.

    A block's output goes to a free buffer, which becomes its slot; then its old slot is free. Nothing is ever copied.
    """

    def __init__(self, pool: Pool, cached: Sequence[bool]) -> None:
        self.cached = cached
        self._free = [pool.take() for _ in range(sum(cached) + 2)]
        self._slots: list[Buffers | None] = [None] * len(cached)
        self._in_slot = True
        self.stream: Buffers = {}
        self.nbytes = pool.nbytes

    def enter(self) -> Buffers:
        """See BlockCache.enter."""
        self._move_to(self._free.pop(), in_slot=False)
        return self.stream

    def bind(self, block: int) -> tuple[Buffers, bool]:
        """See BlockCache.bind. A block whose output is not cached gets its own input for it."""
        slot = self._slots[block]
        return _bindings(self.stream, slot or self.stream, self._free[-1]), slot is not None

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
        self._loose = [pool.take() for _ in range(1 if all(cached) else 2)]
        self._pairs = [[pool.take(), pool.take()] if wanted else self._loose for wanted in cached]
        self._slots: list[Buffers | None] = [None] * len(cached)
        self._output: Buffers = {}
        self.stream = self._loose[0]
        self.nbytes = pool.nbytes

    def enter(self) -> Buffers:
        """See BlockCache.enter."""
        self.stream = self._loose[0]
        return self.stream

    def bind(self, block: int) -> tuple[Buffers, bool]:
        """See BlockCache.bind. A block whose output is not cached gets its own input for it."""
        slot = self._slots[block]
        taken = slot if self.cached[block] else self.stream
        self._output = next(buffers for buffers in self._pairs[block] if buffers is not taken)
        return _bindings(self.stream, slot or self.stream, self._output), slot is not None

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


class ResidualCache:
    """Caches what blocks add to the stream: S slots and three stream buffers per stream tensor, two without slots.

    A block is given the stream plus its cached residual as its cached output, which is just what reusing it would
    have handed on. So its distance is the change of its residual, and the very error that reuse would have made, by
    the same graph. The addresses that a block meets are few and fixed.
    """

    def __init__(self, pool: Pool, cached: Sequence[bool]) -> None:
        self.cached = cached
        self._xp = pool.xp
        self._predicted = pool.take() if any(cached) else {}
        self._next = pool.take()
        self._residuals = [pool.take() if wanted else {} for wanted in cached]
        self._filled = [False] * len(cached)
        self.stream = pool.take()
        self.nbytes = pool.nbytes

    def enter(self) -> Buffers:
        """See BlockCache.enter."""
        return self.stream

    def bind(self, block: int) -> tuple[Buffers, bool]:
        """See BlockCache.bind."""
        known = self._filled[block]
        if known:
            self._add_residual(block, self._predicted)
        return _bindings(self.stream, self._predicted if known else self.stream, self._next), known

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

    def _add_residual(self, block: int, out: Buffers) -> None:
        for name, residual in self._residuals[block].items():
            self._xp.add(self.stream[name], residual, out=out[name])
