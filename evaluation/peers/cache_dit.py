"""cache-dit's DBCache, with and without its TaylorSeer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .base import Loaded, Settings
from .diffusers_caches import warm_up


@contextmanager
def dbcache(loaded: Loaded, settings: Settings) -> Iterator[None]:
    """It changes the pipeline's class, so the pipeline has one of its own meanwhile."""
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")
    import cache_dit

    pipeline = loaded.pipeline.pipeline
    original = type(pipeline)
    pipeline.__class__ = type(original.__name__, (original,), {"__module__": original.__module__})
    order = settings.get("order")
    target = _target(loaded)
    try:
        cache_dit.enable_cache(
            target,
            cache_config=cache_dit.DBCacheConfig(
                Fn_compute_blocks=1,
                Bn_compute_blocks=0,
                max_warmup_steps=warm_up(loaded),
                residual_diff_threshold=settings["threshold"],
                num_inference_steps=loaded.steps,
            ),
            calibrator_config=order and cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order),
        )
        try:
            yield
        finally:
            cache_dit.disable_cache(pipeline)
    finally:
        pipeline.__class__ = original


def _target(loaded: Loaded) -> Any:
    """The pipeline, or its blocks where it is none that cache-dit knows."""
    import cache_dit

    pipeline = loaded.pipeline.pipeline
    if not loaded.pipeline.options:
        return pipeline
    return cache_dit.BlockAdapter(
        pipe=pipeline,
        transformer=pipeline.transformer,
        blocks=pipeline.transformer.transformer_blocks,
        forward_pattern=cache_dit.ForwardPattern.Pattern_2,
        check_forward_pattern=False,
    )
