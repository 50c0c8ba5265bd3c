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


def fewest_steps(pipeline: VideoPipeline) -> int:
    """Of a request in which all transformers have some that do with the most."""
    table = pipeline._table
    wanted = [number for number, turn in enumerate(turns(pipeline, table.max_steps)) if turn]

    def are_enough(steps: int) -> bool:
        having = turns(pipeline, steps)
        return all(having[number] for number in wanted)

    return next(filter(are_enough, range(table.min_steps, table.max_steps + 1)))


def draws_noise(pipeline: VideoPipeline, steps: int) -> bool:
    """Whether the sampler adds noise, drawn from a request's seeds, after the first. Raises InvalidRequest."""
    return bool(pipeline._table.schedule(steps).noise_coefficients.any())


def can_forecast(pipeline: VideoPipeline, steps: int) -> bool:
    """Whether the sampler tells how much signal its samples hold, which forecasts need. Raises InvalidRequest."""
    return all(map(math.isfinite, pipeline._table.schedule(steps).signal_scales))
