"""The models that are measured: random weights in the published configurations, or small enough to try the script."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.published import PUBLISHED

# Of the text encoder only its width is seen by what is measured here.
NARROW_TEXT = {"d_model": 4096}
# TensorRT-RTX has no fused attention in fp32 for narrower heads.
HEAD_DIM = 16


@dataclass(frozen=True)
class Model:
    """One that can be measured: the function in benchmarks/checkpoints.py that writes it, and what it is asked for.

    `size` are the sizes of the video, as `export` takes them; `small` are those of a checkpoint to try the script with.
    """

    writer: str
    size: Mapping[str, Any] = field(default_factory=dict)
    small: Mapping[str, Any] = field(default_factory=dict)


MODELS = {
    "latte": Model("random_latte", small={"head_dim": HEAD_DIM}),
    "cogvideox-2b": Model("random_cogvideox", small={"head_dim": HEAD_DIM}),
    "cogvideox-5b": Model("random_cogvideox", small={"head_dim": HEAD_DIM, "rotary": True}),
    "open-sora": Model(
        "random_open_sora",
        size={"resolution": "480p", "duration": "2s"},
        small={"head_dim": HEAD_DIM, "text_tokens": 32},
    ),
}


def write_checkpoint(model: str, small: bool, folder: Path) -> None:
    """Write a random checkpoint of the model."""
    from benchmarks import checkpoints

    row, published = MODELS[model], PUBLISHED[model]
    real = {part: published[f"{part}/config.json"] for part in ("transformer", "vae")} | {"text": NARROW_TEXT}
    getattr(checkpoints, row.writer)(folder, **(row.small if small else real))


def video_size(model: str, small: bool) -> dict[str, Any]:
    """The sizes to export it for, as fields of an ExportRequest."""
    return {} if small else dict(MODELS[model].size)
