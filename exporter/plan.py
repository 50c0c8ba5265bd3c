"""What an export would write and what that takes, told before anything is downloaded or written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..engines.manifest import stream_bytes_per_row
from .checkpoint import Checkpoint
from .coverage import check_coverage, has_any_weights
from .hub import cache_free_bytes, free_bytes, on_one_disk
from .models.base import ExportRequest, PartPlan, Split

GUIDED_ROWS = 2  # of one prompt


@dataclass(frozen=True)
class ExportPlan:
    """What an export would write; sizes in bytes. `cache_bytes` is for one prompt with guidance (two rows).

    `vae_dtype` is None where it is `dtype`; `flow_shift` is the scheduler's `value`, and the `reason` for it, or None.
    `download_bytes` is what has to be downloaded first, `revision` and `variant` what of the checkpoint is read.
    """

    model: str
    checkpoint: str
    output: str
    dtype: str
    vae_dtype: str | None
    opset: int
    flow_shift: dict[str, Any] | None
    shape: dict[str, int]
    parts: dict[str, int]
    kinds: int
    blocks: int
    bundle_bytes: int
    cache_bytes: int
    free_disk_bytes: int
    revision: str | None
    variant: str | None
    download_bytes: int
    loras: tuple[str, ...]
    cautions: tuple[str, ...]


def plan_export(
    model: str, request: ExportRequest, opset: int, checkpoint: Checkpoint, split: Split, output: Path
) -> ExportPlan:
    """The plan of one export. Raises CheckpointError for weights that are not those that it would read."""
    checked = not checkpoint.is_local or has_any_weights(checkpoint)
    if checked:
        check_coverage(split, checkpoint)
    shape = split.shape
    parts = {plan.name: _weight_bytes(plan) for plan in split.parts}
    row = sum(stream_bytes_per_row(plan.part, split.streams, split.ranges) for plan in split.blocks)
    free = free_bytes(output.absolute().parent)
    download = checkpoint.download_bytes if checked else 0
    bundle = sum(parts.values())
    unchecked = () if checked else (f"checkpoint {checkpoint.name} has configurations alone; no weights were checked",)
    return ExportPlan(
        model=model,
        checkpoint=checkpoint.name,
        output=str(output),
        dtype=request.dtype,
        vae_dtype=request.vae_dtype,
        opset=opset,
        flow_shift=None if split.flow_shift is None else asdict(split.flow_shift),
        shape={"height": shape.height, "width": shape.width, "frames": shape.frames, "max_batch": shape.max_batch},
        parts=parts,
        kinds=len({plan.kind for plan in split.blocks}),
        blocks=len(split.blocks),
        bundle_bytes=bundle,
        cache_bytes=GUIDED_ROWS * row,
        free_disk_bytes=free,
        revision=checkpoint.revision,
        variant=checkpoint.read_variant if checked else None,
        download_bytes=download,
        loras=tuple(lora.described for lora in checkpoint.loras),
        cautions=(*split.cautions, *unchecked, *_cautions_of_room(output.absolute().parent, download, bundle, free)),
    )


def _weight_bytes(plan: PartPlan) -> int:
    return sum(p.numel() * p.element_size() for p in plan.module.parameters())


def _cautions_of_room(here: Path, download: int, bundle: int, free: int) -> Iterator[str]:
    cache, room = cache_free_bytes()
    if download and on_one_disk(cache, here):
        download, bundle = 0, download + bundle
    if download > room:
        yield f"the download takes {_mebi(download)}, and {cache} has {_mebi(room)} free; set HF_HOME elsewhere"
    if bundle > free:
        yield f"what is written takes {_mebi(bundle)}, and {here} has {_mebi(free)} free; choose another output"


def _mebi(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"
