"""The stream and the cached block outputs of one request, in a fixed number of buffers.

Blocks write straight into cache slots and the next block reads from there; reusing a block is pointing at its slot.
Both caches have one life: `enter` gives the buffers the prologue writes; then, block by block, either `bind`, run and
`commit`, or `reuse`; at last `stream` is what the epilogue reads. A cache belongs to one request and goes with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ..engines.arrays import Array, Arrays
from ..engines.manifest import Manifest, TensorSpec
from .policies import CacheMode

Buffers = dict[str, Array]


class BlockCache(Protocol):
    """What the loop asks of a cache. Every mapping is from stream name, or graph tensor name, to array."""

    stream: Buffers
    nbytes: int

    def enter(self) -> Buffers:
        """The buffers for the prologue's outputs, which become the stream."""

    def bind(self, block: int) -> tuple[Buffers, bool]:
        """The stream tensors for running a block, and whether its distance will mean anything (not the first time)."""

    def commit(self, block: int) -> None:
        """The block has run: its output is the stream now, and cached."""

    def reuse(self, block: int) -> None:
        """The block's cached output, or the stream plus its cached residual, is the stream now."""


def create_cache(mode: CacheMode, manifest: Manifest, arrays: Arrays, rows: int) -> BlockCache:
    """The cache of one request of that many rows."""
    sizes = {name: largest for name, (_, largest) in manifest.ranges.items()} | {"batch": rows}
    specs = [manifest.blocks[0].output(f"new_{stream}") for stream in manifest.streams]
    cache = OutputCache if mode == "output" else ResidualCache
    return cache(arrays, manifest.streams, specs, sizes, len(manifest.blocks))


class _Pool:
    """Allocates sets of stream buffers and counts their bytes."""

    def __init__(
        self, arrays: Arrays, streams: Sequence[str], specs: Sequence[TensorSpec], sizes: dict[str, int]
    ) -> None:
        self._arrays = arrays
        self._specs = dict(zip(streams, specs, strict=True))
        self._sizes = sizes
        self.nbytes = 0

    def take(self) -> Buffers:
        made = {
            stream: self._arrays.empty(spec.resolve(self._sizes), spec.dtype) for stream, spec in self._specs.items()
        }
        self.nbytes += sum(array.nbytes for array in made.values())
        return made


def _bindings(stream: Buffers, cached: Buffers, new: Buffers) -> Buffers:
    return (
        dict(stream)
        | {f"cached_{name}": array for name, array in cached.items()}
        | {f"new_{name}": array for name, array in new.items()}
    )


class OutputCache:
    """Caches block outputs: L slots, one spare and the prologue's output, L + 2 buffers per stream tensor.

    A block's output goes to the spare, then its old slot becomes the spare; nothing is ever copied.
    """

    def __init__(
        self,
        arrays: Arrays,
        streams: Sequence[str],
        specs: Sequence[TensorSpec],
        sizes: dict[str, int],
        blocks: int,
    ) -> None:
        pool = _Pool(arrays, streams, specs, sizes)
        self._entry = pool.take()
        self._spare = pool.take()
        self._slots = [pool.take() for _ in range(blocks)]
        self._filled = [False] * blocks
        self.stream = self._entry
        self.nbytes = pool.nbytes

    def enter(self) -> Buffers:
        """See BlockCache.enter."""
        self.stream = self._entry
        return self._entry

    def bind(self, block: int) -> tuple[Buffers, bool]:
        """See BlockCache.bind. A block that never ran gets its own input as cached output."""
        known = self._filled[block]
        return _bindings(self.stream, self._slots[block] if known else self.stream, self._spare), known

    def commit(self, block: int) -> None:
        """See BlockCache.commit."""
        self._slots[block], self._spare = self._spare, self._slots[block]
        self._filled[block] = True
        self.stream = self._slots[block]

    def reuse(self, block: int) -> None:
        """See BlockCache.reuse."""
        assert self._filled[block], "a block must have run before it can be reused"
        self.stream = self._slots[block]


class ResidualCache:
    """Caches what blocks add to the stream: L slots and three stream buffers, L + 3 per stream tensor.

    A block is given the stream plus its cached residual as its cached output, which is just what reusing it would
    have handed on. So its distance is the change of its residual, and the very error that reuse would have made, by
    the same graph.
    """

    def __init__(
        self,
        arrays: Arrays,
        streams: Sequence[str],
        specs: Sequence[TensorSpec],
        sizes: dict[str, int],
        blocks: int,
    ) -> None:
        pool = _Pool(arrays, streams, specs, sizes)
        self._xp = arrays.xp
        self._predicted = pool.take()
        self._next = pool.take()
        self._residuals = [pool.take() for _ in range(blocks)]
        self._filled = [False] * blocks
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
        self._filled[block] = True
        self.stream, self._next = self._next, self.stream

    def reuse(self, block: int) -> None:
        """See BlockCache.reuse."""
        assert self._filled[block], "a block must have run before it can be reused"
        self._add_residual(block, self.stream)

    def _add_residual(self, block: int, out: Buffers) -> None:
        for name, residual in self._residuals[block].items():
            self._xp.add(self.stream[name], residual, out=out[name])
