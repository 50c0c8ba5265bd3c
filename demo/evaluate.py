"""Scores the demo checkpoint with the pipeline that diffusers ships: `python -m demo.evaluate`.

Every (prompt, seed) pair goes through `LattePipeline` on its own, at one fixed setting, and `demo.judge` reads the
frames. Half of the pairs are combinations that no training video showed. The outcome is `scores.json`, with every
pair's result, and `contact_sheet.png`, a picture of some of the videos.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers import LattePipeline
from PIL import Image, ImageDraw

from demo import shapes
from demo.judge import read, verdict

HERE = Path(__file__).parent
PAIRS = 100
FIRST_SEED = 1000
ENLARGE = 4


@dataclass(frozen=True)
class Sampling:
    """Settings of the pipeline's call."""

    steps: int = 50
    guidance: float = 2.0


@dataclass(frozen=True)
class Pair:
    """A prompt, in parts, and the seed of the starting noise."""

    combination: shapes.Combination
    seed: int


def evaluation_pairs(count: int = PAIRS) -> list[Pair]:
    """Alternates trained and held-out combinations, going round each set; every pair has a seed of its own."""
    sets = shapes.trained(), shapes.held_out()
    return [Pair(sets[i % 2][i // 2 % len(sets[i % 2])], FIRST_SEED + i) for i in range(count)]


def load_pipeline(folder: Path) -> LattePipeline:
    """The pipeline of a checkpoint folder, float32 on the CPU, without progress bars."""
    pipeline = LattePipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline: LattePipeline, pair: Pair, sampling: Sampling) -> shapes.Video:
    """Runs the pipeline for one pair; uint8 (8, 32, 32, 3)."""
    frames = pipeline(
        pair.combination.caption,
        num_inference_steps=sampling.steps,
        guidance_scale=sampling.guidance,
        video_length=shapes.FRAMES,
        height=shapes.SIZE,
        width=shapes.SIZE,
        clean_caption=False,
        generator=torch.Generator().manual_seed(pair.seed),
        output_type="np",
    ).frames[0]
    video: shapes.Video = np.rint(frames * 255).astype(np.uint8)
    return video


def judged(pair: Pair, video: shapes.Video) -> dict[str, Any]:
    """One row of the scores: the pair, what the judge read, and what of it is right."""
    reading = read(video)
    return {
        "prompt": pair.combination.caption,
        "seed": pair.seed,
        "held_out": pair.combination in shapes.held_out(),
        "read": {**asdict(reading), "minimum_iou": round(reading.minimum_iou, 4)},
        "right": asdict(verdict(reading, pair.combination)),
    }


def totals(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How many rows there are and how many are right, in each respect and in all."""
    counts = {name: sum(row["right"][name] for row in rows) for name in ("colour", "shape", "direction", "intact")}
    return {"pairs": len(rows), **counts, "all": sum(all(row["right"].values()) for row in rows)}


def score(
    folder: Path, sampling: Sampling, count: int, progress: Callable[[str], None]
) -> tuple[dict[str, Any], list[tuple[Pair, shapes.Video]]]:
    """Generates and judges; returns the content of `scores.json`, and the videos."""
    torch.set_num_threads(1)
    pipeline = load_pipeline(folder)
    videos, rows = [], []
    began = time.perf_counter()
    for pair in evaluation_pairs(count):
        videos.append((pair, generate(pipeline, pair, sampling)))
        rows.append(judged(*videos[-1]))
        progress(f"{len(rows)}/{count} {totals(rows)}")
    scores = {
        "sampling": asdict(sampling),
        "seconds_per_video": round((time.perf_counter() - began) / count, 2),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
            "numpy": np.__version__,
        },
        "totals": totals(rows),
        "totals_trained": totals([row for row in rows if not row["held_out"]]),
        "totals_held_out": totals([row for row in rows if row["held_out"]]),
        "rows": rows,
    }
    return scores, videos


def contact_sheet(videos: Sequence[tuple[Pair, shapes.Video]], columns: int = 2) -> Image.Image:
    """One strip of frames per video, enlarged without smoothing, its caption above; held-out ones are marked."""
    tile, gap, text_height = shapes.SIZE * ENLARGE, 4, 18
    width, height = shapes.FRAMES * (tile + gap) + 4 * gap, tile + text_height + 2 * gap
    lines = -(-len(videos) // columns)
    sheet = Image.new("RGB", (columns * width, lines * height), (40, 40, 40))
    draw = ImageDraw.Draw(sheet)
    excluded = set(shapes.held_out())
    for i, (pair, video) in enumerate(videos):
        left, top = i % columns * width + 2 * gap, i // columns * height + gap
        new = pair.combination in excluded
        label = f"{pair.combination.caption}   (seed {pair.seed}{', combination never trained on' if new else ''})"
        draw.text((left, top + 2), label, fill=(255, 190, 90) if new else (230, 230, 230))
        for j, frame in enumerate(video):
            enlarged = Image.fromarray(frame).resize((tile, tile), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (left + j * (tile + gap), top + text_height))
    return sheet


def write_scores(path: Path, scores: dict[str, Any]) -> None:
    """JSON with one line per pair, so that a changed result is a changed line."""
    rows = ",\n".join("  " + json.dumps(row) for row in scores["rows"])
    head = json.dumps({key: value for key, value in scores.items() if key != "rows"}, indent=1)
    path.write_text(f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n')


def scores_table(scores: dict[str, Any], training: dict[str, Any]) -> str:
    """The scores and the training time in Markdown, for the README."""
    names = ("colour", "shape", "direction", "intact", "all")
    lines = ["| pairs | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for title, key in (("all", "totals"), ("trained", "totals_trained"), ("held out", "totals_held_out")):
        part = scores[key]
        lines.append(f"| {part['pairs']} ({title}) | " + " | ".join(str(part[name]) for name in names) + " |")
    sampling, vae, denoiser = scores["sampling"], training["vae"], training["denoiser"]
    how = (
        f"Sampling: {sampling['steps']} steps, guidance {sampling['guidance']}. Training: {vae['seconds'] / 60:.0f} "
        f"minutes for the autoencoder ({vae['psnr_db']:.1f} dB), then {denoiser['samples']:,} samples in "
        f"{denoiser['seconds'] / 60:.0f} minutes for text encoder and transformer "
        f"({denoiser['samples_per_second']:.0f} samples a second), in {training['settings']['processes']} processes."
    )
    return "\n".join([*lines, "", how])


def write_table(readme: Path, table: str) -> None:
    """Puts a table between the two comments that mark its place."""
    before, start, rest = readme.read_text().partition("<!-- scores: written by `python -m demo.evaluate` -->\n")
    _, end, after = rest.partition("<!-- end of scores -->")
    if not start or not end:
        raise ValueError(f"{readme} has no place for the scores: the two comments that mark it are missing")
    readme.write_text(f"{before}{start}\n{table}\n\n{end}{after}")


def main() -> None:
    """Scores the checkpoint; scoring the shipped one also updates the README's table."""
    parser = argparse.ArgumentParser(
        prog="python -m demo.evaluate",
        description="Scores the demo checkpoint with diffusers' LattePipeline.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--checkpoint", type=Path, default=HERE / "latte", help="folder to load")
    parser.add_argument("--output", type=Path, default=HERE, help="folder for scores.json and contact_sheet.png")
    parser.add_argument("--steps", type=int, default=Sampling.steps, help="denoising steps")
    parser.add_argument("--guidance", type=float, default=Sampling.guidance, help="classifier-free guidance scale")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="how many (prompt, seed) pairs")
    arguments = parser.parse_args()
    sampling = Sampling(arguments.steps, arguments.guidance)
    scores, videos = score(arguments.checkpoint, sampling, arguments.pairs, lambda line: print(line, flush=True))
    arguments.output.mkdir(parents=True, exist_ok=True)
    write_scores(arguments.output / "scores.json", scores)
    shown = [video for first in range(0, 80, 10) for video in videos[first : first + 2]]
    contact_sheet(shown).save(arguments.output / "contact_sheet.png", optimize=True)
    if arguments.output == HERE:
        training = json.loads((HERE / "training.json").read_text())
        write_table(HERE / "README.md", scores_table(scores, training))


if __name__ == "__main__":
    main()
