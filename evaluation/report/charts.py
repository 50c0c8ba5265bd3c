"""The plots of a report, as SVG paths in data units, one unit per step and block, which the browser stretches.

There is one path per kind of mark, so that 56 blocks in 50 steps stay a few hundred kilobytes.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from ...runtime.caches import CACHE_MODES, find_mode
from ...runtime.decisions import Decision
from ...runtime.notes import cycle_of
from ...runtime.policies import Cycle, policy_of_settings
from ...runtime.trace import StepTrace, Trace, turns_of
from .wording import duration

OUTLIER = 4  # times the median: steps slower than that are cut off, and named
MAX_TICKS = 11
SYMBOLS = {decision.value: decision.value[0] for decision in Decision}
ALWAYS_COUNTED = (Decision.COMPUTE.value, Decision.REUSE.value, Decision.DEAD.value)

Tick: TypeAlias = tuple[float, str]  # where, in percent, and what to write there


def step_ticks(steps: int) -> list[Tick]:
    """Marks along the axis of steps."""
    spacing = next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, steps) if steps <= s * MAX_TICKS)
    return [(100 * (step + 0.5) / steps, str(step)) for step in range(0, steps, spacing)]


def block_map(trace: Trace) -> dict[str, Any]:
    """Blocks by steps: what was computed, reused and dead."""
    cycle = cycle_of(trace)
    allowed = [] if cycle is None else _allowed(cycle, trace)
    legend = {"computed": "run", "reused": "reused", "dead": "dead", "forecast": "forecast", "allowed": "reuse allowed"}
    used = {value for step in trace.steps for value in step.decisions} | ({"allowed"} if allowed else set())
    skipped = [sum(step.decisions[block] != Decision.COMPUTE.value for step in trace.steps) for block in _blocks(trace)]
    return {
        "rows": [{"name": _short(trace, block), "skipped": skipped[block]} for block in _blocks(trace)],
        "computed": _cells(trace, Decision.COMPUTE, 0.0),
        "reused": _cells(trace, Decision.REUSE, 0.0),
        "dead": _cells(trace, Decision.DEAD, 0.34),  # a thinner mark, to be told apart without colour
        "forecast": _cells(trace, Decision.FORECAST, 0.2),
        "warmups": _warmups(trace),
        "allowed": "".join(f"M{step + 0.1:g} 0h.8v1h-.8z" for step in allowed),
        "legend": [(mark, words) for mark, words in legend.items() if mark in used],
    }


def _allowed(cycle: Cycle, trace: Trace) -> list[int]:
    """The steps that may reuse; each transformer counts its own."""
    every = [step for turn in turns_of(trace) for step in turn if cycle.allows(step - turn.start, len(turn))]
    return [step for step in every if step < len(trace.steps)]


def _warmups(trace: Trace) -> list[tuple[int, int]]:
    """With which step each one begins, and before which it ends."""
    policy, steps = policy_of_settings(trace.policy), len(trace.steps)
    if policy is None:
        return []
    found = [
        (turn.start, min(steps, turn.stop, turn.start + policy.warmup_steps(len(turn)))) for turn in turns_of(trace)
    ]
    return [(first, end) for first, end in found if first < end]


def _cells(trace: Trace, decision: Decision, inset: float) -> str:
    return "".join(
        f"M{index} {block + inset:g}h1v{1 - 2 * inset:g}h-1z"
        for index, step in enumerate(trace.steps)
        for block, value in enumerate(step.decisions)
        if value == decision.value
    )


@dataclass(frozen=True)
class _LogScale:
    """Values to heights in percent from the top; `low` and `high` are powers of ten."""

    low: float
    high: float

    def y(self, value: float) -> float:
        """The height of a finite value; one of 0 lies on the lower edge."""
        exponent = math.log10(value) if value > 0 else self.low
        return round(100 * (self.high - exponent) / (self.high - self.low), 2)

    def ticks(self) -> list[Tick]:
        """At most four whole powers of ten."""
        first, last = math.ceil(self.low), math.floor(self.high)
        powers = range(first, last + 1, max(1, math.ceil((last - first) / 3)))
        return [(self.y(10.0**power), f"10{_superscript(power)}") for power in powers]


def _superscript(number: int) -> str:
    return str(number).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def changes(trace: Trace) -> dict[str, Any]:
    """A small plot per block of its distances and limits, all on one scale; no plots if nothing was measured."""
    measured = [value for step in trace.steps for value in (*step.distances, *step.limits) if value is not None]
    scale = _log_scale(value for value in measured if math.isfinite(value) and value > 0)
    plots = [_change(trace, block, scale) for block in _blocks(trace)] if measured else []
    legend = {
        "distance": "distance",
        "limit": "limit",
        "reused": "reused",
        "dead": "dead",
        "infinite": "distance that is not finite",
    }
    return {
        "plots": plots,
        "legend": [(mark, words) for mark, words in legend.items() if any(plot[mark] for plot in plots)],
        "ticks": scale.ticks(),
        "gamma": trace.policy.get("gamma"),
        "measured": find_mode(trace.policy.get("cache", next(iter(CACHE_MODES)))).measured,
        "limited": any(value is not None for step in trace.steps for value in step.limits),
        "zeros": any(value <= 0 for value in measured),
    }


def _log_scale(values: Iterable[float]) -> _LogScale:
    """From half a power of ten to half a power of ten, with two whole ones at least, for a reader to go by."""
    logarithms = [math.log10(value) for value in values] or [0.0]
    low, high = math.floor(2 * min(logarithms)) / 2, math.ceil(2 * max(logarithms)) / 2
    if math.floor(high) - math.ceil(low) < 1:
        low = math.floor(low)
        high = max(low + 1, math.ceil(high))
    return _LogScale(low, high)


def _change(trace: Trace, block: int, scale: _LogScale) -> dict[str, Any]:
    distances = [(index + 0.5, step.distances[block]) for index, step in enumerate(trace.steps)]
    points = [f"{x:g} {scale.y(d):g}" for x, d in distances if d is not None and math.isfinite(d)]
    return {
        "name": _short(trace, block),
        "reused": _columns(trace, block, Decision.REUSE),
        "dead": _columns(trace, block, Decision.DEAD),
        "distance": f"M{'L'.join(points)}" if points else "",
        "dots": "".join(f"M{point}h0" for point in points),
        "infinite": "".join(f"M{x:g} 8h0" for x, d in distances if d is not None and not math.isfinite(d)),
        "limit": _limit_line([step.limits[block] for step in trace.steps], scale),
    }


def _columns(trace: Trace, block: int, decision: Decision) -> str:
    steps = [index for index, step in enumerate(trace.steps) if step.decisions[block] == decision.value]
    return "".join(f"M{step} 104h1v8h-1z" for step in steps)


def _limit_line(limits: Sequence[float | None], scale: _LogScale) -> str:
    """One stroke as long as the limit stays, so that its dashes do not start anew with every step."""
    path, before = "", None
    for step, limit in enumerate(limits):
        height = scale.y(limit) if limit is not None and math.isfinite(limit) else None
        if height is not None:
            path += f"H{step + 1}" if height == before else f"M{step} {height:g}H{step + 1}"
        before = height
    return path


def bars(trace: Trace, other: Trace | None) -> dict[str, Any]:
    """Time per step; bars of steps that ran every block look like those of the map."""
    mine = [step.milliseconds for step in trace.steps]
    theirs = [step.milliseconds for step in other.steps] if other is not None else []
    top = _axis_top([*mine, *theirs])
    heights = [round(100 * min(value / top, 1), 2) for value in mine]
    full = [set(step.decisions) <= {Decision.COMPUTE.value} for step in trace.steps]
    cut = [f"step {step}: {duration(value)}" for step, value in enumerate(mine) if value > top]
    cut += [f"step {step} without reuse: {duration(value)}" for step, value in enumerate(theirs) if value > top]
    legend = [("computed", "every block run")]
    legend += [("reused", "some blocks not run")] if not all(full) else []
    legend += [("reference", "without reuse")] if theirs else []
    return {
        "legend": legend,
        "computed": _bar_path((step, height) for step, height in enumerate(heights) if full[step]),
        "reused": _bar_path((step, height) for step, height in enumerate(heights) if not full[step]),
        "reference": "".join(
            f"{'L' if step else 'M'}{step} {100 - 100 * min(value / top, 1):g}h1" for step, value in enumerate(theirs)
        ),
        "ticks": [(100 - 100 * share, f"{share * top:g} ms") for share in (0, 0.5, 1)],
        "cut": cut,
    }


def _bar_path(bars: Iterable[tuple[int, float]]) -> str:
    return "".join(f"M{step + 0.1:g} 100v{-height:g}h.8v{height:g}z" for step, height in bars)


def _axis_top(values: Sequence[float]) -> float:
    """A round number above the values, apart from outliers; the first step often is one."""
    typical = statistics.median(values) if values else 0.0
    highest = max((value for value in values if value <= OUTLIER * typical), default=0.0)
    if highest <= 0:
        return 1.0
    unit = 10.0 ** math.floor(math.log10(highest))
    return next(float(unit * factor) for factor in (1, 2, 4, 6, 8, 10) if highest <= unit * factor)


def hover(trace: Trace, other: Trace | None) -> dict[str, Any]:
    """What the page's script shows of a step and block, as text, so that values that are not finite are no trouble."""
    used = {value for step in trace.steps for value in step.decisions}
    return {
        "blocks": [" · ".join(pair) for pair in zip(trace.blocks, trace.kinds, strict=True)],
        "words": {symbol: word for word, symbol in SYMBOLS.items() if word in ALWAYS_COUNTED or word in used},
        "steps": [
            {
                "timestep": f"{step.timestep:g}",
                "time": duration(step.milliseconds),
                "decisions": "".join(SYMBOLS[decision] for decision in step.decisions),
                "metrics": _texts(step.metrics),
                "limits": _texts(step.limits),
                "distances": _texts(step.distances),
                "forecast": _forecast_text(step),
            }
            for step in trace.steps
        ],
        "reference": [duration(step.milliseconds) for step in other.steps] if other is not None else [],
    }


def _forecast_text(step: StepTrace) -> str:
    """What a policy that forecasts whole steps expected and found; empty where it did neither."""
    expected, found = _texts([step.estimate])[0], _texts([step.error])[0]
    words = [] if expected is None else [f"expected cost {expected} · tolerance {step.estimate_limit:g}"]
    return "\n".join([*words, *([] if found is None else [f"its forecast was off by {found}"])])


def _texts(values: Iterable[float | None]) -> list[str | None]:
    return [None if value is None else f"{value:.3g}" for value in values]


def _blocks(trace: Trace) -> range:
    return range(len(trace.blocks))


def _short(trace: Trace, block: int) -> tuple[str, str]:
    """A block's number, or what else follows its name's last dot, and its kind."""
    return trace.blocks[block].rpartition(".")[2], trace.kinds[block].replace("_", " ")
