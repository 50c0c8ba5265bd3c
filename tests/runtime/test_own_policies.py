"""Policies that a user writes, in few lines and without a change elsewhere: whole steps, and two blocks alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from foresight import InvalidRequest, NoReuse, Video
from foresight.engines.bundle import open_bundle
from foresight.evaluation.report import write_report
from foresight.runtime.denoise import Outputs
from foresight.runtime.pipeline import VideoPipeline
from foresight.runtime.policies import Context, Decider, Decision, Policy
from tests.support import load_pipeline, watched_pipeline

PROMPT = "a red circle moving right"


@dataclass(frozen=True)
class EveryOther(Policy):
    """From the third step on every other one is a line through the last two computed outputs; but not the last."""

    name: ClassVar[str] = "every other step"
    outputs: ClassVar[int] = 2

    def reusable(self, kinds: Sequence[str]) -> tuple[bool, ...]:
        return (False,) * len(kinds)

    def begin(self, context: Context) -> Decider:
        return _EveryOther(context)


class _EveryOther(Decider):
    def forecast(self, step: int) -> Sequence[float] | None:
        if step < 3 or step % 2 == 0 or step == self.context.steps - 1:
            return None
        newest = step - 1
        older = newest - (1 if newest == 2 else 2)
        times = self.context.timesteps
        ahead = (times[step] - times[newest]) / (times[newest] - times[older])
        return 1 + ahead, -ahead


@dataclass(frozen=True)
class TwoResiduals(Policy):
    """Two blocks add once more what they added, in every other step from the fifth."""

    blocks: tuple[int, int]
    name: ClassVar[str] = "two residuals"
    cache: str = "residual"

    def reusable(self, kinds: Sequence[str]) -> tuple[bool, ...]:
        return tuple(block in self.blocks for block in range(len(kinds)))

    def begin(self, context: Context) -> Decider:
        return _TwoResiduals(self, context)


class _TwoResiduals(Decider):
    def __init__(self, policy: TwoResiduals, context: Context) -> None:
        super().__init__(context)
        self.policy = policy

    def plan(self, step: int) -> list[Decision]:
        reused = self.policy.blocks if step >= 4 and step % 2 == 0 else ()
        return [Decision.REUSE if block in reused else Decision.COMPUTE for block in range(self.context.blocks)]


def test_a_policy_may_let_whole_steps_be_skipped(bundle: Path, pipeline: VideoPipeline) -> None:
    watched, backend = watched_pipeline(bundle)
    calls: list[str] = []
    backend.before = lambda name, tensors: calls.append(name)
    video = watched(PROMPT, steps=10, policy=EveryOther())
    blocks, skipped = len(pipeline.manifest.blocks), {3, 5, 7}
    for step, record in enumerate(video.trace.steps):
        assert set(record.decisions) == ({"forecast"} if step in skipped else {"computed"})
    assert video.trace.blocks_forecast == blocks * len(skipped)
    assert video.trace.share_skipped == pytest.approx(0.3)
    for name in ("prologue", "block.000", "epilogue"):
        assert sum(call == name for call in calls) == 10 - len(skipped)
    assert np.isfinite(video.latents).all()
    assert video.latents.tobytes() != pipeline(PROMPT, steps=10, policy=NoReuse()).latents.tobytes()


def test_a_forecast_is_the_weighted_sum_of_the_last_outputs_newest_first() -> None:
    outputs = Outputs(2)
    first, second, third = (np.full((1, 2), value, np.float32) for value in (1, 10, 100))
    for output in (first, second, third):
        outputs.keep(output)
    assert outputs.weigh((2.0, -1.0)).tolist() == [[190, 190]]
    assert outputs.weigh((0.5,)).tolist() == [[50, 50]]
    assert third.tolist() == [[100, 100]] and second.tolist() == [[10, 10]]
    with pytest.raises(InvalidRequest, match="^policy: got a forecast of 3 outputs, expected 1 to 2"):
        outputs.weigh((1.0, 1.0, 1.0))


def test_what_is_not_reusable_takes_no_memory(bundle: Path, pipeline: VideoPipeline) -> None:
    manifest = open_bundle(bundle).manifest
    buffer = 2 * manifest.cache_bytes_per_row[manifest.blocks[0].name]
    video = pipeline(PROMPT, steps=4, guidance=4.0, policy=EveryOther())
    assert video.trace.cache_bytes == 2 * buffer
    assert video.trace.uncached == ()
    latents = 4 * int(np.prod(manifest.shape.latents))
    plans = [pipeline.memory(1, True, policy) for policy in (EveryOther(), NoReuse())]
    assert plans[0].cache == 2 * buffer
    assert plans[1].denoise.arrays - plans[0].denoise.arrays == plans[1].cache - plans[0].cache - 2 * latents


def test_a_policy_may_reuse_the_residuals_of_two_blocks_alone(bundle: Path, pipeline: VideoPipeline) -> None:
    policy = TwoResiduals((1, 2))
    watched, backend = watched_pipeline(bundle)
    calls: list[str] = []
    backend.before = lambda name, tensors: calls.append(name)
    video = watched(PROMPT, steps=9, guidance=4.0, policy=policy)
    assert video.trace.blocks_reused == 2 * 3
    assert video.trace.uncached == ()
    assert sum(call == "block.001" for call in calls) == 6
    assert sum(call == "block.003" for call in calls) == 9
    manifest = open_bundle(bundle).manifest
    assert video.trace.cache_bytes == 5 * 2 * manifest.cache_bytes_per_row[manifest.blocks[0].name]
    small = load_pipeline(bundle, cache_memory=video.trace.cache_bytes)
    assert small(PROMPT, steps=9, guidance=4.0, policy=policy).latents.tobytes() == video.latents.tobytes()


@pytest.mark.parametrize("policy", [EveryOther(), TwoResiduals((0, 3))], ids=lambda policy: policy.name)
def test_a_report_and_a_trace_show_any_policy(pipeline: VideoPipeline, tmp_path: Path, policy: Policy) -> None:
    video = pipeline(PROMPT, steps=9, policy=policy)
    reference = pipeline(PROMPT, steps=9, policy=NoReuse())
    assert isinstance(video, Video) and isinstance(reference, Video)
    page = write_report(video, tmp_path / "report.html", reference=reference).read_text()
    assert policy.name in page
    assert ("In a forecast step no block was run" in page) == (video.trace.blocks_forecast > 0)
    assert video.trace.to_dict()["policy"]["name"] == policy.name


def test_a_policy_without_words_of_its_own_is_told_by_its_settings() -> None:
    assert EveryOther().describe(9) == "every other step"
    assert TwoResiduals((1, 2)).describe(9) == "two residuals, blocks (1, 2), cache residual"


def test_a_forecast_of_more_outputs_than_are_kept_is_refused(pipeline: VideoPipeline) -> None:
    class Greedy(Policy):
        name: ClassVar[str] = "greedy"

        def begin(self, context: Context) -> Decider:
            return _Greedy(context)

    class _Greedy(Decider):
        def forecast(self, step: int) -> Sequence[float] | None:
            return (1.0,) if step else None

    with pytest.raises(InvalidRequest, match="^policy: got a forecast of 1 outputs, expected 1 to 0, which are kept"):
        pipeline(PROMPT, steps=2, policy=Greedy())
