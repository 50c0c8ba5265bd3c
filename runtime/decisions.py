"""What a step does with each block, and what it measures: the words that policies, caches, loop and trace share."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

# The mean squared change of a block, one number per prompt of the batch.
Distance: TypeAlias = Sequence[float]


class Decision(enum.Enum):
    """What a step does with a block."""

    COMPUTE = "computed"
    REUSE = "reused"
    DEAD = "dead"  # its output would be replaced further on, so nothing depends on whether it runs
    FORECAST = "forecast"  # no engine runs in the whole step: the model's output is made of earlier ones


@dataclass(frozen=True)
class Measure:
    """A block's last measured change and the limit up to which it may be reused, of the batch's worst prompt."""

    metric: float
    limit: float
