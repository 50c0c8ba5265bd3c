"""What a demo model consists of: how it is trained, loaded and sampled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo import shapes
from demo.training import Clock, Settings

ROOT = Path(__file__).parent


@dataclass(frozen=True)
class Sampling:
    """Denoising steps and the scale of classifier-free guidance."""

    steps: int
    guidance: float


@dataclass(frozen=True)
class Model:
    """One of the demo models.

    Attributes:
        name: of its checkpoint's folder and of the folder of its records.
        frames: of its videos.
        settings: of its training, by default.
        stages: of its training, in order; each returns whether it is complete.
        sampling: the fixed setting at which it is scored.
        load: whatever `generate` needs, from a checkpoint folder: float32, on the CPU.
        generate: one video for a prompt and the seed of its starting noise, uint8 (frames, 32, 32, 3).
    """

    name: str
    frames: int
    settings: Settings
    stages: tuple[Callable[[Settings, Clock], bool], ...]
    sampling: Sampling
    load: Callable[[Path], Any]
    generate: Callable[[Any, str, int, Sampling], shapes.Video]

    @property
    def checkpoint(self) -> Path:
        """The shipped checkpoint."""
        return ROOT / self.name

    @property
    def records(self) -> Path:
        """Folder of `scores.json`, `training.json` and `contact_sheet.png`."""
        return ROOT / "records" / self.name
