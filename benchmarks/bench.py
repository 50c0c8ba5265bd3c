"""The policies and other people's caches on a demo model: what `foresight bench` does, on the recorded pairs.

Trained and held-out combinations of demo/records/MODEL/scores.json alternate. Schedules take part, too, which are found
on others of these pairs. Needs `foresight-engines[peers]`.

    python -m benchmarks.bench --model cogvideox --save
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, finish, table
from benchmarks.halves import tuning_pairs
from benchmarks.reuse_quality import MODELS, RECORDS
from foresight.engines.progress import silent
from foresight.evaluation.calibration import calibration_of
from foresight.evaluation.evaluate import Pair
from foresight.evaluation.lineup import BenchRequest, run_bench
from foresight.evaluation.plot import plot
from foresight.exporter.registry import checkpoint_of
from foresight.runtime.pipeline import VideoPipeline, load
from foresight.runtime.policies import POLICIES, FixedSchedule, Policy
from foresight.runtime.request import VideoRequest

SCHEDULED = (0.4, 0.5, 0.58, 0.66)  # of the steps, that schedules skip
APART = 6  # of the recorded pairs one in so many, the next one every other time


def recorded_pairs(model: str, count: int) -> list[Pair]:
    """Of the pairs that the demo model was judged on, trained and held-out combinations in turns."""
    rows = json.loads((RECORDS / model / "scores.json").read_text(encoding="utf-8"))["rows"]
    chosen = [rows[APART * index + index % 2] for index in range(count)]
    return [Pair(row["prompt"], row["seed"]) for row in chosen]


def schedules(pipeline: VideoPipeline, model: str, steps: int, bench: Sequence[Pair]) -> tuple[Policy, ...]:
    """Found on pairs that constants are chosen on, less those of the benchmark."""
    pairs = [pair for pair in tuning_pairs(model) if pair not in bench]
    found = FixedSchedule().calibrate(calibration_of(pipeline, VideoRequest("", steps=steps), pairs, silent))
    return tuple(found[steps - round(share * steps)] for share in SCHEDULED)


def beside_recorded(document: dict[str, Any], recorded: dict[str, Any]) -> dict[str, Any]:
    """Of the first this package's rows, everything else of the second; every row is held against one of its own."""
    for name in ("model", "bundle", "steps", "guidance", "threads", "pairs"):
        if document[name] != recorded[name]:
            raise SystemExit(f"{name}: got {document[name]}, expected {recorded[name]}, as recorded; run all anew")
    peers = [row for row in recorded["rows"] if row["kind"] != document["rows"][0]["kind"]]
    measured = {"own_machine": document["machine"], "notes": document["notes"]}
    return {**recorded, **measured, "rows": [*document["rows"], *peers]}


def told(row: dict[str, Any]) -> tuple[object, ...]:
    """A row in short, while it is looked at."""
    return row["name"], row["kind"], row["psnr_db"], row["worst_psnr_db"], row["cpu_speedup"]["median"]


def main() -> None:
    """Measure, print a table, and end in one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="cogvideox")
    parser.add_argument("--bundle", type=Path, help="[default: bundles/cogvideox-demo and so on]")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--steps", type=int, help="[default: the bundle's]")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--own", action="store_true", help="policies alone; peers stay as they are recorded")
    parser.add_argument("--save", action="store_true", help="write results/bench_MODEL.json and .svg")
    options = parser.parse_args()
    name = f"bench_{options.model}"
    bundle = options.bundle or Path("bundles") / MODELS[options.model]
    pipeline = load(bundle, backend="onnxruntime", device="cpu", threads=options.threads)
    steps, pairs = options.steps or pipeline.manifest.defaults.steps, recorded_pairs(options.model, options.pairs)
    request = BenchRequest(
        pairs=pairs,
        checkpoint=checkpoint_of(pipeline.manifest),
        steps=steps,
        optional=True,
        own=schedules(pipeline, options.model, steps, pairs),
    )
    if options.own:
        recorded = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        document = beside_recorded(run_bench(pipeline, replace(request, only=tuple(POLICIES))), recorded)
    else:
        document = run_bench(pipeline, request)
    rows = document["rows"]
    print(table(map(told, rows), ("contender", "kind", "PSNR, dB", "worst, dB", "speed-up")))
    if options.save:
        (RESULTS / f"{name}.svg").write_text(plot(rows) + "\n", encoding="utf-8")
    finish(name, document, options.save, document["machine"])


if __name__ == "__main__":
    main()
