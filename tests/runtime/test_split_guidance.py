"""The halves of a guided batch one after the other: the same decisions, the same video but for rounding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foresight.runtime.pipeline import VideoPipeline
from foresight.runtime.policies import Forecast, Foresight, NoReuse, Policy, Static
from foresight.runtime.request import VideoRequest
from foresight.runtime.video import Video
from tests.support import is_block, load_pipeline, watched_pipeline
from zoo import FAMILIES

PROMPT, STEPS = "a red circle moving right", 10
POLICIES: dict[str, Policy] = {
    "none": NoReuse(),
    "foresight": Foresight(gamma=2),
    "residual": Foresight(gamma=2, cache="residual"),
    "static": Static(reuse_steps=2, interval=3),
    "forecast": Forecast(tolerance=0.05),
}


@pytest.fixture(scope="module", params=FAMILIES)
def both(request: pytest.FixtureRequest, example_bundles: Callable[[str], Path]) -> tuple[VideoPipeline, VideoPipeline]:
    """A bundle of every family, once as one batch and once split."""
    bundle = example_bundles(request.param)
    return load_pipeline(bundle), load_pipeline(bundle, split_guidance=True)


def make(pipeline: VideoPipeline, policy: Policy, **settings: Any) -> Video:
    asked: dict[str, Any] = {"steps": STEPS, "guidance": 4.0, "seed": 3, "policy": policy}
    return pipeline.generate(VideoRequest(PROMPT, **(asked | settings)))[0]


@pytest.mark.parametrize("policy", POLICIES)
def test_the_video_is_that_of_one_batch(both: tuple[VideoPipeline, VideoPipeline], policy: str) -> None:
    whole, split = (make(pipeline, POLICIES[policy]) for pipeline in both)
    span = float(np.ptp(whole.latents))
    assert np.abs(split.latents - whole.latents).max() <= 1e-4 * span
    assert [step.decisions for step in split.trace.steps] == [step.decisions for step in whole.trace.steps]
    mine, other = ([one for step in v.trace.steps for one in step.distances] for v in (split, whole))
    assert [one is None for one in mine] == [one is None for one in other]
    measured = np.array([pair for pair in zip(mine, other, strict=True) if None not in pair], float).reshape(-1, 2)
    assert np.allclose(measured[:, 0], measured[:, 1], rtol=1e-2, atol=1e-9)


def test_two_prompts_are_two_rows_a_half(bundle: Path) -> None:
    pipeline, backend = watched_pipeline(bundle, split_guidance=True)
    rows: set[int] = set()

    def look(part: str, tensors: Any) -> None:
        if is_block(part):
            rows.add(len(tensors["distance"]))

    backend.before = look
    asked = VideoRequest([PROMPT, "blue dog"], steps=STEPS, guidance=4.0, policy=Foresight(gamma=2))
    videos = pipeline.generate(asked)
    expected = load_pipeline(bundle).generate(asked)
    assert rows == {2}
    for video, other in zip(videos, expected, strict=True):
        assert np.abs(video.latents - other.latents).max() <= 1e-4 * np.ptp(other.latents)


def test_without_guidance_nothing_is_split(bundle: Path) -> None:
    whole, split = load_pipeline(bundle), load_pipeline(bundle, split_guidance=True)
    one, other = (make(pipeline, Foresight(), guidance=1.0) for pipeline in (whole, split))
    assert one.latents.tobytes() == other.latents.tobytes()
    assert one.trace.cache_bytes == other.trace.cache_bytes


@pytest.mark.parametrize("policy", POLICIES)
def test_stream_buffers_are_half_and_the_plan_knows(bundle: Path, policy: str) -> None:
    whole, split = load_pipeline(bundle), load_pipeline(bundle, split_guidance=True)
    chosen = POLICIES[policy]
    for pipeline in (whole, split):
        assert make(pipeline, chosen).trace.cache_bytes == pipeline.memory(policy=chosen).cache
    slots = sum(whole.limits.cached(whole.manifest, chosen, 1, 2))
    row = whole.manifest.cache_bytes(1) // len(whole.manifest.blocks)
    loose = whole.memory(policy=chosen).cache // row - 2 * slots
    assert whole.memory(policy=chosen).cache - split.memory(policy=chosen).cache == row * (loose // 2)


def test_a_smaller_cache_holds_for_both_halves_together(bundle: Path) -> None:
    row = load_pipeline(bundle).manifest.cache_bytes(1) // 4
    limited = load_pipeline(bundle, split_guidance=True, cache_memory=6 * row)
    video = make(limited, Static())
    assert video.trace.cache_bytes <= 6 * row
    assert 0 < len(video.trace.uncached) < 4
