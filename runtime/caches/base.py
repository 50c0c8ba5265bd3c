"""The stream and the cached blocks of one request, in a fixed number of buffers.

Blocks write straight into cache slots and the next block reads from there; reusing a block is pointing at its slot.
All caches have one life: in every step that runs, `enter` gives the buffers the prologue writes; then, block by block,
either `bind`, run and `commit`, or `reuse`; at last `stream` is what the epilogue reads, and `leave` ends the step. A
cache belongs to one request and goes with it. Where a request's rows go through the blocks in several passes, each has
a cache of its own, and they share what no slot holds. Which blocks have a slot is said when a cache is made, see
runtime/budget.py; the others always run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from ..decisions import Decision

if TYPE_CHECKING:
    from ...engines.arrays import Array, Arrays
    from ...engines.manifest import TensorSpec

Buffers: TypeAlias = "dict[str, Array]"


class BlockCache(Protocol):
    """What the loop asks of a cache. Every mapping is from stream name, or graph tensor name, to array.

    `cached` says per block whether there is a slot for its output; `nbytes` is what all buffers take.
    """

    cached: Sequence[bool]
    stream: Buffers
    nbytes: int

    def enter(self, step: int) -> Buffers:
        """The buffers for the prologue's outputs in that step, which become the stream."""

    def bind(self, block: int) -> tuple[Buffers, bool]:
        """The stream tensors for running a block, and whether its distance will mean anything (not the first time)."""

    def commit(self, block: int) -> None:
        """The block has run: its output is the stream now, and cached if it has a slot."""

    def reuse(self, block: int) -> None:
        """What is cached of the block makes the stream what it would be if the block had run."""

    def leave(self) -> None:
        """The stream has been read: buffers that no slot holds may serve another cache of the pool."""


class CacheMode(Protocol):
    """What is kept of a block. One object a mode, without state.

    `words` say what is cached, `measured` what a block's distance is the change of: both for reports.
    """

    name: str
    words: str
    measured: str

    def buffers(self, blocks: int, slots: int, fixed: bool, passes: int) -> int:
        """How many buffers per stream tensor caches have that keep `slots` of `blocks`; see Layout for the others."""

    def create(self, pool: Pool, cached: Sequence[bool], fixed: bool) -> BlockCache:
        """The cache of one request."""

    def eliminate_dead(self, decisions: Sequence[Decision]) -> list[Decision]:
        """The same decisions, with those blocks dead whose output nothing would read."""

    def spared(self, reused: Collection[int]) -> int:
        """How many blocks need not run in a step that reuses these."""


@dataclass(frozen=True)
class Layout:
    """How a request's caches are laid out. `fixed`: every block has addresses of its own, as CUDA graphs need them.

    `passes` is how many caches there are: one, or one for each pass of a request's rows through the blocks.
    """

    mode: CacheMode
    fixed: bool = False
    passes: int = 1

    def buffers(self, blocks: int, slots: int) -> int:
        """How many buffers per stream tensor all caches have together that keep `slots` of `blocks`."""
        return self.mode.buffers(blocks, slots, self.fixed, self.passes)

    def slots(self, blocks: int, buffers: int) -> int:
        """The most slots that so many buffers allow; -1 where they are too few to run at all."""
        return max((count for count in range(blocks + 1) if self.buffers(blocks, count) <= buffers), default=-1)


class Pool:
    """Allocates sets of stream buffers and counts their bytes.

    `free` are those that any of its caches may take and give back; `loose` ones are the same for all.
    """

    def __init__(self, arrays: Arrays, specs: dict[str, TensorSpec], sizes: dict[str, int]) -> None:
        self.xp: Any = arrays.xp
        self.nbytes = 0
        self.free: list[Buffers] = []
        self._loose: list[Buffers] = []
        self._empty: Callable[[tuple[int, ...], str], Array] = arrays.empty
        self._specs = {stream: (spec.resolve(sizes), spec.dtype) for stream, spec in specs.items()}

    def take(self) -> Buffers:
        """One buffer per stream tensor, uninitialised."""
        made = {stream: self._empty(shape, dtype) for stream, (shape, dtype) in self._specs.items()}
        self.nbytes += sum(array.nbytes for array in made.values())
        return made

    def loose(self, count: int) -> list[Buffers]:
        """So many sets whose content no cache relies on from one step to the next."""
        self._loose += [self.take() for _ in range(count - len(self._loose))]
        return self._loose[:count]


def bindings(stream: Buffers, cached: Buffers, new: Buffers) -> Buffers:
    """A block's inputs and outputs by their names in its graph."""
    return (
        dict(stream)
        | {f"cached_{name}": array for name, array in cached.items()}
        | {f"new_{name}": array for name, array in new.items()}
    )
