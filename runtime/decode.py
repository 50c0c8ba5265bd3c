"""From latents to frames: the stages of a bundle's decoder, one after the other, each a chunk at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from ..engines.arrays import Array, Arrays
from ..engines.backend import Engine
from ..engines.manifest import Manifest, Stage, chunk_sizes, left_by
from .admission import CancelToken, check_cancelled
from .parts import Check, run_part


def decode(
    manifest: Manifest,
    engines: Mapping[str, Engine],
    arrays: Arrays,
    latents: Array,
    to_host: bool,
    check: Check,
    cancel: CancelToken | None = None,
    made_chunk: Callable[[Array | None], object] = lambda frames: None,
) -> Array:
    """One video's latents to frames (F, H, W, 3) uint8; with `to_host` every chunk of them goes there when it is made.

    `engines` are those of all the decoder's parts, by name. `check` is told what each chunk became. `cancel`
    is looked at after every chunk, when `made_chunk` was told the frames that it became, or None in the stages before
    the last. Raises EngineError, Cancelled.
    """
    frames = latents
    for stage in manifest.decoder:
        leaving = to_host and stage is manifest.decoder[-1]
        chunks = _run_stage(manifest, stage, engines, arrays, frames, check)
        made = []
        for chunk in chunks:
            made.append(arrays.to_host(chunk) if leaving else chunk)
            made_chunk(made[-1] if stage is manifest.decoder[-1] else None)
            check_cancelled(cancel, "while its frames were decoded")
        frames = (np if leaving else arrays.xp).concatenate(made)
    return frames


def _run_stage(
    manifest: Manifest, stage: Stage, engines: Mapping[str, Engine], arrays: Arrays, sequence: Array, check: Check
) -> Iterator[Array]:
    """What each chunk of the sequence becomes; what one leaves behind is given to the next."""
    first = 0
    left: dict[str, Array] = {}
    for part, length in stage.plan:
        chunk = sequence[(slice(None),) * stage.axis + (slice(first, first + length),)]
        first += length
        inputs = {part.inputs[0].name: arrays.xp.ascontiguousarray(chunk), **left}
        made = run_part(
            engines[part.name], part, arrays, inputs, manifest.largest(**chunk_sizes(part, stage.axis, length))
        )
        check(part, made)
        left = {spec.name.removeprefix("new_"): made[spec.name] for spec in left_by(part)}
        yield made[part.outputs[0].name]
