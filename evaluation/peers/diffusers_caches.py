"""The caches that diffusers ships: TaylorSeer, FirstBlockCache, MagCache, PAB, FasterCache, SeaCache."""

from __future__ import annotations

import ast
import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from copy import deepcopy
from dataclasses import replace
from typing import Any

from .adapters import around_calls
from .base import Loaded, Settings

WARM_UP_SHARE = 0.2  # of the steps; with fewer, some videos become others, see docs/bench.md
RATIOS = "mag_ratios"
COMPILED = "compiled"


@contextmanager
def uncached(loaded: Loaded, settings: Settings) -> Iterator[None]:
    """The pipeline as it is."""
    yield


@contextmanager
def compiled(loaded: Loaded, settings: Settings) -> Iterator[None]:
    """A copy of the transformer, compiled when it is first called, as what is hooked meanwhile is compiled anew."""
    import torch

    pipeline, eager = loaded.pipeline.pipeline, loaded.pipeline.transformer
    if COMPILED not in loaded.kept:
        loaded.kept[COMPILED] = torch.compile(_without_hooks(deepcopy(eager)))
    pipeline.transformer = loaded.kept[COMPILED]
    try:
        yield
    finally:
        pipeline.transformer = eager


@contextmanager
def taylorseer(loaded: Loaded, settings: Settings) -> Iterator[None]:
    """Its lite form: the model's output alone is cached, and extrapolated; its other form hooks no model's blocks."""
    import diffusers
    import torch

    config = diffusers.TaylorSeerCacheConfig(
        cache_interval=settings["interval"],
        max_order=settings["order"],
        disable_cache_before_step=warm_up(loaded),
        taylor_factors_dtype=torch.float32,
        use_lite_mode=True,
    )
    with enabled(loaded, config):
        yield


@contextmanager
def first_block_cache(loaded: Loaded, settings: Settings) -> Iterator[None]:
    """All blocks but the first are spared where that one changed little."""
    import diffusers

    with enabled(loaded, diffusers.FirstBlockCacheConfig(**settings)):
        yield


@contextmanager
def mag_cache(loaded: Loaded, settings: Settings) -> Iterator[None]:
    """Its ratios are what it measured itself, on requests of no pair."""
    import diffusers

    if RATIOS not in loaded.kept:
        loaded.kept[RATIOS] = _calibrated(loaded)
    config = diffusers.MagCacheConfig(**settings, num_inference_steps=loaded.steps, mag_ratios=loaded.kept[RATIOS])
    with enabled(loaded, config):
        yield


@contextmanager
def pyramid_attention_broadcast(loaded: Loaded, settings: Settings) -> Iterator[None]:
    """Attention is reused within a range of timesteps; temporal attention where the model has it."""
    import diffusers

    config = diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=settings["skip"],
        temporal_attention_block_skip_range=settings["skip"],
        cross_attention_block_skip_range=settings["skip"],
        current_timestep_callback=lambda: loaded.pipeline.pipeline.current_timestep,
    )
    with enabled(loaded, config):
        yield


@contextmanager
def faster_cache(loaded: Loaded, settings: Settings) -> Iterator[None]:
    """Attention is reused, and the negative half is made of the other one; the low and high frequencies as they are."""
    import diffusers

    channels_first = loaded.others[0].latents.shape[0] == loaded.pipeline.transformer.config.in_channels
    config = diffusers.FasterCacheConfig(
        temporal_attention_block_skip_range=2,
        alpha_low_frequency=settings["alpha"],
        alpha_high_frequency=settings["alpha"],
        attention_weight_callback=lambda module: 0.5,
        tensor_format="BCFHW" if channels_first else "BFCHW",
        current_timestep_callback=lambda: loaded.pipeline.pipeline.current_timestep,
    )
    with enabled(loaded, config):
        yield


@contextmanager
def sea_cache(loaded: Loaded, settings: Settings) -> Iterator[None]:
    """Needs to be told the latents, step and noise level of every call, which no pipeline here does."""
    import diffusers

    transformer, calls = loaded.pipeline.transformer, Calls(loaded.pipeline.pipeline.scheduler)
    channels_first = loaded.others[0].latents.shape[0] == transformer.config.in_channels

    def latents(module: Any, arguments: Any, named: dict[str, Any]) -> list[Any]:
        rows = named["hidden_states"]
        return list((rows if channels_first else rows.transpose(1, 2)).unbind(0))

    def context(named: dict[str, Any]) -> Any:
        name, step = calls.next(named["timestep"].flatten()[0])
        return transformer.cache_context(
            name, step_index=step, num_inference_steps=loaded.steps, sigma=calls.noise(step)
        )

    config = diffusers.SeaCacheConfig(**settings, retention_steps=warm_up(loaded), raw_vision_callback=latents)
    with around_calls(transformer, context), enabled(loaded, config):
        yield


class Calls:
    """Which call of the transformer comes next: pipelines make one a step for both halves of guidance, or one each."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._last: tuple[int, int] = -1, 0  # step, and how many calls it had

    def next(self, timestep: Any) -> tuple[str, int]:
        """The name of what the call's state belongs to, and its step."""
        step = int((self._scheduler.timesteps == timestep).nonzero()[0])
        before, count = self._last
        self._last = step, count + 1 if step == before else 1
        return f"call {self._last[1]}", step

    def noise(self, step: int) -> float:
        """The share of noise in a step's latents, from 0 to 1."""
        scheduler = self._scheduler
        if getattr(scheduler.config, "use_flow_sigmas", False):
            return float(scheduler.sigmas[step])
        signal = float(scheduler.alphas_cumprod[int(scheduler.timesteps[step])]) ** 0.5
        noise = (1 - signal**2) ** 0.5
        return float(noise / (signal + noise))


@contextmanager
def enabled(loaded: Loaded, config: Any) -> Iterator[None]:
    """A cache of diffusers is on."""
    transformer = loaded.pipeline.transformer
    transformer.enable_cache(config)
    try:
        yield
    finally:
        transformer.disable_cache()


def warm_up(loaded: Loaded) -> int:
    """Steps before any reuse, for those that are told a number."""
    return math.ceil(WARM_UP_SHARE * loaded.steps)


def _without_hooks(transformer: Any) -> Any:
    """It, with nothing that counts: that would break its graphs."""
    for module in transformer.modules():
        module._forward_pre_hooks.clear()
    return transformer


def _calibrated(loaded: Loaded) -> list[float]:
    """MagCache prints what it measured, a list a request, and keeps it nowhere."""
    import diffusers

    config = diffusers.MagCacheConfig(calibrate=True, num_inference_steps=loaded.steps)
    printed = io.StringIO()
    with redirect_stdout(printed), enabled(loaded, config):
        for task in loaded.others:
            loaded.pipeline.make(replace(task, steps=loaded.steps))
    lines = [line for line in printed.getvalue().splitlines() if line.startswith("[") and line.endswith("]")]
    return _means([ast.literal_eval(line) for line in lines])


def _means(lists: Sequence[Sequence[float]]) -> list[float]:
    return [sum(numbers) / len(numbers) for numbers in zip(*lists, strict=True)]
