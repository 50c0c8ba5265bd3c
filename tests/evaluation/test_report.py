"""The report page: self-contained, true to the trace, and in order for every trace and prompt there can be."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from foresight import Foresight, InvalidRequest, NoReuse, OutputError, Static, Trace, Video
from foresight.evaluation.report import write_report
from foresight.runtime.caches import find_mode
from foresight.runtime.notes import Advice
from foresight.runtime.policies import Decision, Policy, policy_settings
from tests.evaluation.page import Page
from tests.support import context_of

PROMPT = "a red circle moving right"


def make_trace(policy: Policy, steps: int = 20, blocks: int = 4, prompts: Sequence[str] = (PROMPT,)) -> Trace:
    """A request as the loop would record it, every block changing less and less."""
    trace = Trace(
        model="latte-demo",
        bundle="0123456789abcdef" * 4,
        blocks=tuple(f"block.{index:03d}" for index in range(blocks)),
        kinds=tuple(("spatial", "temporal")[index % 2] for index in range(blocks)),
        policy=policy_settings(policy),
        backend={"backend": "onnxruntime", "version": "1.23.0", "device": "cpu", "threads": "2"},
        prompts=tuple(prompts),
        steps_requested=steps,
        guidances=(7.5,),
        seeds=tuple(range(len(prompts))),
        negative_prompts=("",),
        latents_given=False,
        text_ms=5.0,
        denoise_ms=200.0 if policy.name == "none" else 125.0,
        decode_ms=20.0,
    )
    decider = policy.begin(context_of(steps, blocks))
    for step in range(steps):
        measures = decider.measures()
        decisions = find_mode(policy.cache).eliminate_dead(decider.plan(step))
        ran = [decision is Decision.COMPUTE for decision in decisions]
        distances = [0.5**step * (1 + block) if known and step else None for block, known in enumerate(ran)]
        trace.record(1000.0 - step, 1.0 + sum(ran), decisions, measures)
        trace.measure(step, distances)
        decider.observe(step, [None if distance is None else [distance] for distance in distances])
    return trace


def make_frames(shape: tuple[int, int, int] = (3, 16, 16), seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def make_video(policy: Policy | None = None, frames: npt.NDArray[np.uint8] | None = None, **settings: Any) -> Video:
    trace = make_trace(policy or Foresight(gamma=1.0), **settings)
    frames = make_frames() if frames is None else frames
    return Video(frames=frames, latents=np.zeros(1), fps=8, prompt=trace.prompts[-1], seed=trace.seeds[-1], trace=trace)


def write(path: Path, video: Video, reference: Video | None = None) -> Page:
    return Page(write_report(video, path / "report.html", reference=reference))


@pytest.fixture
def alone(tmp_path: Path) -> Page:
    return write(tmp_path, make_video())


@pytest.fixture
def compared(tmp_path: Path) -> Page:
    return write(tmp_path, make_video(), make_video(NoReuse(), make_frames(seed=1)))


def test_the_page_needs_nothing_but_itself(compared: Page) -> None:
    assert not re.search(r"https?://|url\(|@import", compared.html)
    assert all(source.startswith("data:image/") for source in compared.images())
    assert not [tag for tag, attrs in compared.tags if tag in ("link", "iframe") or "href" in attrs]
    assert not [attrs for tag, attrs in compared.tags if tag == "script" and "src" in attrs]
    assert "default-src 'none'" in str(compared.tags)


@pytest.mark.parametrize("cache", ["output", "residual"])
def test_calls_are_those_of_the_trace(tmp_path: Path, cache: Any) -> None:
    video = make_video(Foresight(gamma=1.0, cache=cache))
    trace, page = video.trace, write(tmp_path, video)
    assert trace.blocks_reused
    calls = {word: int(count) for word, count, _ in page.rows["calls"]}
    assert calls == {"run": trace.blocks_computed, "reused": trace.blocks_reused, "dead": trace.blocks_dead}
    assert f"{trace.blocks_possible} calls possible" in page.words
    assert f"{100 * trace.share_skipped:.1f} % of the block calls not run" in page.words


def test_the_map_has_a_mark_for_every_call(tmp_path: Path) -> None:
    video = make_video()
    svg = write(tmp_path, video).html.split('id="map"')[1].split("</svg>")[0]
    marks = {mark: path.count("M") for mark, path in re.findall(r'<path class="(\w+)" d="([^"]+)"', svg)}
    trace = video.trace
    assert marks.pop("edge") == 1
    assert marks == {"computed": trace.blocks_computed, "reused": trace.blocks_reused, "dead": trace.blocks_dead}


def test_the_map_shows_warm_up_and_where_reuse_was_allowed(alone: Page) -> None:
    assert "warm-up" in alone.texts["span"]
    assert "M3 0v4" in alone.paths("edge")
    assert alone.paths("allowed").count("M") == 8


def test_times_are_those_of_both_traces(compared: Page) -> None:
    rows = {name: values for name, *values in compared.rows["times"][1:]}
    assert rows["Denoising"] == ["125 ms", "200 ms", "75.0 ms"]
    assert rows["Total"] == ["150 ms", "225 ms", "75.0 ms"]
    assert rows["Mean step"][1] == "5.00 ms"
    assert "1.60× speed-up of denoising" in compared.words


def test_what_took_longer_with_reuse_is_shown_as_negative(tmp_path: Path) -> None:
    video = make_video()
    video.trace.text_ms = 7.0
    page = write(tmp_path, video, make_video(NoReuse()))
    assert page.rows["times"][1] == ["Text", "7.00 ms", "5.00 ms", "−2.00 ms"]


def test_quality_is_shown_for_the_video_and_every_frame(compared: Page) -> None:
    assert re.search(r"\d+\.\d dB PSNR against no reuse 0\.\d{4} SSIM against no reuse", compared.words)
    assert len(re.findall(r"\b[012]: \d+\.\d dB", compared.words)) == 3


def test_without_a_reference_nothing_is_said_that_needs_one(alone: Page) -> None:
    for word in ("PSNR", "SSIM", "speed-up", "Without reuse", "saved:"):
        assert word not in alone.words
    assert "--compare" in alone.words


def test_a_run_without_reuse_does_not_ask_for_a_comparison(tmp_path: Path) -> None:
    assert "--compare" not in write(tmp_path, make_video(NoReuse())).words


def test_times_that_were_not_measured_are_left_out(tmp_path: Path) -> None:
    video = make_video()
    video.trace.decode_ms = 0.0
    assert [row[0] for row in write(tmp_path, video).rows["times"]] == ["Text", "Denoising", "Mean step"]


def test_identical_videos_are_called_identical(tmp_path: Path) -> None:
    page = write(tmp_path, make_video(), make_video(NoReuse()))
    assert "identical PSNR against no reuse 1.0000 SSIM" in page.words
    assert "inf" not in page.words


def test_almost_identical_is_not_rounded_to_identical(tmp_path: Path) -> None:
    frames = make_frames((3, 64, 64))
    other = frames.copy()
    other[0, 0, 0, 0] ^= 1
    page = write(tmp_path, make_video(frames=frames), make_video(NoReuse(), other))
    assert "> 0.9999 SSIM" in page.words


@pytest.mark.parametrize(
    "prompt",
    [
        "<script>alert('x')</script>",
        "</title></script><img src=x onerror=alert(1)>",
        "\"quotes\" & 'more' {{ 7 * 7 }} {% raw %}",
        "see https://example.com",
        "ein roter Kreis, 红圈, 🔴",
    ],
)
def test_a_prompt_is_shown_as_it_is(tmp_path: Path, prompt: str) -> None:
    page = write(tmp_path, make_video(prompts=(prompt,)))
    assert page.texts["h1"] == prompt
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert len(page.images()) == 3


def test_names_from_a_bundle_are_escaped_too(tmp_path: Path) -> None:
    video = make_video()
    video.trace.blocks = ("</script><b>", *video.trace.blocks[1:])
    video.trace.backend["gpu"] = "<b>"
    page = write(tmp_path, video)
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert json.loads(page.texts["hover"])["blocks"][0] == "</script><b> · spatial"


def test_a_prompt_that_utf_8_cannot_hold_is_no_obstacle(tmp_path: Path) -> None:
    assert write(tmp_path, make_video(prompts=("circle \udcff",))).texts["h1"] == "circle ?"


def test_policies_are_described_in_words(tmp_path: Path) -> None:
    for policy, words in (
        (
            Foresight(gamma=0.5),
            "γ = 0.5: after 3 warm-up steps, 1 of every 2 steps reuses the blocks whose last change",
        ),
        (Static(reuse_steps=2, interval=3, warmup=4), "after 4 warm-up steps, 2 of every 3 steps reuse all blocks"),
        (Static(cache="residual"), "what blocks add to the stream is cached"),
        (NoReuse(), "none: every block runs in every step"),
    ):
        assert words in write(tmp_path, make_video(policy)).words


def test_a_policy_of_somebody_else_is_shown_with_its_settings(tmp_path: Path) -> None:
    video = make_video()
    video.trace.policy = {"name": "mine", "depth": 3}
    assert "mine, depth 3" in write(tmp_path, video).words


def test_one_step_and_one_block_are_enough(tmp_path: Path) -> None:
    page = write(tmp_path, make_video(steps=1, blocks=1, frames=make_frames((1, 1, 1))))
    assert "1 step of 1 block: 1 call possible" in page.words
    assert "Nothing was measured" in page.words


def test_a_video_of_a_batch_shows_its_own_prompt_and_seed(tmp_path: Path) -> None:
    page = write(tmp_path, make_video(prompts=("a blue square", "a green triangle")))
    assert page.texts["h1"] == "a green triangle"
    assert "seed 1" in page.words
    assert "blue square" not in page.html
    assert "one of a batch of 2" in page.words


def test_prompts_that_were_cut_are_mentioned(tmp_path: Path) -> None:
    video = make_video()
    video.trace.truncated_prompts = (video.prompt,)
    assert "longer than the text encoder takes" in write(tmp_path, video).words


def test_distances_that_are_not_finite_or_zero_are_shown_as_such(tmp_path: Path) -> None:
    video = make_video()
    steps = video.trace.steps
    steps[2] = replace(steps[2], distances=(math.nan, math.inf, 0.0, 1.0), metrics=(math.nan,) * 4)
    page = write(tmp_path, video)
    assert page.paths("infinite").count("M") == 2
    assert "Distances of 0 lie on the lower edge" in page.words
    assert json.loads(page.texts["hover"])["steps"][2]["distances"] == ["nan", "inf", "0", "1"]
    assert "nan" not in page.paths("distance") + page.paths("dots") + page.paths("limit")


def test_limits_are_drawn_only_where_there_are_some(tmp_path: Path, alone: Page) -> None:
    assert alone.paths("limit").count("M") == 4  # one stroke a block
    assert not write(tmp_path, make_video(Static())).paths("limit")


def test_steps_slower_than_the_scale_are_named(tmp_path: Path) -> None:
    video = make_video()
    video.trace.steps[0] = replace(video.trace.steps[0], milliseconds=900.0)
    assert "Too slow for the scale: step 0: 900 ms." in write(tmp_path, video).words


def test_small_frames_are_kept_to_the_pixel(tmp_path: Path) -> None:
    video = make_video()
    page = write(tmp_path, video)
    for source, frame in zip(page.images(), video.frames, strict=True):
        picture = Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,"))))
        np.testing.assert_array_equal(np.asarray(picture), frame)
    assert "JPEG" not in page.words


def test_large_frames_are_scaled_down_and_the_page_says_so(tmp_path: Path) -> None:
    page = write(tmp_path, make_video(frames=make_frames((16, 512, 768))))
    assert "scaled from 768 × 512 to 384 × 256 and compressed as JPEG" in page.words
    assert len(page.html) < 4_000_000  # noise, which compresses worst


def test_the_difference_is_enlarged_by_what_the_page_says(tmp_path: Path) -> None:
    frames = np.full((1, 8, 8, 3), 100, np.uint8)
    page = write(tmp_path, make_video(frames=frames), make_video(NoReuse(), frames + np.uint8(3)))
    picture = Image.open(io.BytesIO(base64.b64decode(page.images()[2].partition(",")[2])))
    assert "Difference × 64" in page.words
    assert np.asarray(picture).max() == np.asarray(picture).min() == 3 * 64


def test_many_blocks_and_steps_stay_a_small_page(tmp_path: Path) -> None:
    page = write(tmp_path, make_video(steps=50, blocks=56), make_video(NoReuse(), steps=50, blocks=56))
    assert len(page.html) < 500_000
    assert page.html.count('class="change"') == 56


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("policy", {"policy": Static()}),
        ("prompt", {"prompts": ("another",)}),
        ("steps_requested", {"steps": 21}),
        ("frames", {"frames": make_frames((4, 16, 16))}),
    ],
)
def test_a_reference_that_is_another_request_is_refused(tmp_path: Path, name: str, change: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=f"reference: got {name}"):
        write(tmp_path, make_video(), make_video(**{"policy": NoReuse()} | change))
    assert not list(tmp_path.iterdir())


def test_a_reference_from_another_backend_is_refused(tmp_path: Path) -> None:
    reference = make_video(NoReuse())
    reference.trace.backend["threads"] = "1"
    with pytest.raises(InvalidRequest, match="reference: got backend"):
        write(tmp_path, make_video(), reference)


@pytest.mark.parametrize("module", ["jinja2", "PIL.Image"])
def test_a_missing_library_is_named_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(OutputError, match=rf"{module}.*foresight-engines\[report\]"):
        write_report(make_video(), tmp_path / "report.html")


def test_the_page_says_what_to_try_next(tmp_path: Path, alone: Page) -> None:
    assert "try next" not in alone.words
    advice = Advice("--profile fast", "forecast: 70.0 % skipped, worst PSNR 36.1 dB on 50 pairs held out")
    page = Page(write_report(make_video(), tmp_path / "advised.html", advice=advice))
    assert f"To try next: {advice.setting} {advice.reason}" in page.words


def test_the_page_replaces_an_older_one(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("old")
    assert "old" not in write(tmp_path, make_video()).texts["h1"]
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_a_page_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(OutputError, match="taken"):
        write_report(make_video(), tmp_path / "taken")
    assert [path.name for path in tmp_path.rglob("*")] == ["taken"]


def test_a_write_that_breaks_off_keeps_the_older_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, data: bytes) -> int:
        path.write_text("half a page")
        raise OSError(28, "No space left on device")

    (tmp_path / "report.html").write_text("old")
    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OutputError, match="No space left"):
        write_report(make_video(), tmp_path / "report.html")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
