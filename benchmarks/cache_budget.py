"""What reuse is left in a smaller cache, on the demo model: slots for some of the blocks only.

Slots go to the deepest blocks, or, with a profile, to those that saved most calls in the trace of another prompt. Every
request is compared with the same seed without reuse.

    python -m benchmarks.cache_budget --save
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import finish, table
from foresight.engines.backend import create_backend
from foresight.engines.bundle import open_bundle
from foresight.evaluation.quality import psnr
from foresight.exporter.export import Export
from foresight.runtime.budget import Profile
from foresight.runtime.caches import CACHE_MODES, Layout, find_mode
from foresight.runtime.memory import MemoryLimits
from foresight.runtime.pipeline import VideoPipeline
from foresight.runtime.policies import Foresight, NoReuse

PROFILED = "a green square moving down"
PROMPTS = (
    "a red circle moving right",
    "a blue square moving left",
    "a yellow triangle moving up",
    "a red square moving down",
    "a blue circle moving up",
    "a green triangle moving right",
)
SHARES = (1.0, 0.5, 0.25, 0.125, 0.0)
MIB = 2**20


def main() -> None:
    """Measure, print a table, and end in one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "foresight-cache-budget")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/cache_budget.json")
    options = parser.parse_args()
    opened = open_bundle(Export("latte-demo", output=options.work).run().path)
    backend = create_backend()
    whole = VideoPipeline(opened, backend)
    references = [whole(text, seed=seed, steps=options.steps, policy=NoReuse()) for seed, text in enumerate(PROMPTS)]
    rows: list[dict[str, Any]] = []
    for mode in CACHE_MODES:
        trace = whole(PROFILED, seed=len(PROMPTS), steps=options.steps, policy=Foresight(cache=mode)).trace
        profile = Profile.from_trace(trace.to_dict())
        for share in SHARES:
            for chosen_by in ("depth", "profile") if 0 < share < 1 else ("depth",):
                limit = _budget(whole, mode, share)
                limits = MemoryLimits(cache_memory=limit, cache_profile=profile if chosen_by == "profile" else None)
                pipeline = VideoPipeline(opened, backend, limits)
                videos = [
                    pipeline(text, seed=seed, steps=options.steps, policy=Foresight(cache=mode))
                    for seed, text in enumerate(PROMPTS)
                ]
                quality = [
                    min(psnr(video.frames, reference.frames), 100.0)  # identical frames have no finite PSNR
                    for video, reference in zip(videos, references, strict=True)
                ]
                rows.append(
                    {
                        "cache": mode,
                        "slots": len(opened.manifest.blocks) - len(videos[0].trace.uncached),
                        "blocks": len(opened.manifest.blocks),
                        "chosen_by": chosen_by,
                        "cache_mib": round(videos[0].trace.cache_bytes / MIB, 2),
                        "skipped_percent": round(100 * statistics.mean(v.trace.share_skipped for v in videos), 1),
                        "psnr_db": round(statistics.mean(quality), 1),
                    }
                )
    print(table([list(row.values()) for row in rows], list(rows[0])))
    finish("cache_budget", {"prompts": len(PROMPTS), "steps": options.steps, "rows": rows}, options.save)


def _budget(pipeline: VideoPipeline, mode: str, share: float) -> int:
    """Bytes for slots for that share of the blocks, for one guided prompt."""
    manifest, blocks = pipeline.manifest, len(pipeline.manifest.blocks)
    buffer = 2 * manifest.cache_bytes_per_row[manifest.blocks[0].name]
    return Layout(find_mode(mode)).buffers(blocks, round(share * blocks)) * buffer


if __name__ == "__main__":
    main()
