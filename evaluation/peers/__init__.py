"""Other people's caches, a row each: what a benchmark holds this package against.

They are optional, and imported when they are used: `pip install foresight-engines[peers]`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

from ..bench import Contender, Make
from ..machine import version_of
from ..outcome import Unavailable
from .adapters import IN_CONTEXT, IN_ONE_LIST, WITH_STEPS
from .base import Loaded, Peer, Settings
from .cache_dit import dbcache
from .diffusers_caches import (
    compiled,
    faster_cache,
    first_block_cache,
    mag_cache,
    pyramid_attention_broadcast,
    sea_cache,
    taylorseer,
    uncached,
)

__all__ = ["PEERS", "REFERENCE", "Loaded", "Peer", "contenders_of", "without_pipeline"]

_DIFFUSERS = ("torch", "diffusers", "transformers")
_CACHE_DIT = (*_DIFFUSERS, "cache-dit")
REFERENCE = Peer("diffusers", _DIFFUSERS, uncached)
_ROWS = (
    REFERENCE,
    Peer("torch-compile", _DIFFUSERS, compiled, optional=True),
    Peer(
        "taylorseer",
        _DIFFUSERS,
        taylorseer,
        ({"interval": 2, "order": 2}, {"interval": 3, "order": 2}),
        (IN_CONTEXT,),
    ),
    Peer(
        "first-block-cache",
        _DIFFUSERS,
        first_block_cache,
        ({"threshold": 0.03}, {"threshold": 0.05}, {"threshold": 0.08}),
        (IN_CONTEXT, IN_ONE_LIST),
    ),
    Peer("mag-cache", _DIFFUSERS, mag_cache, ({}, {"threshold": 0.01}), (IN_CONTEXT, IN_ONE_LIST)),
    Peer("pab", _DIFFUSERS, pyramid_attention_broadcast, ({"skip": 2},)),
    Peer("faster-cache", _DIFFUSERS, faster_cache, ({"alpha": 1.0},)),
    Peer("sea-cache", _DIFFUSERS, sea_cache, ({"threshold": 0.1}, {"threshold": 0.25}), (WITH_STEPS, IN_ONE_LIST)),
    Peer(
        "cache-dit",
        _CACHE_DIT,
        dbcache,
        ({"threshold": 0.05}, {"threshold": 0.05, "order": 1}, {"threshold": 0.08, "order": 2}),
        (IN_CONTEXT, IN_ONE_LIST),
    ),
)
PEERS = {peer.name: peer for peer in _ROWS}


def contenders_of(peers: Sequence[Peer], loaded: Loaded) -> tuple[list[Contender], list[Unavailable]]:
    """Every variant of these peers, held against the pipeline without a cache; and those that are not installed."""
    found, missing = [], []
    for peer in peers:
        lacking = [name for name in peer.needs if version_of(name) is None]
        if lacking:
            missing.append(Unavailable(peer.name, _not_installed(lacking)))
            continue
        told = "; ".join(adapter.told for adapter in peer.adapters if adapter.needed(loaded.pipeline))
        found += [
            Contender(_name(peer, settings), REFERENCE.name, partial(_switched, peer, settings, loaded), adapted=told)
            for settings in peer.variants
        ]
    return found, missing


def without_pipeline(peers: Sequence[Peer], reason: str) -> list[Unavailable]:
    """All of them, for there is no pipeline that they could run in."""
    return [Unavailable(peer.name, reason) for peer in peers]


@contextmanager
def _switched(peer: Peer, settings: Settings, loaded: Loaded) -> Iterator[Make]:
    with ExitStack() as stack:
        for adapter in peer.adapters:
            if adapter.needed(loaded.pipeline):
                stack.enter_context(adapter.applied(loaded.pipeline))
        stack.enter_context(peer.switch(loaded, settings))
        yield loaded.pipeline.make


def _name(peer: Peer, settings: Settings) -> str:
    """As policies are written: the name, and what was set."""
    return f"{peer.name}:{','.join(f'{name}={value:g}' for name, value in settings.items())}" if settings else peer.name


def _not_installed(distributions: Sequence[str]) -> str:
    return f"{', '.join(distributions)} not installed; pip install foresight-engines[peers]"
