"""The models that are measured: random weights in the published configurations, or small enough to try the script."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zoo import PUBLISHED, family_of

# Of the text encoder only its width is seen by what is measured here.
NARROW_TEXT = {"d_model": 4096}


def write_checkpoint(model: str, small: bool, folder: Path) -> None:
    """Write a random checkpoint of the model."""
    published = PUBLISHED[model]
    real = {part: published.files[f"{part}/config.json"] for part in ("transformer", "vae")} | {"text": NARROW_TEXT}
    family_of(model).write_random(folder, **(published.small if small else real))


def video_size(model: str, small: bool) -> dict[str, Any]:
    """The sizes to export it for, as fields of an ExportRequest."""
    published = PUBLISHED[model]
    return dict(published.small_sizes if small else next(iter(published.sizes.values())))
