"""The model output of a step foretold from the last three that were computed."""

from __future__ import annotations

from collections.abc import Sequence

KEPT = 3  # outputs that a forecast is made of
CURVE = 0.5  # of the second-order term: all of it overshoots


def extrapolation(times: Sequence[float], time: float) -> tuple[float, float, float] | None:
    """The weights of the last three outputs, newest first, that were computed at `times`, in the forecast at `time`.

    Newton's divided differences, half of the second order. None where there are fewer outputs, or two at one timestep.
    """
    if len(times) < KEPT or len({*times, time}) < KEPT + 1:
        return None
    u0, u1, u2 = times
    line, curve = time - u0, CURVE * (time - u0) * (time - u1) / (u0 - u2)
    newest = 1 + line / (u0 - u1) + curve / (u0 - u1)
    middle = -line / (u0 - u1) - curve / (u0 - u1) - curve / (u1 - u2)
    return newest, middle, curve / (u1 - u2)
