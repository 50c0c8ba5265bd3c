"""How a trained checkpoint is written to disk, and read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Replaces a folder by what `write` puts into the one it is given.

    The new folder is complete before it takes the place of the old one, so readers never see half a checkpoint.
    """
    fresh, stale = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("fresh", "stale"))
    for leftover in (fresh, stale):
        shutil.rmtree(leftover, ignore_errors=True)
    write(fresh)
    for file in fresh.glob("*/config.json"):
        config = json.loads(file.read_text())
        config.pop("_name_or_path", None)  # where a part was read from concerns this machine alone
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    if folder.exists():
        os.rename(folder, stale)
    os.rename(fresh, folder)
    shutil.rmtree(stale, ignore_errors=True)


def save_pipeline(folder: Path, pipeline: DiffusionPipeline) -> None:
    """Writes a folder that `from_pretrained` of the pipeline's class loads, float32, replacing what was there."""
    replace_folder(folder, pipeline.save_pretrained)


def load_pipeline(kind: type[DiffusionPipeline], folder: Path) -> Any:
    """The pipeline of that kind that a folder holds, float32 on the CPU, without progress bars."""
    pipeline = kind.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
