"""What `forecast` and `schedule` skip on a demo model, and what that costs, beside `foresight` and `static`.

In three conditions, the bundle's steps and guidance, half the steps, and guidance 5; in each, `schedule` is calibrated
on the tuning half of the pairs, and settings of no use there are not run on the other half. Which pairs these are, and
what is measured: benchmarks/halves.py. What follows: benchmarks/gains.py. No times are taken.

    python -m benchmarks.forecast_quality --model latte --save
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, finish, table
from benchmarks.curves import draw
from benchmarks.halves import HELD_OUT, TUNED_ON, TUNING, held_out_pairs, measure, tuning_pairs
from benchmarks.reuse_quality import MODELS
from foresight.engines.progress import silent
from foresight.evaluation.calibration import calibration_of
from foresight.runtime.pipeline import VideoPipeline, load
from foresight.runtime.policies import FixedSchedule, Forecast, Foresight, Policy, Static
from foresight.runtime.request import VideoRequest

PAIRS = 50  # held out
GUIDANCE = 5.0
TOLERANCES = (0.0007, 0.0015, 0.003, 0.005, 0.008, 0.01, 0.012, 0.018, 0.03, 0.05, 0.08)
SHARES = (0.38, 0.48, 0.52, 0.56, 0.6, 0.64)  # of the steps, that schedules skip
LEAST_PERCENT, LEAST_DB = 10.0, 35.0  # skipped, and mean PSNR, of a setting that is of use


def baselines() -> dict[str, Policy]:
    """What the others are held against, by the names they have in the tables."""
    return {"foresight N1R2": Foresight(), "foresight N2R3": Foresight(2, 3), "static N1R2": Static()}


def schedules(pipeline: VideoPipeline, model: str, steps: int, guidance: float, pairs: int) -> dict[str, Policy]:
    """Those found on the tuning half, by how many steps run."""
    asked = VideoRequest("", steps=steps, guidance=guidance)
    calibration = calibration_of(pipeline, asked, tuning_pairs(model, pairs), silent)
    found = FixedSchedule().calibrate(calibration)
    counts = dict.fromkeys(steps - round(share * steps) for share in SHARES)
    return {f"schedule {count}": found[count] for count in counts if count in found}


def sweep(pipeline: VideoPipeline, model: str, pairs: int, steps: int, guidance: float) -> dict[str, Any]:
    """One condition: the rows of both halves; every row of the second has one of the first."""
    tuned_on = min(TUNED_ON, pairs)
    policies: dict[str, Policy] = baselines()
    policies |= {f"forecast {tolerance}": Forecast(tolerance) for tolerance in TOLERANCES}
    policies |= schedules(pipeline, model, steps, guidance, tuned_on)
    tuning = measure(pipeline, tuning_pairs(model, tuned_on), lambda pair: policies, steps, guidance)
    kept: Mapping[str, Policy] = {row["setting"]: policies[row["setting"]] for row in tuning if _is_of_use(row)}
    held_out = measure(pipeline, held_out_pairs(pairs), lambda pair: kept, steps, guidance)
    return {"steps": steps, "guidance": guidance, TUNING: tuning, HELD_OUT: held_out}


def _is_of_use(row: Mapping[str, Any]) -> bool:
    wanted: bool = row["skipped_percent"] >= LEAST_PERCENT and row["mean_psnr_db"] >= LEAST_DB
    return wanted or row["setting"] in baselines()


def main() -> None:
    """Measure, print a table a condition, and end in one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default=next(iter(MODELS)))
    parser.add_argument("--bundle", type=Path, help="[default: that of the family's demo model]")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="held out; twelve more are tuned on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save", action="store_true", help="write results/forecast_quality_MODEL.json and .svg")
    options = parser.parse_args()
    pipeline = load(options.bundle or Path("bundles") / MODELS[options.model], threads=options.threads)
    steps, guidance = pipeline.manifest.defaults.steps, pipeline.manifest.defaults.guidance
    asked = {"default": (steps, guidance), "half the steps": (steps // 2, guidance), "guidance 5": (steps, GUIDANCE)}
    conditions = {}
    for name, (count, strength) in asked.items():
        conditions[name] = sweep(pipeline, options.model, options.pairs, count, strength)
        rows = conditions[name][HELD_OUT]
        print(name, table([tuple(row.values()) for row in rows], tuple(rows[0])), sep="\n", flush=True)
    name = f"forecast_quality_{options.model}"
    if options.save:
        (RESULTS / f"{name}.svg").write_text(draw({name: one[HELD_OUT] for name, one in conditions.items()}), "utf-8")
    result = {"model": options.model, "pairs": {TUNING: TUNED_ON, HELD_OUT: options.pairs}, "threads": options.threads}
    finish(name, {**result, "conditions": conditions}, options.save)


if __name__ == "__main__":
    main()
