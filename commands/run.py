"""`foresight run`: a video of a prompt, or of every prompt of a file."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..engines.errors import InvalidRequest
from ..engines.wording import MEBI
from .completion import bundle_folders
from .console import Row, current_session, print_lines, print_result, progress
from .loading import Engines, engine_options
from .options import PATH, common, given, group, policy_options, typed_of_policy

if TYPE_CHECKING:
    from ..evaluation.comparison import Comparison
    from ..runtime.pipeline import VideoPipeline
    from ..runtime.policies import Policy
    from ..runtime.request import VideoRequest
    from ..runtime.video import Video
    from .outputs import Targets


@dataclass(frozen=True)
class Asked:
    """What is asked of every video; None is the bundle's default."""

    prompt: str | None
    prompts: Path | None
    negative_prompt: str | None
    steps: int | None
    guidance: float | None
    guidance_2: float | None
    seed: int


@dataclass(frozen=True)
class Outputs:
    """Where to write what."""

    save_latents: Path | None
    save_frames: Path | None
    output: Path | None
    report: Path | None
    trace: Path | None

    def targets(self) -> Targets:
        """Checked. Raises InvalidRequest, OutputError."""
        from .outputs import Targets

        wants_arrays = self.save_latents or self.save_frames
        video = self.output or (None if wants_arrays else Path("video.mp4"))
        targets = Targets(video, self.save_frames, self.save_latents, self.report, self.trace)
        targets.check()
        return targets


@click.command()
@click.option("--bundle", type=PATH, shell_complete=bundle_folders, help="[default: the newest under bundles/]")
@group(
    "asked",
    Asked,
    click.option("--prompt", help="[default: the bundle's sample prompt]"),
    click.option("--prompts", type=PATH, help="A file with one prompt a line; one video each."),
    click.option("--negative-prompt", help="[default: the bundle's]"),
    click.option("--steps", type=int, help="Denoising steps, 1 to 100.  [default: the bundle's]"),
    click.option("--guidance", type=float, help="1 switches it off.  [default: the bundle's]"),
    click.option("--guidance-2", type=float, help="Of a second transformer.  [default: --guidance, or the bundle's]"),
    click.option(
        "--seed", type=int, default=0, show_default=True, help="Of the initial noise; line i of a file adds i."
    ),
)
@policy_options
@click.option("--profile", help="A policy that the bundle has by name, for this number of steps; see inspect.")
@click.option("--latents", type=PATH, help="Initial noise (.npy, fp32) instead of --seed.")
@group(
    "outputs",
    Outputs,
    click.option("--save-latents", type=PATH, help="Write the final latents (.npy)."),
    click.option("--save-frames", type=PATH, help="Write the frames (.npy, uint8, F H W 3)."),
    click.option("--output", type=PATH, help=".mp4, .gif, .npy, a folder; one frame: .png.  [default: video.mp4]"),
    click.option("--report", type=PATH, help="Write a page that shows what was skipped (.html)."),
    click.option("--trace", type=PATH, help="Write what every step did and measured (.json)."),
)
@click.option("--compare", is_flag=True, help="Run without reuse too; report PSNR, SSIM and the time saved.")
@engine_options
@common
def run(
    bundle: Path | None,
    asked: Asked,
    policy: Policy | None,
    profile: str | None,
    latents: Path | None,
    outputs: Outputs,
    compare: bool,
    engines: Engines,
    as_json: bool,
) -> None:
    """Make a video of a prompt, skipping the blocks that would hardly change."""
    from ..runtime.request import VideoRequest
    from .outputs import read_latents

    typed, finished = given(), current_session().finished
    _check_profile(profile)
    texts = _read_prompts(asked.prompt, asked.prompts)
    targets = outputs.targets()
    noise = read_latents(latents) if latents else None
    pipeline = engines.load(bundle)
    targets.check_frames(pipeline.manifest.shape.frames)
    texts = texts or [pipeline.manifest.defaults.prompt]
    policy = policy if profile is None else pipeline.profile(profile, asked.steps)
    requests = [
        VideoRequest(
            text,
            asked.negative_prompt,
            asked.steps,
            asked.guidance,
            asked.seed + line,
            policy=policy,
            latents=noise,
            guidance_2=asked.guidance_2,
        )
        for line, text in enumerate(texts)
    ]
    if compare:  # so that neither pays for what only the first request does
        with progress("warming up: ") as show:
            pipeline.generate(replace(requests[0], policy=None, steps=1), on_progress=show)
    for line, request in enumerate(requests):
        finished.append(_make(pipeline, request, targets.numbered(line, len(requests)), compare, typed))
        if not as_json:
            print_lines(_describe(finished[-1]))
    if as_json:
        print_result(finished[0] if len(texts) == 1 else finished, as_json, [])


def _check_profile(profile: str | None) -> None:
    """Raises InvalidRequest where a policy was typed too."""
    if profile is not None and (typed := typed_of_policy()):
        raise InvalidRequest(
            f"profile: got --profile and {', '.join(typed)}, expected one of them: a profile is a policy and "
            "its settings"
        )


def _read_prompts(prompt: str | None, file: Path | None) -> list[str]:
    if prompt is not None and file is not None:
        raise InvalidRequest("prompt: got --prompt and --prompts, expected one of them")
    if file is None:
        if prompt is not None and not prompt.strip():
            raise InvalidRequest("prompt: got an empty text, expected some words; leave --prompt out for the sample")
        return [] if prompt is None else [prompt]
    from .outputs import read_prompts

    return read_prompts(file)


def _make(
    pipeline: VideoPipeline, request: VideoRequest, targets: Targets, compare: bool, given: Collection[str]
) -> Row:
    """Make and write one video; what is left of it in memory is its row."""
    from ..evaluation.comparison import compare_in_turns
    from ..runtime.notes import next_setting, notes_on
    from ..runtime.policies import NoReuse

    comparison = None
    if compare:
        comparison = compare_in_turns(
            lambda: _generate(pipeline, request, "with reuse: "),
            lambda: _generate(pipeline, replace(request, policy=NoReuse()), "without reuse: "),
        )
    video = comparison.video if comparison else _generate(pipeline, request)
    trace, manifest = video.trace, pipeline.manifest
    notes = notes_on(trace, given, draws_noise=pipeline.draws_noise(trace.steps_requested))
    advice = next_setting(trace, manifest.profiles, can_forecast=pipeline.can_forecast(trace.steps_requested))
    with progress() as show:
        written = targets.write(video, comparison.reference if comparison else None, advice, show)
    return {
        "bundle": str(pipeline.bundle.path),
        "model": manifest.model,
        **_row(video, written),
        **({"compared": _comparison_row(comparison)} if comparison else {}),
        "notes": [*manifest.cautions, *notes],
        "next": None if advice is None else advice._asdict(),
    }


def _generate(pipeline: VideoPipeline, request: VideoRequest, label: str = "") -> Video:
    interrupts = current_session().interrupts
    with progress(label) as show:
        (video,) = pipeline.generate(request, on_progress=show, cancel=interrupts)
    return video


def _row(video: Video, written: list[Path]) -> Row:
    trace = video.trace
    summary: Row = {
        "prompt": video.prompt,
        "seed": video.seed,
        "files": [str(path) for path in written],
        "policy": trace.policy,
        "frames": list(video.frames.shape),
        "blocks_computed": trace.blocks_computed,
        "blocks_reused": trace.blocks_reused,
        "blocks_dead": trace.blocks_dead,
        "blocks_forecast": trace.blocks_forecast,
        "blocks_possible": trace.blocks_possible,
        "share_skipped": trace.share_skipped,
        "text_ms": trace.text_ms,
        "denoise_ms": trace.denoise_ms,
        "decode_ms": trace.decode_ms,
        "cache_bytes": trace.cache_bytes,
        "uncached": list(trace.uncached),
        "planned_bytes": trace.planned_bytes,
        "device_bytes": trace.device_bytes,
    }
    if trace.truncated_prompts:
        summary["truncated"] = True
    return summary


def _comparison_row(comparison: Comparison) -> Row:
    decibel = comparison.psnr_db
    return {
        "denoise_ms": comparison.reference.trace.denoise_ms,
        "speedup": comparison.speedup,
        "speedups": list(comparison.speedups),
        "ceiling": comparison.ceiling if math.isfinite(comparison.ceiling) else None,
        "noisy": comparison.noisy,
        "psnr_db": decibel if math.isfinite(decibel) else None,
        "ssim": comparison.ssim,
        "identical": math.isinf(decibel),
    }


def _describe(row: Row) -> list[str]:
    steps = row["blocks_possible"]
    frames, height, width, _ = row["frames"]
    lines = [f"{path}" for path in row["files"]]
    lines.append(
        f"made by {row['bundle']} ({row['model']}) of {row['prompt']!r}, seed {row['seed']}: "
        f"{frames} frames of {height} x {width}"
    )
    forecast = f", {row['blocks_forecast']} forecast" if row["blocks_forecast"] else ""
    lines.append(
        f"blocks: {row['blocks_computed']} of {steps} run, {row['blocks_reused']} reused, {row['blocks_dead']} dead"
        f"{forecast} ({100 * row['share_skipped']:.1f} % skipped)"
    )
    lines.append(
        f"time: text {row['text_ms']:.0f} ms, denoising {row['denoise_ms']:.0f} ms, "
        f"decoding {row['decode_ms']:.0f} ms; cache {row['cache_bytes'] / MEBI:.1f} MiB"
    )
    if row["uncached"]:
        lines.append(f"no room to cache, so always run: {', '.join(row['uncached'])}")
    if "compared" in row:
        lines += _describe_comparison(row["compared"])
    lines += [f"note: {note}" for note in row["notes"]]
    if row["next"]:
        lines.append("next: {setting} ({reason})".format(**row["next"]))
    return lines


def _describe_comparison(row: Row) -> list[str]:
    pairs, ceiling = row["speedups"], row["ceiling"]
    quality = "identical" if row["identical"] else f"PSNR {row['psnr_db']:.1f} dB, SSIM {row['ssim']:.4f}"
    spread = "one pair of runs" if len(pairs) == 1 else f"{min(pairs):.2f} to {max(pairs):.2f} in {len(pairs)} pairs"
    most = "" if ceiling is None else f"; by the blocks that ran, about {ceiling:.2f}x"
    lines = [
        f"against no reuse ({row['denoise_ms']:.0f} ms): {row['speedup']:.2f}x as fast ({spread}{most}), {quality}"
    ]
    if row["noisy"]:
        lines.append("note: speed-up: the machine is noisy, so the times tell little; measure again when it is idle")
    return lines
