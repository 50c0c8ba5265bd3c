"""How far a demo model itself moves a video whose noise is off by a ten-thousandth, without any reuse.

Some pairs stand between two videos, and whatever touches them picks one: no policy keeps such a video. The pairs are
those held out of benchmarks/halves.py.

    python -m benchmarks.steadiness --save
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import finish, table
from benchmarks.forecast_quality import PAIRS
from benchmarks.halves import IDENTICAL_DB, held_out_pairs
from benchmarks.reuse_quality import MODELS
from foresight.evaluation.lineup import noise_of
from foresight.evaluation.quality import psnr
from foresight.runtime.pipeline import load
from foresight.runtime.policies import NoReuse

OFF = 1e-4  # of the noise's standard deviation


def moved(bundle: Path, pairs: int, threads: int) -> dict[str, Any]:
    """Of all pairs, by their PSNR against the video of the noise as it is."""
    pipeline = load(bundle, threads=threads)
    found = []
    for pair in held_out_pairs(pairs):
        noise = noise_of(pipeline, pair.seed)
        off = np.random.default_rng(pair.seed).standard_normal(noise.shape, dtype=np.float32)
        video, other = (
            pipeline(pair.prompt, policy=NoReuse(), latents=latents)
            for latents in (noise, noise + np.float32(OFF) * off)
        )
        found.append((min(psnr(other.frames, video.frames), IDENTICAL_DB), pair))
    found.sort()
    decibels = [value for value, _ in found]
    return {
        "median_psnr_db": round(statistics.median(decibels), 1),
        "worst_psnr_db": [round(value, 1) for value in decibels[:3]],
        "worst": list(found[0][1]),
    }


def main() -> None:
    """Measure, print a table, and end in one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save", action="store_true", help="write results/steadiness.json")
    options = parser.parse_args()
    rows = [
        {"model": model, **moved(Path("bundles") / bundle, options.pairs, options.threads)}
        for model, bundle in MODELS.items()
    ]
    print(table([tuple(row.values()) for row in rows], tuple(rows[0])))
    finish("steadiness", {"pairs": options.pairs, "off": OFF, "rows": rows}, options.save)


if __name__ == "__main__":
    main()
