"""What `tune` makes of the demo models: profiles for 45, 40 and 35 dB, and what they do on pairs held out.

Twelve captions, some of them of combinations that the model was not trained on, with two seeds each: eight pairs to
tune on, eight to select by, eight to report. An export of the demo model takes its profiles from what is recorded.

    python -m benchmarks.tuned --model latte --save
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import msgspec

from benchmarks.common import finish, table
from demo.shapes import combinations
from foresight.engines.profiles import write_profiles
from foresight.evaluation.evaluate import pairs_of
from foresight.evaluation.tune import GOALS, InMemory, Tuning, parts_of
from foresight.evaluation.tuned import profiles_of, tuning_document
from foresight.exporter.registry import REGISTRY
from foresight.runtime.pipeline import load
from foresight.runtime.policies import POLICIES, Forecast, policy_from_settings
from foresight.runtime.request import VideoRequest

MODELS = {row.family: model for model, row in REGISTRY.items() if row.comes_with_a_clone}
PROMPTS, SEEDS = 12, 2


def main() -> None:
    """Tune, print a table, and end in one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default=next(iter(MODELS)))
    parser.add_argument("--policy", choices=POLICIES, default=Forecast.name)
    parser.add_argument("--bundle", type=Path, help="[default: that of the family's demo model]")
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--save", action="store_true", help="write results/tuned_MODEL.json, and the bundle's profiles")
    options = parser.parse_args()
    prompts = [one.caption for one in random.Random(0).sample(combinations(), PROMPTS)]
    pipeline = load(options.bundle or Path("bundles") / MODELS[options.model])
    parts = parts_of(pairs_of(prompts, SEEDS))
    policy = policy_from_settings(options.policy)
    job = Tuning(pipeline, VideoRequest(prompts[0]), policy, GOALS, parts, options.trials, InMemory())
    tuned, tried = job.run()
    document = tuning_document(job, tuned, tried)
    profiles = profiles_of(job, tuned)
    rows = [
        (one["name"], one["policy"], one["rejected"], one["written"], *(one["held_out"] or {}).values())
        for one in document["profiles"]
    ]
    print(table(rows, ("profile", "policy", "rejected", "written", "pairs", "worst", "mean", "pooled", "share", "x")))
    is_exported = policy == Forecast()
    if options.save and is_exported:
        write_profiles(pipeline.bundle, profiles)
    names = ("model", "steps", "guidance", "policy", "trials", "pairs", "tried", "notes")
    kept = {name: document[name] for name in names} | {"goals": document["profiles"]}
    name = f"tuned_{options.model}" if is_exported else f"tuned_{options.model}_{options.policy}"
    finish(name, {**kept, "profiles": msgspec.to_builtins(profiles)}, options.save)


if __name__ == "__main__":
    main()
