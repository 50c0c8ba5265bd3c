"""Pairs of prompt and seed in two halves, what a policy does on them, and how that is summed up.

Constants are chosen on the *tuning* half, which is recorded pairs of demo/records/MODEL/scores.json; what they do is
reported on the *held-out* half, whose seeds nothing else here uses: all 48 captions in an order of chance, and then
again. Every setting makes the same videos as the run without reuse, from the same seeds, and PSNR compares their
frames: pooled is that of the mean squared error of all videos, mean the mean of the videos' own.
"""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.reuse_quality import RECORDS
from demo.shapes import combinations
from foresight.evaluation.evaluate import Pair
from foresight.evaluation.quality import psnr
from foresight.runtime.pipeline import VideoPipeline
from foresight.runtime.policies import NoReuse, Policy
from foresight.runtime.video import Video

TUNING, HELD_OUT = "tuning", "held-out"
TUNED_ON = 12  # pairs, of every eight recorded ones the first
FIRST_SEED = 500_000
IDENTICAL_DB = 100.0

Policies = Callable[[Pair], Mapping[str, Policy]]


def tuning_pairs(model: str, count: int = TUNED_ON) -> list[Pair]:
    """Those that constants are chosen on."""
    rows = json.loads((RECORDS / model / "scores.json").read_text(encoding="utf-8"))["rows"]
    return [Pair(row["prompt"], row["seed"]) for row in rows[::8]][:count]


def held_out_pairs(count: int) -> list[Pair]:
    """Those that nothing is chosen by."""
    captions = [one.caption for one in combinations()]
    random.Random(1).shuffle(captions)
    return [Pair(captions[index % len(captions)], FIRST_SEED + index) for index in range(count)]


def measure(
    pipeline: VideoPipeline, pairs: Sequence[Pair], policies: Policies, steps: int, guidance: float
) -> list[dict[str, Any]]:
    """A row a setting, over all pairs; `policies` names those of a pair, the same names for all."""
    rows: dict[str, list[tuple[float, float]]] = {}
    for pair in pairs:
        asked: dict[str, Any] = {"seed": pair.seed, "steps": steps, "guidance": guidance}
        baseline: Video = pipeline(pair.prompt, policy=NoReuse(), **asked)
        for name, policy in policies(pair).items():
            video: Video = pipeline(pair.prompt, policy=policy, **asked)
            decibels = min(psnr(video.frames, baseline.frames), IDENTICAL_DB)
            rows.setdefault(name, []).append((video.trace.share_skipped, decibels))
    return [{"setting": name, **summarise(own)} for name, own in rows.items()]


def summarise(rows: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Of shares skipped and PSNR in dB, over the pairs."""
    shares, decibels = zip(*rows, strict=True)
    error = statistics.fmean(10 ** (-value / 10) for value in decibels)
    return {
        "skipped_percent": round(100 * statistics.fmean(shares), 1),
        "pooled_psnr_db": round(-10 * math.log10(error), 1),
        "mean_psnr_db": round(statistics.fmean(decibels), 1),
        "worst_psnr_db": round(min(decibels), 1),
    }
