"""What `forecast` skips on a demo model, and what that costs, beside `foresight` and the two together.

Every setting makes the same videos as the run without reuse, from the same seeds; PSNR compares their frames: pooled is
that of the mean squared error of all videos, mean the mean of the videos' own. Speed-up is of the denoising phase,
settings and baseline in turns, prompt by prompt. There are two halves of the recorded pairs of
demo/records/MODEL/scores.json: constants were chosen on the first, and are reported on the second.

`both` is not part of the package: whole steps by forecast, and in the steps that run, blocks by foresight, whose cycle
counts these steps alone.

    python -m benchmarks.forecast_quality --model latte --save
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.common import finish, median, table
from benchmarks.reuse_quality import MODELS, RECORDS
from foresight.evaluation.quality import psnr
from foresight.runtime.pipeline import VideoPipeline, load
from foresight.runtime.policies import (
    Context,
    Decider,
    Decision,
    Distance,
    Forecast,
    Foresight,
    Measure,
    NoReuse,
    Policy,
)
from foresight.runtime.video import Video

IDENTICAL_DB = 100.0
HALVES = {"tuning": 0, "held-out": 4}  # of every eight recorded pairs, the first


@dataclass(frozen=True)
class Both(Policy):
    """Whole steps by forecast; blocks of the steps that run by foresight."""

    steps: Forecast
    blocks: Foresight
    name: ClassVar[str] = "both"
    outputs: ClassVar[int] = Forecast.outputs

    @property
    def cache(self) -> str:
        """See Policy.cache."""
        return self.blocks.cache

    def begin(self, context: Context) -> Decider:
        """See Policy.begin."""
        return _Both(self, context)


class _Both(Decider):
    def __init__(self, policy: Both, context: Context) -> None:
        super().__init__(context)
        self._steps = policy.steps.begin(context)
        self._blocks = policy.blocks.begin(context)
        self._places: dict[int, int] = {}  # of the steps that ran, among them

    def forecast(self, step: int) -> Sequence[float] | None:
        return self._steps.forecast(step)

    def estimate(self) -> Measure | None:
        return self._steps.estimate()

    def expected(self, step: int) -> Sequence[float] | None:
        return self._steps.expected(step)

    def observe_output(self, step: int, errors: Distance) -> None:
        self._steps.observe_output(step, errors)

    def plan(self, step: int) -> list[Decision]:
        self._places[step] = len(self._places)
        return super().plan(step) if step == self.context.steps - 1 else self._blocks.plan(self._places[step])

    def observe(self, step: int, distances: Sequence[Distance | None]) -> None:
        self._blocks.observe(self._places[step], distances)

    def measures(self) -> list[Measure | None]:
        return self._blocks.measures()


def policies() -> dict[str, Policy]:
    """Every setting, by the name it has in the table."""
    made: dict[str, Policy] = {
        "foresight N1R2": Foresight(),
        "foresight N2R3": Foresight(2, 3),
    }
    for tolerance in (0.001, 0.0015, 0.003, 0.005, 0.008, 0.012, 0.018):
        made[f"forecast {tolerance}"] = Forecast(tolerance)
    for cache in ("output", "residual"):
        made[f"both 0.003, gamma 0.25, {cache}"] = Both(Forecast(0.003), Foresight(gamma=0.25, cache=cache, warmup=10))
    return made


def measure(pipeline: VideoPipeline, pairs: Sequence[tuple[str, int]], steps: int) -> list[dict[str, Any]]:
    """A row a setting, over all pairs."""
    named = policies()
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in named}
    for prompt, seed in pairs:
        baseline: Video = pipeline(prompt, seed=seed, steps=steps, policy=NoReuse())
        times = [baseline.trace.denoise_ms]
        for index, (name, policy) in enumerate(named.items()):
            if index % 5 == 4:  # the baseline takes its turns too
                times.append(pipeline(prompt, seed=seed, steps=steps, policy=NoReuse()).trace.denoise_ms)
            video: Video = pipeline(prompt, seed=seed, steps=steps, policy=policy)
            rows[name].append(
                {
                    "skipped": video.trace.share_skipped,
                    "psnr": min(psnr(video.frames, baseline.frames), IDENTICAL_DB),
                    "denoise_ms": video.trace.denoise_ms,
                }
            )
        for own in rows.values():
            own[-1]["speedup"] = statistics.median(times) / own[-1]["denoise_ms"]
    return [{"setting": name, **summarise(own)} for name, own in rows.items()]


def summarise(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Over the pairs."""
    error = statistics.mean(10 ** (-row["psnr"] / 10) for row in rows)
    return {
        "skipped_percent": round(100 * statistics.mean(row["skipped"] for row in rows), 1),
        "pooled_psnr_db": round(-10 * math.log10(error), 1),
        "mean_psnr_db": round(statistics.mean(row["psnr"] for row in rows), 1),
        "worst_psnr_db": round(min(row["psnr"] for row in rows), 1),
        "speedup": median(row["speedup"] for row in rows),
    }


def main() -> None:
    """Measure, print a table a half, and end in one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default=next(iter(MODELS)))
    parser.add_argument("--bundle", type=Path, help="[default: that of the family's demo model]")
    parser.add_argument("--pairs", type=int, default=12, help="in each half")
    parser.add_argument("--steps", type=int, help="[default: the bundle's]")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save", action="store_true", help="write results/forecast_quality_MODEL.json")
    options = parser.parse_args()
    recorded = json.loads((RECORDS / options.model / "scores.json").read_text(encoding="utf-8"))["rows"]
    pipeline = load(options.bundle or Path("bundles") / MODELS[options.model], threads=options.threads)
    steps = options.steps or pipeline.manifest.defaults.steps
    halves = {}
    for half, first in HALVES.items():
        pairs = [(row["prompt"], row["seed"]) for row in recorded[first::8]][: options.pairs]
        halves[half] = measure(pipeline, pairs, steps)
        print(half, table([tuple(row.values()) for row in halves[half]], tuple(halves[half][0])), sep="\n")
    result = {"model": options.model, "pairs": options.pairs, "steps": steps, "threads": options.threads, **halves}
    finish(f"forecast_quality_{options.model}", result, options.save)


if __name__ == "__main__":
    main()
