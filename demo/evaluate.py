"""Scores a demo checkpoint: `python -m demo.evaluate --model latte`.

Every (prompt, seed) pair goes through the model on its own, at one fixed setting, and `demo.judge` reads the frames.
Latte's and CogVideoX's videos are made by the pipelines that diffusers ships, Open-Sora's by the loop in
`demo.models.open_sora`. Half of the pairs are combinations that no training video showed. The outcome is `scores.json`,
with every pair's result, and `contact_sheet.png`, a picture of some of the videos.
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
from PIL import Image, ImageDraw

from demo import shapes
from demo.judge import read, verdict
from demo.model import ROOT, Model, Sampling
from demo.models import MODELS

PAIRS = 100
FIRST_SEED = 1000
WIDEST = 2200
MOST_FRAMES = 9
"""Pixels of a contact sheet's width, and frames of a video in it; of longer videos it shows every second, third, …"""


@dataclass(frozen=True)
class Pair:
    """A prompt, in parts, and the seed of the starting noise."""

    combination: shapes.Combination
    seed: int


def evaluation_pairs(count: int = PAIRS) -> list[Pair]:
    """Alternates trained and held-out combinations, going round each set; every pair has a seed of its own."""
    sets = shapes.trained(), shapes.held_out()
    return [Pair(sets[i % 2][i // 2 % len(sets[i % 2])], FIRST_SEED + i) for i in range(count)]


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
    model: Model, folder: Path, sampling: Sampling, count: int, progress: Callable[[str], None]
) -> tuple[dict[str, Any], list[tuple[Pair, shapes.Video]]]:
    """Generates and judges; returns the content of `scores.json`, and the videos."""
    torch.set_num_threads(1)
    loaded = model.load(folder)
    videos, rows = [], []
    began = time.perf_counter()
    for pair in evaluation_pairs(count):
        videos.append((pair, model.generate(loaded, pair.combination.caption, pair.seed, sampling)))
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
    every = -(-len(videos[0][1]) // MOST_FRAMES)
    frames, gap, text_height = len(videos[0][1][::every]), 4, 18
    enlarge = max(1, min(4, (WIDEST // columns - 4 * gap) // frames // shapes.SIZE))
    tile = shapes.SIZE * enlarge
    width, height = frames * (tile + gap) + 4 * gap, tile + text_height + 2 * gap
    lines = -(-len(videos) // columns)
    sheet = Image.new("RGB", (columns * width, lines * height), (40, 40, 40))
    draw = ImageDraw.Draw(sheet)
    excluded = set(shapes.held_out())
    for i, (pair, video) in enumerate(videos):
        left, top = i % columns * width + 2 * gap, i // columns * height + gap
        new = pair.combination in excluded
        label = f"{pair.combination.caption}   (seed {pair.seed}{', combination never trained on' if new else ''})"
        draw.text((left, top + 2), label, fill=(255, 190, 90) if new else (230, 230, 230))
        for j, frame in enumerate(video[::every]):
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
    processes = training["settings"]["processes"]
    how = (
        f"Sampling: {sampling['steps']} steps, guidance {sampling['guidance']}. Training: {vae['seconds'] / 60:.0f} "
        f"minutes for the autoencoder ({vae['psnr_db']:.1f} dB), then {denoiser['samples']:,} samples in "
        f"{denoiser['seconds'] / 60:.0f} minutes for the transformer "
        f"({denoiser['samples_per_second']:.0f} samples a second), in {processes} process{'es' * (processes > 1)}."
    )
    return "\n".join([*lines, "", how])


def write_table(readme: Path, name: str, table: str) -> None:
    """Puts a model's table between the two comments that mark its place."""
    opening = f"<!-- scores: written by `python -m demo.evaluate --model {name}` -->\n"
    before, start, rest = readme.read_text().partition(opening)
    _, end, after = rest.partition("<!-- end of scores -->")
    if not start or not end:
        raise ValueError(f"{readme} has no place for the scores of {name}: the comments that mark it are missing")
    readme.write_text(f"{before}{start}\n{table}\n\n{end}{after}")


def main() -> None:
    """Scores a checkpoint; scoring a shipped one also updates the README's table."""
    choice = argparse.ArgumentParser(add_help=False)
    choice.add_argument("--model", choices=MODELS, default="latte", help="which demo model")
    model = MODELS[choice.parse_known_args()[0].model]
    parser = argparse.ArgumentParser(
        prog="python -m demo.evaluate",
        description="Scores a demo checkpoint.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        parents=[choice],
    )
    parser.add_argument("--checkpoint", type=Path, default=model.checkpoint, help="folder to load")
    parser.add_argument("--output", type=Path, default=model.records, help="folder for scores.json and the picture")
    parser.add_argument("--steps", type=int, default=model.sampling.steps, help="denoising steps")
    parser.add_argument("--guidance", type=float, default=model.sampling.guidance, help="guidance scale")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="how many (prompt, seed) pairs")
    options = parser.parse_args()
    sampling = Sampling(options.steps, options.guidance)
    scores, videos = score(model, options.checkpoint, sampling, options.pairs, lambda line: print(line, flush=True))
    options.output.mkdir(parents=True, exist_ok=True)
    write_scores(options.output / "scores.json", scores)
    shown = [video for first in range(0, 80, 10) for video in videos[first : first + 2]]
    contact_sheet(shown).quantize(256).save(options.output / "contact_sheet.png", optimize=True)
    if options.output == model.records:
        training = json.loads((model.records / "training.json").read_text())
        write_table(ROOT / "README.md", model.name, scores_table(scores, training))


if __name__ == "__main__":
    main()
