"""What a pipeline tells of a request's steps before there is one: methods of VideoPipeline."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .pipeline import VideoPipeline


def turns(pipeline: VideoPipeline, steps: int) -> list[range]:
    """Of a request of so many steps, those of each transformer; some may have none. Raises InvalidRequest."""
    below = [expert.below for expert in pipeline.manifest.later_experts]
    return pipeline._table.schedule(steps).turns(below)


def draws_noise(pipeline: VideoPipeline, steps: int) -> bool:
    """Whether the sampler adds noise, drawn from a request's seeds, after the first. Raises InvalidRequest."""
    return bool(pipeline._table.schedule(steps).noise_coefficients.any())


def can_forecast(pipeline: VideoPipeline, steps: int) -> bool:
    """Whether the sampler tells how much signal its samples hold, which forecasts need. Raises InvalidRequest."""
    return all(map(math.isfinite, pipeline._table.schedule(steps).signal_scales))
