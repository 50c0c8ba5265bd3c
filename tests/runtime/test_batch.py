"""Prompts of one batch with settings of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foresight.engines.errors import InvalidRequest
from foresight.runtime.pipeline import VideoPipeline
from foresight.runtime.policies import Forecast, Foresight, NoReuse, Policy, Static
from foresight.runtime.request import VideoRequest
from foresight.runtime.video import Video
from tests.support import load_pipeline, watched_pipeline

PROMPTS = ["a dog", "a red circle moving right"]
POLICIES: list[Policy] = [Static(2, 3), Forecast(0.5)]


def content(video: Video) -> tuple[bytes, bytes]:
    return video.frames.tobytes(), video.latents.tobytes()


def close(one: Any, other: Any) -> bool:
    return bool(np.abs(one - other).max() <= 1e-4 * np.ptp(other))


def test_each_prompt_has_its_own_guidance_and_negative_prompt(pipeline: VideoPipeline) -> None:
    guidances, negatives = [2.0, 7.0], ["blue", "a very long and blurry picture"]
    together = pipeline.generate(VideoRequest(PROMPTS, negatives, 3, guidances, [5, 9], NoReuse()))
    for video, prompt, negative, guidance, seed in zip(together, PROMPTS, negatives, guidances, (5, 9), strict=True):
        alone = pipeline(prompt, negative_prompt=negative, steps=3, guidance=guidance, seed=seed, policy=NoReuse())
        other = pipeline(prompt, negative_prompt=negative, steps=3, guidance=3.5, seed=seed, policy=NoReuse())
        assert close(video.latents, alone.latents) and not close(video.latents, other.latents)
    assert together[0].trace.guidances == (2.0, 7.0) and together[0].trace.negative_prompts == tuple(negatives)


def test_a_guidance_of_one_beside_another_changes_neither(pipeline: VideoPipeline) -> None:
    none, guided = pipeline.generate(VideoRequest(PROMPTS, None, 3, [1, 4], 5, NoReuse()))
    assert close(none.latents, pipeline(PROMPTS[0], steps=3, guidance=1, seed=5, policy=NoReuse()).latents)
    assert close(guided.latents, pipeline(PROMPTS[1], steps=3, guidance=4, seed=6, policy=NoReuse()).latents)


@pytest.mark.parametrize("low_memory", [False, True])
def test_with_a_policy_each_prompts_are_as_if_alone(bundle: Path, low_memory: bool) -> None:
    pipeline = load_pipeline(bundle, low_memory=low_memory)
    request = VideoRequest(PROMPTS, None, 12, [4.0, 1.0], [5, 9], POLICIES)
    together = pipeline.generate(request)
    for video, prompt, guidance, seed, policy in zip(together, PROMPTS, (4.0, 1.0), (5, 9), POLICIES, strict=True):
        alone = pipeline(prompt, steps=12, guidance=guidance, seed=seed, policy=policy)
        assert content(video) == content(alone)
        assert [step.decisions for step in video.trace.steps] == [step.decisions for step in alone.trace.steps]
        assert (video.trace.prompts, video.trace.seeds) == ((prompt,), (seed,))
        assert video.trace.text_ms > 0 < video.trace.decode_ms
    assert together[0].trace.policy != together[1].trace.policy


def test_policies_that_are_equal_are_not_decided_on_together_either(pipeline: VideoPipeline) -> None:
    latents = np.random.default_rng(3).standard_normal((2, *pipeline.manifest.shape.latents), dtype=np.float32)
    policies = [None, Foresight()]
    for place, video in enumerate(pipeline.generate(VideoRequest(PROMPTS, steps=8, policy=policies, latents=latents))):
        assert content(video) == content(pipeline(PROMPTS[place], steps=8, latents=latents[place]))


def test_prompts_with_policies_of_their_own_take_the_memory_of_the_largest(pipeline: VideoPipeline) -> None:
    alone = [pipeline.check(VideoRequest(PROMPTS[0], policy=policy)).bytes for policy in (Static(), Forecast())]
    apart = pipeline.check(VideoRequest(PROMPTS, policy=[Static(), Forecast()])).bytes
    together = pipeline.check(VideoRequest(PROMPTS, policy=Static())).bytes
    assert max(alone) < apart < together
    video = pipeline.generate(VideoRequest(PROMPTS, steps=2, policy=[Static(), Forecast()]))[0]
    assert video.trace.planned_bytes == apart + pipeline.memory().weights + (pipeline.memory().scratch or 0)


def test_a_prompt_that_fails_fails_the_request_and_leaves_nothing(single_bundle: Path) -> None:
    pipeline, backend = watched_pipeline(single_bundle)
    runs = []

    def fail(part: str, tensors: Any) -> None:
        runs.append(part)
        if runs.count("prologue") > 3:
            raise RuntimeError("in the second prompt")

    before, backend.before = backend.before, fail
    request = VideoRequest(["a dog"] * 1, steps=4, policy=[NoReuse()])
    with pytest.raises(RuntimeError, match="in the second prompt"):
        pipeline.generate(request)
    backend.before = before
    assert content(pipeline.generate(request)[0]) == content(pipeline("a dog", steps=4, policy=NoReuse()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance": [1.0]}, r"guidance: got 1, expected one for all prompts, or one for each \(2\)"),
        ({"guidance": [1.0, 0.5]}, "guidance: got 0.5"),
        ({"negative_prompt": ["a", "b", "c"]}, "negative_prompt: got 3, expected one for all"),
        ({"negative_prompt": ["a", 3]}, "negative_prompt: got 3, expected some text"),
        ({"policy": []}, "policy: got 0, expected one for all"),
        ({"policy": [NoReuse(), "static"]}, "policy: got 'static', expected one such as"),
    ],
)
def test_lists_have_one_for_each_prompt(pipeline: VideoPipeline, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        pipeline.generate(VideoRequest(PROMPTS, **{"guidance": 4.0, **settings}))
