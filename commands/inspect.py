"""`foresight inspect`: what a bundle holds, and the memory that a request needs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..engines.wording import MEBI
from .console import print_result
from .options import bundle_argument, common
from .rows import (
    caution,
    compiled_row,
    describe_compiled,
    describe_dtypes,
    describe_loras,
    describe_profiles,
    describe_source,
)

if TYPE_CHECKING:
    from ..engines.bundle import Bundle
    from ..engines.compiled import Compiled


@click.command()
@bundle_argument
@common
def inspect(bundle: Path | None, as_json: bool) -> None:
    """Show what a bundle holds, without loading any of it."""
    from ..engines.bundle import newest_bundle, open_bundle
    from ..engines.compiled import list_compiled

    opened = open_bundle(bundle or newest_bundle())
    engines = [compiled for compiled in list_compiled(opened) if compiled.index.bundle == opened.id]
    row = _row(opened, engines)
    lines = _describe(opened, row)
    for compiled in engines:
        lines += ["", *describe_compiled(compiled)]
    print_result(row, as_json, lines)


def _row(bundle: Bundle, engines: Sequence[Compiled]) -> dict[str, Any]:
    import msgspec

    manifest = bundle.manifest
    return {
        "bundle": str(bundle.path),
        "id": bundle.id,
        "bytes": sum(record.bytes for record in manifest.files.values()),
        "cache_bytes": {"one_prompt": manifest.cache_bytes(1), "one_prompt_guided": manifest.cache_bytes(2)},
        "memory_of_one_guided_prompt": _memory(bundle, engines),
        "manifest": msgspec.to_builtins(manifest),
        "profiles": msgspec.to_builtins(manifest.profiles),
        "engines": [compiled_row(compiled) for compiled in engines],
    }


def _memory(bundle: Bundle, engines: Sequence[Compiled]) -> list[dict[str, Any]]:
    from ..runtime.memory import plan_memory

    return [
        {"backend": None if compiled is None else compiled.folder.name, **plan.to_dict()}
        for compiled in (None, *engines)
        for low_memory in (False, True)
        for plan in [plan_memory(bundle.manifest, low_memory=low_memory, compiled=compiled)]
    ]


def _describe(bundle: Bundle, row: dict[str, Any]) -> list[str]:
    from ..engines.manifest import part_files

    manifest = bundle.manifest
    shape = manifest.shape
    lines = [
        f"{bundle.path}: id {bundle.id[:12]}, {row['bytes'] / MEBI:.1f} MiB",
        f"model: {manifest.model} ({manifest.family}), {describe_dtypes(manifest)}, ONNX opset {manifest.opset}",
        f"video: {shape.frames} frames of {shape.height} x {shape.width}, up to {shape.max_batch} prompts at once",
        f"cache per prompt: {manifest.cache_bytes(2) / MEBI:.1f} MiB, {manifest.cache_bytes(1) / MEBI:.1f} unguided",
        *map(_describe_memory, row["memory_of_one_guided_prompt"]),
        f"sampler: {manifest.sampler.scheduler}, 1 to {manifest.sampler.max_steps} steps",
        f"source: {describe_source(manifest.source)}, SHA-256 {manifest.source.sha256[:12]}",
        *describe_loras(manifest.loras),
        *map(caution, manifest.cautions),
        *(describe_profiles(manifest.profiles) or ["profiles: none"]),
        "",
        f"{'part':14} {'kind':16} {'MiB':>9}  difference from eager",
    ]
    for part in manifest.parts:
        part_bytes = sum(manifest.files[name].bytes for name in part_files(part))
        lines.append(f"{part.name:14} {part.kind:16} {part_bytes / MEBI:9.2f}  {part.max_difference:.2g}")
    return lines


def _describe_memory(row: dict[str, Any]) -> str:
    name = row["backend"] or "onnxruntime"
    known = row["scratch"] is not None
    scratch = f"scratch {row['scratch'] / MEBI:.1f}, " if known else ""
    return (
        f"memory of a guided prompt, {name}{', --low-memory' if row['low_memory'] else ''}: "
        f"{row['total'] / MEBI:.1f} MiB {'at most' if known else 'and the scratch of ONNX Runtime'} "
        f"(weights {row['weights'] / MEBI:.1f}, {scratch}stream and cache {row['cache'] / MEBI:.1f})"
    )
