"""One request as one HTML page: what was made, what was skipped, what that cost and saved.

The page is a file that can be mailed: everything is inside it, nothing is fetched, and it shows only what was
measured. The trace becomes words here, frames become pictures in film.py and plots in charts.py; page.html lays them
out.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...engines.errors import InvalidRequest, quoted
from ...engines.wording import plural
from ...runtime.notes import Advice
from ...runtime.policies import NoReuse, policy_of_settings
from ...runtime.trace import Trace, turns_of
from ...runtime.video import Video
from ...runtime.whole import write_whole
from ..quality import psnr, ssim
from .charts import bars, block_map, changes, hover, step_ticks
from .film import film
from .templates import check_libraries, render
from .wording import decibels, duration, in_turns, memory, policy_words, similarity

# What a trace and that of its reference must have in common.
COMPARABLE = (
    "bundle",
    "prompts",
    "negative_prompts",
    "steps_requested",
    "guidances",
    "later_guidances",
    "latents_given",
    "backend",
)


def write_report(
    video: Video, path: str | os.PathLike[str], *, reference: Video | None = None, advice: Advice | None = None
) -> Path:
    """Write a self-contained HTML page about `video` and its trace; returns the path.

    `reference` is the same request with policy none, on the same bundle and backend: with it the page also shows what
    reuse saved, and PSNR and SSIM against it. `advice` is what the page says to try next, see
    `runtime.notes.next_setting`. Both videos are only read. The page appears whole or not at all.

    Raises InvalidRequest where `reference` is not the same request, OutputError where jinja2 or Pillow is missing or
    the page cannot be written.
    """
    check_libraries()
    if video.trace.summary is not None:
        raise InvalidRequest("trace: got a summary, expected that of all steps; make the video with trace full")
    if reference is not None:
        _check_reference(video, reference)
    page = render("page.html", _page(video, reference, advice))
    return write_whole(Path(path), lambda target: target.write_bytes(page))


def _check_reference(video: Video, reference: Video) -> None:
    policy = reference.trace.policy["name"]
    if policy != NoReuse.name:
        raise InvalidRequest(f"reference: got policy {policy}, expected {NoReuse.name}, to compare reuse with")
    mine, other = (
        {"prompt": v.prompt, "seed": v.seed, "frames": v.frames.shape}
        | {name: getattr(v.trace, name) for name in COMPARABLE}
        for v in (video, reference)
    )
    for name, expected in mine.items():
        if other[name] != expected:
            raise InvalidRequest(
                f"reference: got {name} {quoted(other[name])}, expected {quoted(expected)} as in the video"
            )


def _page(video: Video, reference: Video | None, advice: Advice | None) -> dict[str, Any]:
    trace = video.trace
    other = reference.trace if reference is not None else None
    return {
        "prompt": video.prompt,
        "facts": _facts(video),
        "notes": _notes(video),
        "advice": advice,
        "comparable": reference is None and trace.policy["name"] != NoReuse.name,
        "bundle": trace.bundle,
        "tiles": _tiles(video, reference),
        "calls": _calls(trace),
        "times": _times(trace, other),
        "compared": reference is not None,
        "film": film(video.frames, video.fps, None if reference is None else reference.frames),
        "steps": len(trace.steps),
        "step_ticks": step_ticks(len(trace.steps)),
        "map": block_map(trace),
        "changes": changes(trace),
        "bars": bars(trace, other),
        "hover": hover(trace, other),
    }


def _facts(video: Video) -> list[tuple[str, str]]:
    trace = video.trace
    count, height, width, _ = video.frames.shape
    backend = dict(trace.backend)
    engine = f"{backend.pop('backend', '')} {backend.pop('version', '')}".strip()
    noise = "noise given as latents" if trace.latents_given else f"seed {video.seed}"
    guidance = ", then ".join(
        " and ".join(f"{number:g}" for number in dict.fromkeys(own))
        for own in (trace.guidances, *trace.later_guidances)
    )
    facts = [
        ("Model", f"{trace.model}, {plural(len(trace.blocks), 'block')}"),
        ("Policy", _policy_words(trace)),
        ("Sampling", f"{plural(trace.steps_requested, 'step')}, guidance {guidance}, {noise}"),
        ("Video", f"{plural(count, 'frame')} of {width} × {height}, {video.fps} per second"),
        ("Backend", ", ".join([engine, *(f"{name} {value}" for name, value in backend.items())])),
        ("Bundle", trace.bundle[:12]),
    ]
    if trace.later_guidances:
        turns = [[step.expert for step in trace.steps].count(n) for n in range(1 + len(trace.later_guidances))]
        facts.insert(1, ("Transformers", in_turns(turns)))
    if trace.cache_bytes:
        facts.append(("Memory", f"{memory(trace.cache_bytes)} for the stream and the cached outputs"))
    return facts


def _notes(video: Video) -> list[str]:
    trace, notes = video.trace, []
    if len(trace.prompts) > 1:
        notes.append(
            f"This video is one of a batch of {len(trace.prompts)}; block calls, distances and times are the batch’s."
        )
    if video.prompt in trace.truncated_prompts:
        notes.append("The prompt was longer than the text encoder takes, and was cut.")
    return notes


def _policy_words(trace: Trace) -> str:
    policy = policy_of_settings(trace.policy)
    if policy is not None:
        return policy_words(policy, [len(turn) for turn in turns_of(trace)])
    settings = (f"{key} {value}" for key, value in trace.policy.items() if key != "name")
    return ", ".join([str(trace.policy["name"]), *settings])


def _tiles(video: Video, reference: Video | None) -> list[tuple[str, str]]:
    """The few numbers that a reader came for."""
    trace = video.trace
    tiles = [(f"{100 * trace.share_skipped:.1f} %", "of the block calls not run")]
    if reference is None:
        return tiles + ([(duration(trace.denoise_ms), "denoising")] if trace.denoise_ms else [])
    if trace.denoise_ms and reference.trace.denoise_ms:
        tiles.append((f"{reference.trace.denoise_ms / trace.denoise_ms:.2f}×", "speed-up of denoising"))
    noise = psnr(video.frames, reference.frames)
    tiles.append((decibels(noise), "PSNR against no reuse"))
    tiles.append((similarity(ssim(video.frames, reference.frames)), "SSIM against no reuse"))
    return tiles


def _calls(trace: Trace) -> dict[str, Any]:
    possible = trace.blocks_possible
    kinds = [
        ("computed", "run", trace.blocks_computed),
        ("reused", "reused", trace.blocks_reused),
        ("dead", "dead", trace.blocks_dead),
        *([("forecast", "forecast", trace.blocks_forecast)] if trace.blocks_forecast else []),
    ]
    return {
        "possible": plural(possible, "call"),
        "shape": f"{plural(len(trace.steps), 'step')} of {plural(len(trace.blocks), 'block')}",
        "kinds": [
            {"mark": mark, "word": word, "count": count, "percent": 100 * count / possible}
            for mark, word, count in kinds
            if possible
        ],
    }


def _times(trace: Trace, other: Trace | None) -> list[dict[str, Any]]:
    """Rows of a table: phase, time, and with a reference its time and the difference; only what was measured."""
    rows = []
    for name, measure in TIMES.items():
        mine = measure(trace)
        theirs = measure(other) if other is not None else 0.0
        if mine:
            rows.append(
                {
                    "name": name,
                    "time": duration(mine),
                    "reference": duration(theirs) if theirs else "",
                    "saved": duration(theirs - mine) if theirs else "",
                }
            )
    return rows


def _total_ms(trace: Trace) -> float:
    phases = (trace.text_ms, trace.denoise_ms, trace.decode_ms)
    return sum(phases) if all(phases) else 0.0


def _mean_step_ms(trace: Trace) -> float:
    return statistics.fmean(step.milliseconds for step in trace.steps) if trace.steps else 0.0


TIMES: dict[str, Callable[[Trace], float]] = {
    "Text": lambda trace: trace.text_ms,
    "Denoising": lambda trace: trace.denoise_ms,
    "Decoding": lambda trace: trace.decode_ms,
    "Total": _total_ms,
    "Mean step": _mean_step_ms,
}
