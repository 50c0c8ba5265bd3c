"""What Foresight skips on a demo model, and what that costs: cache mode x cycle x gamma.

Every setting makes the same videos as the run without reuse, from the same seeds; PSNR and SSIM compare their frames.
Speed-up is of the denoising phase, setting and baseline in turns, prompt by prompt. The prompts are the recorded
pairs of demo/records/MODEL/scores.json, trained and held-out combinations alike.

    python -m benchmarks.reuse_quality --model latte --save
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, finish, median, table
from foresight.evaluation.quality import psnr, ssim
from foresight.exporter.registry import REGISTRY
from foresight.runtime.pipeline import VideoPipeline, load
from foresight.runtime.policies import Foresight, NoReuse
from foresight.runtime.video import Video

CACHES = ("output", "residual")
CYCLES = ((1, 2), (2, 3), (3, 4))
GAMMAS = (0.25, 0.5, 1.0, 2.0)
RECORDS = Path(__file__).parents[1] / "demo" / "records"
MODELS = {row.family: model for model, row in REGISTRY.items() if row.comes_with_a_clone}

Setting = tuple[str, tuple[int, int], float]


def sweep(pipeline: VideoPipeline, pairs: list[tuple[str, int]], steps: int) -> dict[Setting, list[dict[str, float]]]:
    """Every setting on every (prompt, seed), each beside a run without reuse of its own."""
    settings = list(product(CACHES, CYCLES, GAMMAS))
    rows: dict[Setting, list[dict[str, float]]] = {setting: [] for setting in settings}
    for prompt, seed in pairs:
        baseline: Video = pipeline(prompt, seed=seed, steps=steps, policy=NoReuse())
        times = [baseline.trace.denoise_ms]
        for index, (cache, (reuse, interval), gamma) in enumerate(settings):
            if index % 6 == 5:  # the baseline takes its turns too, so that the machine's drift hits both
                times.append(pipeline(prompt, seed=seed, steps=steps, policy=NoReuse()).trace.denoise_ms)
            policy = Foresight(reuse, interval, gamma=gamma, cache=cache)
            video: Video = pipeline(prompt, seed=seed, steps=steps, policy=policy)
            rows[settings[index]].append(
                {
                    "skipped": video.trace.share_skipped,
                    "psnr": psnr(video.frames, baseline.frames),
                    "ssim": ssim(video.frames, baseline.frames),
                    "denoise_ms": video.trace.denoise_ms,
                }
            )
        for setting in settings:
            rows[setting][-1]["speedup"] = statistics.median(times) / rows[setting][-1]["denoise_ms"]
    return rows


def summarise(setting: Setting, rows: list[dict[str, float]]) -> dict[str, Any]:
    """Means over prompts; PSNR is that of the mean squared error, so that identical videos do not make it infinite."""
    cache, (reuse, interval), gamma = setting
    error = statistics.mean(10 ** (-row["psnr"] / 10) for row in rows)
    return {
        "cache": cache,
        "cycle": f"N{reuse}R{interval}",
        "gamma": gamma,
        "skipped_percent": round(100 * statistics.mean(row["skipped"] for row in rows), 1),
        "psnr_db": round(-10 * math.log10(error), 2) if error else None,
        "worst_psnr_db": round(min(row["psnr"] for row in rows), 2) if error else None,
        "ssim": round(statistics.mean(row["ssim"] for row in rows), 4),
        "speedup": median(row["speedup"] for row in rows),
    }


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Share skipped against PSNR, one line per cache mode and cycle, as SVG."""
    points = [row for row in rows if row["psnr_db"] is not None]
    width, height, margin = 720, 420, 56
    right = max(10.0, 10 * math.ceil(max(row["skipped_percent"] for row in points) / 10))
    low = 5 * math.floor(min(row["psnr_db"] for row in points) / 5)
    high = 5 * math.ceil(max(row["psnr_db"] for row in points) / 5)

    def place(row: dict[str, Any]) -> tuple[float, float]:
        x = margin + row["skipped_percent"] / right * (width - 2 * margin)
        y = height - margin - (row["psnr_db"] - low) / (high - low) * (height - 2 * margin)
        return round(x, 1), round(y, 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"',
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for tick in range(0, int(right) + 1, 10):
        x = margin + tick / right * (width - 2 * margin)
        parts.append(f'<text x="{x}" y="{height - margin + 18}" text-anchor="middle">{tick} %</text>')
    for tick in range(low, high + 1, 5):
        y = height - margin - (tick - low) / (high - low) * (height - 2 * margin)
        parts.append(f'<line x1="{margin}" x2="{width - margin}" y1="{y}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="{margin - 8}" y="{y + 4}" text-anchor="end">{tick}</text>')
    parts.append(f'<text x="{width / 2}" y="{height - 12}" text-anchor="middle">block calls skipped</text>')
    parts.append(f'<text x="14" y="{margin - 16}">PSNR against no reuse, dB</text>')
    colours = {"output": "#0072b2", "residual": "#d55e00"}
    dashes = {"N1R2": "none", "N2R3": "6 3", "N3R4": "2 3"}
    for index, (cache, cycle) in enumerate(product(colours, dashes)):
        line = [place(row) for row in points if (row["cache"], row["cycle"]) == (cache, cycle)]
        style = f'stroke="{colours[cache]}" stroke-dasharray="{dashes[cycle]}" stroke-width="2" fill="none"'
        parts.append(f'<polyline points="{" ".join(f"{x},{y}" for x, y in line)}" {style}/>')
        parts += [f'<circle cx="{x}" cy="{y}" r="3.5" fill="{colours[cache]}"/>' for x, y in line]
        y = margin + 18 * index
        parts.append(f'<line x1="{width - 210}" x2="{width - 170}" y1="{y}" y2="{y}" {style}/>')
        parts.append(f'<text x="{width - 162}" y="{y + 4}">{cache}, {cycle}</text>')
    path.write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")


def main() -> None:
    """Measure, print a table, and end in one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default=next(iter(MODELS)))
    parser.add_argument("--bundle", type=Path, help="[default: that of the family's demo model]")
    parser.add_argument("--prompts", type=int, default=30)
    parser.add_argument("--steps", type=int, help="[default: the bundle's]")
    parser.add_argument("--save", action="store_true", help="write results/reuse_quality_MODEL.json and .svg")
    options = parser.parse_args()
    recorded = json.loads((RECORDS / options.model / "scores.json").read_text(encoding="utf-8"))["rows"]
    every = max(1, len(recorded) // options.prompts)
    pairs = [(row["prompt"], row["seed"]) for row in recorded[::every]][: options.prompts]
    pipeline = load(options.bundle or Path("bundles") / MODELS[options.model])
    steps = options.steps or pipeline.manifest.defaults.steps
    measured = sweep(pipeline, pairs, steps)
    rows = [summarise(setting, values) for setting, values in measured.items()]
    print(table([tuple(row.values()) for row in rows], tuple(rows[0])))
    name = f"reuse_quality_{options.model}"
    if options.save:
        draw(rows, RESULTS / f"{name}.svg")
    finish(name, {"model": options.model, "prompts": len(pairs), "steps": steps, "rows": rows}, options.save)


if __name__ == "__main__":
    main()
