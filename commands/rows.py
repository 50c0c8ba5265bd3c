"""Rows and lines that several commands print."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ..engines.wording import MEBI, plural

if TYPE_CHECKING:
    from ..engines.compiled import Compiled
    from ..engines.manifest import LoraRecord, PolicyProfile


def compiled_row(compiled: Compiled) -> dict[str, Any]:
    """A bundle's engines for one backend, as --json shows them."""
    index = compiled.index
    return {
        "folder": str(compiled.folder),
        "backend": index.backend,
        "target": index.target,
        "settings": index.settings,
        "plan_bytes": compiled.plan_bytes,
        "scratch_bytes": compiled.scratch_bytes,
        "parts": {
            name: {
                "plan_bytes": part.record.bytes,
                "scratch_bytes": part.scratch_bytes,
                "fused_attention": part.fused_attention,
                "build_seconds": part.build_seconds,
            }
            for name, part in sorted(index.parts.items())
        },
    }


def describe_compiled(compiled: Compiled) -> list[str]:
    """The same for people."""
    index, apart = compiled.index, compiled.taken_apart
    lines = [
        f"{compiled.folder}: {len(index.parts)} engines, {compiled.plan_bytes / MEBI:.1f} MiB",
        f"for: {', '.join(index.target.values())}",
        f"scratch: {compiled.scratch_bytes / MEBI:.1f} MiB, one buffer for all",
    ]
    if apart:
        lines.append(f"attention is not fused in {len(apart)} of them, so its scores take memory: {', '.join(apart)}")
    return lines


def describe_source(source: Any) -> str:
    """The checkpoint of a plan or a manifest, with its revision and variant if it has any."""
    told = [f"{name} {value}" for name in ("revision", "variant") if (value := getattr(source, name)) is not None]
    return ", ".join([source.checkpoint, *told])


def describe_loras(loras: Iterable[LoraRecord]) -> list[str]:
    """A line for each LoRA that a bundle's weights were merged with."""
    return [
        f"lora: {lora.file}, scale {lora.scale:g}{f', for {lora.component}' if lora.component else ''}, "
        f"SHA-256 {lora.sha256[:12]}"
        for lora in loras
    ]


def describe_dtypes(made: Any) -> str:
    """Those of a plan or a manifest."""
    return str(made.dtype) if made.vae_dtype in (None, made.dtype) else f"{made.dtype}, decoder {made.vae_dtype}"


def describe_profiles(profiles: Iterable[PolicyProfile]) -> list[str]:
    """A line for each profile of a bundle."""
    return [
        f"profile {profile.name}, {profile.steps} steps: {_policy(profile)}; {_held_out(profile)}"
        for profile in profiles
    ]


def decibels(value: float | None) -> str:
    """A PSNR; of identical videos there is none."""
    return "identical" if value is None else f"{value:.1f} dB"


def _policy(profile: PolicyProfile) -> str:
    chosen = [f"{name}={value}" for name, value in profile.settings.items() if value is not None]
    return f"{profile.policy}:{','.join(chosen)}" if chosen else profile.policy


def _held_out(profile: PolicyProfile) -> str:
    measured = profile.held_out
    return (
        f"{100 * measured.share_skipped:.1f} % skipped, PSNR {decibels(measured.worst_psnr_db)} at worst, "
        f"{decibels(measured.psnr_db)} pooled ({plural(measured.pairs, 'pair')} held out)"
    )


def caution(text: str) -> str:
    """The line of what the user should know of a checkpoint or of sizes."""
    return f"caution: {text}"
