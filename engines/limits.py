"""How large a bundle may be at most, in whatever its manifest says.

A manifest is written by whoever made the bundle. What the runtime allocates, multiplies, prints and loops over is
bounded here, far above any model there is, before anything else looks at it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import msgspec

from .manifest import DTYPE_BYTES, Manifest, part_files

MANIFEST_BYTES = 16 << 20
INDEX_BYTES = 16 << 20
GRAPH_BYTES = 64 << 20
TOKENIZER_BYTES = 256 << 20
TABLE_BYTES = 256 << 20

MOST_STEPS = 1000
MOST_TENSOR_BYTES = 1 << 40
MOST_TEXT = 20_000  # characters of any string
MOST_NAME = 200
MOST_ENTRIES = 10_000  # of any list or table
MOST_NUMBER = 1 << 48
SHA256 = re.compile(r"[0-9a-f]{64}")

# Of `shape`, `text`, `sampler` and `defaults`.
MOST: dict[tuple[str, str], int] = {
    ("shape", "height"): 1 << 16,
    ("shape", "width"): 1 << 16,
    ("shape", "frames"): 1 << 20,
    ("shape", "max_batch"): 1 << 12,
    ("text", "max_tokens"): 1 << 17,
    ("text", "pad_id"): 1 << 31,
    ("sampler", "max_steps"): MOST_STEPS,
    ("defaults", "steps"): MOST_STEPS,
    ("defaults", "guidance"): 10_000,
    ("defaults", "fps"): 1000,
}


def excesses(manifest: Manifest) -> Iterator[str]:
    """Everything in the manifest that is beyond what may be, in words; nothing for a sound one."""
    yield from _anywhere(msgspec.to_builtins(manifest), "it")
    for (group, name), most in MOST.items():
        got = getattr(getattr(manifest, group), name)
        if got > most:
            yield f"{group}.{name} is {got}, expected at most {most}"
    for group, name in (("text", "max_tokens"), ("sampler", "max_steps")):
        if getattr(getattr(manifest, group), name) < 1:
            yield f"{group}.{name} is {getattr(getattr(manifest, group), name)}, expected at least 1"
    most = MOST["defaults", "guidance"]
    for expert in manifest.later_experts:
        if expert.guidance > most:
            yield f"{expert.prologue.name}: the default guidance is {expert.guidance}, expected at most {most}"
    if manifest.text.pad_id < 0:
        yield f"text.pad_id is {manifest.text.pad_id}, expected at least 0"
    yield from _in_files(manifest)
    yield from _in_tensors(manifest)


def _anywhere(value: Any, place: str) -> Iterator[str]:
    """Strings, numbers and counts, wherever they are."""
    if isinstance(value, str):
        if len(value) > MOST_TEXT:
            yield f"{place} has {len(value)} characters, expected at most {MOST_TEXT}"
        elif any(not character.isprintable() and character not in "\n\t" for character in value):
            yield f"{place} is {ascii(value)[1:41]}, with characters that cannot be printed"
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        if not abs(value) <= MOST_NUMBER:
            yield f"{place} is {value}, expected at most {MOST_NUMBER}"
    elif isinstance(value, (list, tuple, dict)):
        if len(value) > MOST_ENTRIES:
            yield f"{place} has {len(value)} entries, expected at most {MOST_ENTRIES}"
            return
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(key, str):
                if len(key) > MOST_NAME or not key.isprintable():
                    yield f"{place} has a name {ascii(key)[1:41]}, expected a printable one up to {MOST_NAME}"
                    return
                yield from _anywhere(item, f"{key}")
            else:
                yield from _anywhere(item, place)


def _in_files(manifest: Manifest) -> Iterator[str]:
    """Which files there are: two for each part, of its own, and no others. And how large they are, and hashed."""
    names = [name for part in manifest.parts for name in part_files(part)]
    names += [manifest.text.tokenizer, manifest.sampler.table]
    for name in sorted(set(names)):
        if names.count(name) > 1:
            yield f"{name} is used more than once, expected a file for each use"
    for name in sorted(set(names) ^ set(manifest.files)):
        yield f"{name} is used but has no hash" if name in names else f"{name} has a hash but no use"
    most = {part.graph: GRAPH_BYTES for part in manifest.parts}
    most |= {manifest.text.tokenizer: TOKENIZER_BYTES, manifest.sampler.table: TABLE_BYTES}
    for name, record in manifest.files.items():
        if not 0 <= record.bytes <= most.get(name, MOST_NUMBER):
            yield f"{name} has {record.bytes} bytes, expected at most {most.get(name, MOST_NUMBER)}"
        if not SHA256.fullmatch(record.sha256):
            yield f"{name} has {record.sha256[:40]!r} for its SHA-256"


def _in_tensors(manifest: Manifest) -> Iterator[str]:
    """Products: what one tensor takes where every named dimension is as large as it may be."""
    sizes = manifest.largest()
    for part in manifest.parts:
        for name in (part.name, part.kind, *(spec.name for spec in (*part.inputs, *part.outputs))):
            if not name or len(name) > MOST_NAME or "\n" in name:
                yield f"a part or tensor is called {name[:40]!r}, expected a name of 1 to {MOST_NAME} characters"
        for spec in (*part.inputs, *part.outputs):
            dims = [dim if isinstance(dim, int) else sizes.get(dim, 1) for dim in spec.shape]
            if math.prod(dims) * DTYPE_BYTES[spec.dtype] > MOST_TENSOR_BYTES or len(dims) > 8:
                yield f"{part.name}: {spec.name} is of {spec.shape}, expected 8 dimensions and 1 TiB at most"
    shape = manifest.shape
    rows = shape.max_batch * (math.prod(shape.latents) * 4 + shape.frames * shape.height * shape.width * 3)
    if rows > MOST_TENSOR_BYTES:
        yield f"{shape.max_batch} videos of {shape.frames} frames of {shape.height} x {shape.width} are over 1 TiB"
