"""What `tune` makes of the demo models: profiles for 45, 40 and 35 dB, and what they do on pairs held out.

Captions, some of them of combinations that the model was not trained on, with three seeds each. Seeds begin at
FIRST_SEED: what other seeds showed was used to choose how tuning works. An export of the demo model takes its profiles
from what is recorded.

    python -m benchmarks.tuned --model latte --save
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.common import finish, table
from demo.shapes import combinations
from foresight.engines.manifest import PolicyProfile
from foresight.engines.profiles import write_profiles
from foresight.evaluation.evaluate import Pair, pairs_of
from foresight.evaluation.goals import Goal, Speedup
from foresight.evaluation.held_out import parts_of
from foresight.evaluation.tune import GOALS, InMemory, Tuning
from foresight.evaluation.tuned import profiles_of, tuning_document
from foresight.exporter.registry import REGISTRY
from foresight.runtime.pipeline import VideoPipeline, load
from foresight.runtime.policies import FixedSchedule, Forecast
from foresight.runtime.request import VideoRequest

MODELS = {row.family: model for model, row in REGISTRY.items() if row.comes_with_a_clone}
PROMPTS, SEEDS, FIRST_SEED = 34, 3, 60_000
POLICIES = (Forecast(), FixedSchedule())
HEADER = ("steps", "goal", "policy", "foreseen", "kept", "pairs", "worst", "mean", "pooled", "share", "x")


@dataclass(frozen=True)
class Tunings:
    """What is tuned of one model."""

    pipeline: VideoPipeline
    trials: int

    def run(self, steps: int, goals: Mapping[str, Goal]) -> tuple[dict[str, Any], list[PolicyProfile]]:
        """The document of a tuning, and the profiles of it."""
        prompts = [one.caption for one in random.Random(0).sample(combinations(), PROMPTS)]
        pairs = [Pair(prompt, FIRST_SEED + seed) for prompt, seed in pairs_of(prompts, SEEDS)]
        request = VideoRequest(prompts[0], steps=steps)
        job = Tuning(self.pipeline, request, POLICIES, goals, parts_of(pairs), self.trials, InMemory())
        tuned, tried = job.run()
        return tuning_document(job, tuned, tried), profiles_of(job, tuned)


def main() -> None:
    """Tune for one number of steps after the other; each ends in a table and one JSON line of all so far."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default=next(iter(MODELS)))
    parser.add_argument("--bundle", type=Path, help="[default: that of the family's demo model]")
    parser.add_argument("--trials", type=int, default=4, help="of each policy for each goal")
    parser.add_argument("--threads", type=int, help="[default: all processors]")
    parser.add_argument("--steps", type=int, action="append", help="may be given again  [default: the model's own]")
    parser.add_argument("--speedup", type=float, help="a goal more, for the model's own number of steps")
    parser.add_argument("--save", action="store_true", help="write results/tuned_MODEL.json, and the bundle's profiles")
    options = parser.parse_args()
    pipeline = load(options.bundle or Path("bundles") / MODELS[options.model], threads=options.threads)
    own, job = pipeline.manifest.defaults.steps, Tunings(pipeline, options.trials)
    extra = [] if options.speedup is None else [Speedup(options.speedup)]
    documents, profiles = [], []
    for steps in options.steps or (own,):
        document, found = job.run(steps, GOALS | {goal.slug: goal for goal in extra if steps == own})
        documents.append(document)
        profiles += [profile for profile in found if profile.name in GOALS]
        print(table(_rows(document), HEADER), flush=True)
        finish(f"tuned_{options.model}", _result(documents, profiles), options.save)
    if options.save:
        write_profiles(pipeline.bundle, profiles)


def _result(documents: Sequence[Mapping[str, Any]], profiles: Sequence[PolicyProfile]) -> dict[str, Any]:
    common = {name: documents[0][name] for name in ("model", "guidance", "policies", "trials", "pairs")}
    tunings = [
        {name: document[name] for name in ("steps", "tried", "notes")} | {"goals": document["profiles"]}
        for document in documents
    ]
    return {**common, "tunings": tunings, "profiles": msgspec.to_builtins(profiles)}


def _rows(document: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    return [
        (
            document["steps"],
            one["name"],
            one["policy"],
            one["foreseen_worst_psnr_db"],
            one["kept"],
            *(one["held_out"] or dict.fromkeys(range(6))).values(),
        )
        for one in document["profiles"]
    ]


if __name__ == "__main__":
    main()
