"""What is cached of blocks: one file and one registry row a mode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...engines.errors import InvalidRequest, quoted
from .base import BlockCache, CacheMode, Layout, Pool
from .output import OutputMode
from .residual import ResidualMode

if TYPE_CHECKING:
    from ...engines.arrays import Arrays
    from ...engines.manifest import Manifest

__all__ = ["CACHE_MODES", "BlockCache", "CacheMode", "Layout", "Pool", "create_caches", "find_mode"]

_ROWS: tuple[CacheMode, ...] = (OutputMode(), ResidualMode())
CACHE_MODES = {mode.name: mode for mode in _ROWS}


def find_mode(name: str) -> CacheMode:
    """The mode of that name. Raises InvalidRequest."""
    if not isinstance(name, str) or name not in CACHE_MODES:
        raise InvalidRequest(f"cache: got {quoted(name)}, expected {' or '.join(CACHE_MODES)}")
    return CACHE_MODES[name]


def create_caches(
    layout: Layout, manifest: Manifest, arrays: Arrays, rows: int, cached: Sequence[bool]
) -> list[BlockCache]:
    """The caches of one request of that many rows, one a pass, with slots for the blocks that are `cached`."""
    sizes = manifest.largest(batch=rows // layout.passes)
    specs = {stream: manifest.blocks[0].output(f"new_{stream}") for stream in manifest.streams}
    pool = Pool(arrays, specs, sizes)
    return [layout.mode.create(pool, cached, layout.fixed) for _ in range(layout.passes)]
