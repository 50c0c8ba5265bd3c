"""LeMiCa, arXiv 2511.00090: the schedule whose worst stretch of skipped steps costs least, found beforehand.

Of two schedules with as many steps that run, the better one has the cheaper worst stretch; where these are alike, the
cheaper second one, and so on. Published is that the cost of a stretch is measured, by skipping it alone and looking at
the last latents; here it is told from the recorded outputs and the sampler's table, to first order, as for `schedule`,
which adds costs up where this takes the worst.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from benchmarks.rules.steps import WholeSteps, stand_in
from foresight.engines.arrays import Array
from foresight.runtime.policies import Context, Decider
from foresight.runtime.policies.base import Calibration
from foresight.runtime.policies.extrapolation import KEPT
from foresight.runtime.policies.shortest import FARTHEST

State = tuple[int, ...]  # the last steps that run, oldest first
Costs = list[float]  # of the stretches so far, negative, the worst first: the less, the worse


@dataclass(frozen=True)
class LeMiCa(WholeSteps):
    """`computed` are the steps that run, from 0."""

    computed: tuple[int, ...]
    extrapolates: bool
    name: ClassVar[str] = "lemica"

    def begin(self, context: Context) -> Decider:
        """See Policy.begin."""
        return _Follower(self, context)


class _Follower(Decider):
    def __init__(self, policy: LeMiCa, context: Context) -> None:
        super().__init__(context)
        self._policy = policy
        self._times = [float(time) for time in context.timesteps]
        self._computed: list[int] = []

    def forecast(self, step: int) -> Sequence[float] | None:
        if step in self._policy.computed:
            return None
        return stand_in(self._computed, step, self._times, self._policy.extrapolates)

    def see(self, step: int, output: Array) -> None:
        self._computed = [step, *self._computed][:KEPT]


def minimax_schedules(calibration: Calibration, extrapolates: bool) -> Mapping[int, LeMiCa]:
    """By how many steps run."""
    steps, memory = calibration.schedule.steps, KEPT if extrapolates else 1
    begin = tuple(range(KEPT))
    best: dict[tuple[State, int], tuple[Costs, State]] = {(begin[-memory:], KEPT): ([], begin)}
    cost_of = _cost_of(calibration, extrapolates)
    for newest in range(KEPT - 1, steps - 1):
        here = [(key, value) for key, value in best.items() if key[0][-1] == newest]
        stretches = {state: _stretches(state, steps, cost_of) for state in {key[0] for key, _ in here}}
        for (state, count), (costs, path) in here:
            for end, cost in stretches[state]:
                reached = [*costs]
                insort(reached, -cost)
                key = ((*state, end)[-memory:], count + 1)
                if key not in best or reached > best[key][0]:
                    best[key] = reached, (*path, end)
    ends: dict[int, tuple[Costs, State]] = {}
    for (state, count), found in best.items():
        if state[-1] == steps - 1 and (count not in ends or found[0] > ends[count][0]):
            ends[count] = found
    return {count: LeMiCa(path, extrapolates) for count, (_, path) in ends.items()}


def _stretches(state: State, steps: int, cost_of: Callable[[State, int], float]) -> list[tuple[int, float]]:
    """Every next step that runs, with the cost of skipping those before it."""
    found, cost = [], 0.0
    for end in range(state[-1] + 1, min(state[-1] + FARTHEST, steps - 1) + 1):
        if end > state[-1] + 1:
            cost += cost_of(state, end - 1)
        if math.isfinite(cost):
            found.append((end, cost))
    return found


def _cost_of(calibration: Calibration, extrapolates: bool) -> Callable[[State, int], float]:
    """Of having a step stood in for, after the steps of a state: what that does to the last sample, on average."""
    times = [float(time) for time in calibration.schedule.timesteps]
    sensitivities = calibration.schedule.sensitivities()

    def cost(state: State, step: int) -> float:
        newest_first = state[::-1]
        weights = stand_in(newest_first, step, times, extrapolates)
        if weights is None:
            return math.inf
        places, signed = [step, *newest_first[: len(weights)]], np.array([1.0, *(-weight for weight in weights)])
        squares = np.einsum("i,pij,j->p", signed, calibration.products[:, places][:, :, places], signed)
        return float(sensitivities[step] * np.sqrt(np.maximum(squares, 0)).mean())

    return cost
