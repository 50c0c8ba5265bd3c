"""Which steps to run so that forecasting the others costs least, for every number of steps that run.

A schedule is a path through the steps that run. What an edge costs is what the forecasts between its ends would have
been off by, each times what that does to the last sample (`Schedule.sensitivities`), in the worst of the recorded
requests. A forecast is made of the last three computed outputs, so a path's state is those three. The errors need no
outputs but their inner products: of m - (w0 m0 + w1 m1 + w2 m2) the mean square is a quadratic form of them.

Where transformers take turns, no forecast is made of another one's outputs. So each turn has paths of its own, which
begin with its first three steps and end where the next turn begins, and what one costs is nothing to the others.
"""

from __future__ import annotations

import math
from itertools import product

import numpy as np

from ...engines.arrays import HostArray
from ...engines.errors import InvalidRequest
from .base import Calibration
from .extrapolation import KEPT, extrapolation

FARTHEST = 8  # steps from one that runs to the next

State = tuple[int, int, int]
Paths = dict[int, tuple[float, list[int]]]  # what the best one costs, and the path, by how many of its steps run


def shortest_paths(calibration: Calibration, warmup: int = KEPT) -> list[list[int]]:
    """For every number of steps that can run, the path of least cost, as numbers of steps from 0.

    The first `warmup` steps, 3 or more, run in all of them, as do the first three of every turn, and the last step.
    Raises InvalidRequest for a sampler that tells no signal scales.
    """
    steps = calibration.schedule.steps
    if steps <= warmup:
        return [list(range(steps))]
    edges, best = _Edges(calibration), {0: (0.0, list[int]())}
    for turn in calibration.turns:
        end = min(turn.stop, steps - 1)
        best = _one_after_the_other(best, _of_turn(edges, turn, max(KEPT, warmup - turn.start), end))
    return [path for _, (_, path) in sorted(best.items())]


def _one_after_the_other(before: Paths, after: Paths) -> Paths:
    best: Paths = {}
    for (count, (cost, path)), (more, (added, rest)) in product(before.items(), after.items()):
        known = best.get(count + more)
        if known is None or cost + added < known[0]:
            best[count + more] = cost + added, [*path, *rest]
    return best


def _of_turn(edges: _Edges, turn: range, begun: int, end: int) -> Paths:
    """The paths of a turn whose first `begun` steps, 3 or more, run, and so does `end`, be it of the turn or not."""
    if len(turn) <= begun:
        return {len(turn): (0.0, list(turn))}
    first = turn.start + begun
    begin: State = (first - 3, first - 2, first - 1)
    costs: dict[State, HostArray] = {begin: _only(begun, len(turn) + 1)}
    before: dict[State, list[State | None]] = {begin: [None] * (len(turn) + 2)}
    for newest in range(first - 1, end):
        for state in [state for state in costs if state[-1] == newest]:
            cost = 0.0
            for after in range(newest + 1, min(newest + FARTHEST, end) + 1):
                if after > newest + 1:
                    cost += edges.cost(state, after - 1)
                if not math.isfinite(cost):
                    break
                _relax(costs, before, state, (state[1], newest, after), cost)
    found = [(cost, [*turn[: begun - KEPT], *path]) for cost, path in _paths(costs, before, end)]
    own = [(cost, [step for step in path if step in turn]) for cost, path in found]
    return {len(path): (cost, path) for cost, path in own}


def _relax(
    costs: dict[State, HostArray], before: dict[State, list[State | None]], state: State, after: State, cost: float
) -> None:
    """Go from one state to the next with one step more, wherever that is the cheapest way there."""
    reached = np.append(np.inf, costs[state][:-1] + cost)
    known = costs.setdefault(after, np.full_like(reached, np.inf))
    origins = before.setdefault(after, [None] * len(reached))
    for count in np.flatnonzero(reached < known):
        known[count], origins[count] = reached[count], state


def _paths(
    costs: dict[State, HostArray], before: dict[State, list[State | None]], last: int
) -> list[tuple[float, list[int]]]:
    ends = [state for state in costs if state[-1] == last]
    found = []
    for count in range(KEPT, len(costs[ends[0]])):
        end = min(ends, key=lambda state: float(costs[state][count]))
        if not math.isfinite(costs[end][count]):
            continue
        path, state, left = [], end, count
        while (origin := before[state][left]) is not None:
            path.append(state[-1])
            state, left = origin, left - 1
        found.append((float(costs[end][count]), [*state, *reversed(path)]))
    return found


def _only(count: int, steps: int) -> HostArray:
    """No cost for that many steps, and no way with another number."""
    costs = np.full(steps + 1, np.inf)
    costs[count] = 0
    return costs


class _Edges:
    """What forecasts cost."""

    def __init__(self, calibration: Calibration) -> None:
        self._products = calibration.products
        self._times = [float(time) for time in calibration.schedule.timesteps]
        self._sensitivities = calibration.schedule.sensitivities()
        if not np.isfinite(self._sensitivities).all():
            raise InvalidRequest(
                "policy: got one that errors are foretold for, and a sampler that does not tell how much signal its "
                "samples hold, expected another; choose one that reuses blocks"
            )

    def cost(self, state: State, step: int) -> float:
        """Of forecasting a step from three that ran; infinite where that cannot be."""
        newest_first = state[::-1]
        weights = extrapolation([self._times[computed] for computed in newest_first], self._times[step])
        if weights is None:
            return math.inf
        places = [step, *newest_first]
        signed = np.array([1.0, *(-weight for weight in weights)])
        squares = np.einsum("i,pij,j->p", signed, self._products[:, places][:, :, places], signed)
        worst = math.sqrt(max(float(squares.max()), 0.0))
        return float(self._sensitivities[step]) * worst
