"""Schedule: which steps run is known beforehand; the model output of the others is foretold from those before."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ...engines.errors import InvalidRequest, quoted
from ...engines.wording import plural
from .base import Calibration, Context, Decider, Policy
from .extrapolation import KEPT, extrapolation

RANGE = re.compile(r"(\d{1,4})(?:-(\d{1,4}))?")


@dataclass(frozen=True)
class FixedSchedule(Policy):
    """The steps of `computed` run, and no engine in the others, whose output is forecast as `Forecast` does.

    `computed` counts from 1, such as `1-10 13 17 50`: the first three steps and the last one are among them. The
    schedule is one for as many steps as its last number says, and for no others; without any, all steps run. Where
    transformers take turns, the first three steps of each run, whether they are named or not. Nothing that a request
    measures changes it. Cached are three arrays of the latents' size, and no block.
    """

    name: ClassVar[str] = "schedule"
    outputs: ClassVar[int] = KEPT
    calibrates: ClassVar[bool] = True
    computed: str = field(default="", metadata={"help": "Steps that run, such as '1-10 13 17 50'.", "default": "all"})

    def __post_init__(self) -> None:
        steps = _steps_of(self.computed)
        if steps is None or (steps and steps[:KEPT] != [1, 2, 3]):
            raise InvalidRequest(
                f"computed: got {quoted(self.computed)}, expected rising numbers of steps or ranges of them, with "
                "blanks between, from 1-3 on, such as '1-10 13 17 50'"
            )

    def warmup_steps(self, steps: int) -> int:
        """See Policy.warmup_steps."""
        return min(KEPT, steps)

    def may_reuse(self, steps: int) -> bool:
        """See Policy.may_reuse."""
        return len(_steps_of(self.computed) or range(steps)) < steps

    def reusable(self, kinds: Sequence[str]) -> tuple[bool, ...]:
        """See Policy.reusable."""
        return (False,) * len(kinds)

    def begin(self, context: Context) -> Decider:
        """See Policy.begin. Raises InvalidRequest for another number of steps than the schedule's."""
        steps = _steps_of(self.computed) or []
        if steps and steps[-1] != context.schedule.steps:
            raise InvalidRequest(
                f"computed: got a schedule for {plural(steps[-1], 'step')}, expected one for {context.schedule.steps}; "
                "tune one for that number"
            )
        return _Follower(frozenset(step - 1 - context.before for step in steps), context)

    def describe(self, steps: int) -> str:
        """See Policy.describe."""
        run = _steps_of(self.computed) or range(1, steps + 1)
        return (
            f"{self.name}: {len(run)} of {run[-1]} steps run, the others are forecast; the last three model outputs "
            "are cached"
        )

    def calibrate(self, calibration: Calibration, warmup: int = KEPT) -> dict[int, Policy]:
        """For every number of steps that run, the ones that lead to the least error; see shortest.py."""
        from .shortest import shortest_paths  # needs numpy, which command lines do without

        paths = shortest_paths(calibration, max(KEPT, warmup))
        return {len(path): FixedSchedule(_text_of(step + 1 for step in path)) for path in paths}


class _Follower(Decider):
    def __init__(self, computed: frozenset[int], context: Context) -> None:
        super().__init__(context)
        self._planned = computed or frozenset(range(context.steps))
        self._times = [float(time) for time in context.timesteps]
        self._computed: list[int] = []  # the last few steps, newest first

    def forecast(self, step: int) -> Sequence[float] | None:
        if step in self._planned:
            return None
        return extrapolation([self._times[computed] for computed in self._computed], self._times[step])

    def expected(self, step: int) -> Sequence[float] | None:
        self._computed = [step, *self._computed][:KEPT]
        return None


def _steps_of(text: Any) -> list[int] | None:
    """The steps that a text names; None where it is none."""
    if not isinstance(text, str):
        return None
    steps: list[int] = []
    for piece in text.split():
        match = RANGE.fullmatch(piece)
        if match is None:
            return None
        first, last = int(match[1]), int(match[2] or match[1])
        if not (steps[-1] if steps else 0) < first <= last:
            return None
        steps += range(first, last + 1)
    return steps


def _text_of(steps: Iterable[int]) -> str:
    """The shortest text that names these steps."""
    ranges: list[list[int]] = []
    for step in steps:
        if ranges and ranges[-1][1] == step - 1:
            ranges[-1][1] = step
        else:
            ranges.append([step, step])
    return " ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in ranges)
