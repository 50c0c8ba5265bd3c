"""Rules that were tried and are not part of the package, beside `forecast` and `schedule`, on a demo model.

All are compared at the same shares of skipped block calls: a rule's constant is the one at which it skips that much on
the tuning half of the pairs; what it does is reported on the other half. Which pairs these are: benchmarks/halves.py.

    python -m benchmarks.rules --model latte --save
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.common import finish, table
from benchmarks.halves import TUNED_ON, held_out_pairs, measure, tuning_pairs
from benchmarks.reuse_quality import MODELS
from benchmarks.rules.both import Both
from benchmarks.rules.easycache import EasyCache
from benchmarks.rules.last_quarter import LastQuarter, LastQuarterForecast
from benchmarks.rules.lemica import minimax_schedules
from benchmarks.rules.magcache import MagCache, ratios_of
from benchmarks.rules.seacache import SeaCache
from foresight.engines.progress import silent
from foresight.evaluation.calibration import calibration_of
from foresight.evaluation.evaluate import Pair
from foresight.evaluation.lineup import noise_of
from foresight.runtime.pipeline import VideoPipeline, load
from foresight.runtime.policies import FixedSchedule, Forecast, Foresight, Policy
from foresight.runtime.policies.base import Calibration
from foresight.runtime.request import VideoRequest

SHARES = (0.4, 0.52, 0.64)  # of the block calls
PAIRS = 20  # held out
TRIED_ON, TRIALS = 3, 7  # of the tuning pairs, and values a constant
NEAR = 0.04  # how far from the share a constant may leave a rule and it still counts
LOW, HIGH = 1e-4, 3.0  # between which constants are looked for
HELD, EXTRAPOLATED = "held", "extrapolated"
VALUES = {HELD: False, EXTRAPOLATED: True}
Made = Callable[[Pair], Policy]
OfConstant = Callable[[float, Pair], Policy]


@dataclass(frozen=True)
class Candidate:
    """A rule with its constant, by its name in the table, and what stands in for what it skips."""

    rule: str
    value: str
    share: float | None
    constant: float | str
    made: Made

    @property
    def name(self) -> str:
        """None other has it."""
        return f"{self.rule}, {self.value}, {self.constant}"


@dataclass(frozen=True)
class Tuner:
    """Finds constants on the tuning half."""

    pipeline: VideoPipeline
    pairs: Sequence[Pair]

    def share(self, made: Made) -> float:
        """What is skipped of the block calls, on average."""
        videos = (self.pipeline(pair.prompt, seed=pair.seed, policy=made(pair)) for pair in self.pairs)
        return statistics.fmean(video.trace.share_skipped for video in videos)

    def find(self, make: OfConstant, share: float) -> float | None:
        """The constant at which so much is skipped, by halving their logarithms; None where it is nowhere near."""
        low, high, best = LOW, HIGH, (math.inf, LOW)
        for _ in range(TRIALS):
            middle = float(f"{math.sqrt(low * high):.3g}")
            found = self.share(lambda pair, constant=middle: make(constant, pair))  # type: ignore[misc]
            best = min(best, (abs(found - share), middle))
            low, high = (middle, high) if found < share else (low, middle)
        return best[1] if best[0] <= NEAR else None


def with_constants(pipeline: VideoPipeline, calibration: Calibration) -> dict[str, dict[str, OfConstant]]:
    """Rules by name, and by what stands in for what they skip: each made of a constant, for a pair."""
    ratios = ratios_of(calibration)

    def of_samples(rule: type[EasyCache | SeaCache], extrapolates: bool) -> OfConstant:
        return lambda constant, pair: rule(constant, extrapolates, noise_of(pipeline, pair.seed))

    def of_magnitudes(extrapolates: bool) -> OfConstant:
        return lambda constant, pair: MagCache(constant, extrapolates, ratios)

    return {
        "forecast": {EXTRAPOLATED: lambda constant, pair: Forecast(constant)},
        "last quarter, by forecast": {HELD: lambda constant, pair: LastQuarterForecast(Forecast(constant))},
        "EasyCache": {value: of_samples(EasyCache, extrapolates) for value, extrapolates in VALUES.items()},
        "SeaCache": {value: of_samples(SeaCache, extrapolates) for value, extrapolates in VALUES.items()},
        "MagCache": {value: of_magnitudes(extrapolates) for value, extrapolates in VALUES.items()},
    }


def candidates(pipeline: VideoPipeline, model: str) -> list[Candidate]:
    """All that take part, with constants found on the tuning half; one for both of what may stand in."""
    pairs = tuning_pairs(model)
    calibration = calibration_of(pipeline, VideoRequest(""), pairs, silent)
    tuner, found = Tuner(pipeline, pairs[:TRIED_ON]), []
    for rule, values in with_constants(pipeline, calibration).items():
        for share in SHARES:
            constant = tuner.find(list(values.values())[-1], share)
            if constant is not None:
                found += [
                    Candidate(rule, value, share, constant, _with(make, constant)) for value, make in values.items()
                ]
    return [*found, *_scheduled(calibration), *_fixed()]


def _with(make: OfConstant, constant: float) -> Made:
    return lambda pair: make(constant, pair)


def _always(policy: Policy) -> Made:
    return lambda pair: policy


def _scheduled(calibration: Calibration) -> list[Candidate]:
    """Schedules found beforehand: the package's own, and minimax paths."""
    steps = calibration.schedule.steps
    listed: dict[tuple[str, str], Mapping[int, Policy]] = {
        ("schedule", EXTRAPOLATED): FixedSchedule().calibrate(calibration),
        **{("LeMiCa", value): minimax_schedules(calibration, extrapolates) for value, extrapolates in VALUES.items()},
    }
    counts = {share: steps - round(share * steps) for share in SHARES}
    return [
        Candidate(rule, value, share, f"{count} steps run", _always(found[count]))
        for (rule, value), found in listed.items()
        for share, count in counts.items()
        if count in found
    ]


def _fixed() -> list[Candidate]:
    """What has its own share, whatever is wanted."""
    both = Both(Forecast(0.003), Foresight(gamma=0.25, warmup=10))
    residual = replace(both, blocks=replace(both.blocks, cache="residual"))
    return [
        Candidate("last quarter, fixed beat", HELD, None, "N1R2", _always(LastQuarter())),
        Candidate("last quarter, fixed beat", HELD, None, "N2R3", _always(LastQuarter(2, 3))),
        Candidate("both", EXTRAPOLATED, None, "0.003, gamma 0.25, output", _always(both)),
        Candidate("both", EXTRAPOLATED, None, "0.003, gamma 0.25, residual", _always(residual)),
    ]


def main() -> None:
    """Measure, print a table, and end in one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default=next(iter(MODELS)))
    parser.add_argument("--bundle", type=Path, help="[default: that of the family's demo model]")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="held out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save", action="store_true", help="write results/rules_MODEL.json")
    options = parser.parse_args()
    pipeline = load(options.bundle or Path("bundles") / MODELS[options.model], threads=options.threads)
    defaults = pipeline.manifest.defaults
    found = candidates(pipeline, options.model)
    named = {one.name: one for one in found}
    measured = measure(
        pipeline,
        held_out_pairs(options.pairs),
        lambda pair: {name: one.made(pair) for name, one in named.items()},
        defaults.steps,
        defaults.guidance,
    )
    rows: list[dict[str, Any]] = [
        {"rule": one.rule, "value": one.value, "share": one.share, "constant": one.constant, **_figures(row)}
        for one, row in zip(found, measured, strict=True)
    ]
    print(table([tuple(row.values()) for row in rows], tuple(rows[0])))
    pairs = {"tuning": TUNED_ON, "tried on": TRIED_ON, "held-out": options.pairs}
    result = {"model": options.model, "pairs": pairs, "steps": defaults.steps, "threads": options.threads}
    finish(f"rules_{options.model}", {**result, "rows": rows}, options.save)


def _figures(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "setting"}


if __name__ == "__main__":
    main()
