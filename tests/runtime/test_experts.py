"""Two transformers that take turns: which runs when, what each decides, and what of memory they share.

The second one is the first one with two blocks in each other's place, so its files are there already.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from foresight.engines.bundle import open_bundle
from foresight.engines.errors import Cancelled, IntegrityError, InvalidRequest
from foresight.engines.progress import silent
from foresight.evaluation.calibration import calibration_of
from foresight.evaluation.evaluate import Pair
from foresight.runtime.memory import plan_memory
from foresight.runtime.pipeline import VideoPipeline
from foresight.runtime.policies import FixedSchedule, Forecast, Foresight, NoReuse, Policy, Static
from foresight.runtime.request import VideoRequest
from foresight.runtime.video import Video
from tests.runtime.test_denoise import NEGATIVE, PROMPT, SEED, Plain
from tests.support import (
    Json,
    copy_bundle,
    edit_manifest,
    is_block,
    load_pipeline,
    read_manifest,
    vouch_for,
    watched_pipeline,
)

STEPS, GUIDANCE = 14, 4.0
BELOW = 500.0
PARTS = ("condition", "prologue", "epilogue")


def second_of(manifest: Json, below: float) -> Json:
    """The expert whose first and third block are the other's third and first."""
    blocks = [dict(block) for block in manifest["blocks"]]
    blocks[0], blocks[2] = blocks[2], blocks[0]
    parts = {name: renamed(manifest[name], name) for name in PARTS}
    listed = [renamed(block, str(index)) for index, block in enumerate(blocks)]
    return parts | {"below": below, "guidance": 3.0, "blocks": listed}


def renamed(part: Json, name: str) -> Json:
    """The part under another name, with files of its own, which add_files writes."""
    return part | {"name": f"second.{name}", "graph": f"second.{name}.onnx"}


def add_files(folder: Path) -> Path:
    """Copies of what the second expert's parts are made of."""
    manifest = read_manifest(folder)
    (expert,) = manifest["later_experts"]
    blocks = manifest["blocks"]
    originals = [manifest[name] for name in PARTS] + [blocks[2], blocks[1], blocks[0], *blocks[3:]]
    for original, part in zip(originals, [*(expert[name] for name in PARTS), *expert["blocks"]], strict=True):
        model = onnx.load(folder / original["graph"], load_external_data=False)
        old, new = (Path(one["graph"]).with_suffix(".data").name for one in (original, part))
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                entry.value = new if entry.key == "location" else entry.value
        onnx.save(model, folder / part["graph"])
        shutil.copy(folder / old, folder / new)
        vouch_for(folder, part["graph"], new)
    return folder


@pytest.fixture(scope="module")
def make(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[float], Path]:
    """A bundle whose second transformer takes over below a timestep."""

    def write(below: float) -> Path:
        folder = copy_bundle(bundle, tmp_path_factory.mktemp("experts") / "bundle")
        edit_manifest(folder, lambda manifest: manifest.update(later_experts=[second_of(manifest, below)]))
        return add_files(folder)

    return write


@pytest.fixture(scope="module")
def experts(make: Callable[[float], Path]) -> Path:
    return make(BELOW)


@pytest.fixture(scope="module")
def swapped(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The second transformer, alone."""
    folder = copy_bundle(bundle, tmp_path_factory.mktemp("swapped") / "bundle")

    def swap(manifest: Json) -> None:
        first, third = manifest["blocks"][0], manifest["blocks"][2]
        first["graph"], third["graph"] = third["graph"], first["graph"]

    return edit_manifest(folder, swap)


@pytest.fixture(scope="module")
def loop(experts: Path) -> VideoPipeline:
    return load_pipeline(experts)


def video_of(pipeline: VideoPipeline, policy: Policy, **settings: Any) -> Video:
    calls = {name: settings.pop(name) for name in ("on_step", "cancel") if name in settings}
    asked: Json = {"steps": STEPS, "guidance": GUIDANCE, "seed": SEED, "negative_prompt": NEGATIVE, "policy": policy}
    (video,) = pipeline.generate(VideoRequest(PROMPT, **(asked | settings)), **calls)
    return video


def turns_of(video: Video) -> list[int]:
    """How many steps each transformer ran."""
    ran = [step.expert for step in video.trace.steps]
    assert ran == sorted(ran)
    return [ran.count(expert) for expert in (0, 1)]


class TwoPlain(Plain):
    """The plain loop, in which the timestep says whose parts run."""

    def run(self, part: str, **inputs: Any) -> dict[str, Any]:
        if part == "prologue":
            self.second = inputs["timestep"][0] < BELOW
        if part in ("text_encoder", "condition") or not self.second:
            return super().run(part, **inputs)
        index = [block.name for block in self.manifest.blocks].index(part) if is_block(part) else part
        return super().run(f"second.{index}", **inputs)


# What runs


def test_each_runs_the_steps_on_its_side_of_the_boundary(loop: VideoPipeline, experts: Path) -> None:
    expected, _ = TwoPlain(experts).latents(STEPS, GUIDANCE, NoReuse())
    video = video_of(loop, NoReuse())
    assert video.latents.tobytes() == expected[0].tobytes()
    assert [step.expert for step in video.trace.steps] == [step.timestep < BELOW for step in video.trace.steps]
    assert min(turns_of(video)) > 3


@pytest.mark.parametrize("policy", [NoReuse(), Foresight(gamma=2), Forecast(tolerance=0.05)])
@pytest.mark.parametrize("below", [1e-3, 2000.0])
def test_one_that_has_all_steps_is_as_if_alone(
    make: Callable[[float], Path], bundle: Path, swapped: Path, below: float, policy: Policy
) -> None:
    alone = load_pipeline(swapped if below > 1000 else bundle)
    two = load_pipeline(make(below))
    steps = 12
    expected, video = (video_of(pipeline, policy, steps=steps) for pipeline in (alone, two))
    assert below > 1000 or video.trace.steps[-1].timestep >= below or turns_of(video)[1] <= 1
    if turns_of(video) in ([steps, 0], [0, steps]):
        assert video.latents.tobytes() == expected.latents.tobytes()
        assert [step.decisions for step in video.trace.steps] == [step.decisions for step in expected.trace.steps]


def test_a_step_at_the_boundary_is_still_the_firsts(make: Callable[[float], Path], loop: VideoPipeline) -> None:
    timestep = video_of(loop, NoReuse()).trace.steps[5].timestep
    assert turns_of(video_of(load_pipeline(make(timestep)), NoReuse())) == [6, STEPS - 6]


# What is decided


def test_each_decides_as_if_its_steps_were_all(loop: VideoPipeline) -> None:
    policy = Static(warmup=2)
    video = video_of(loop, policy)
    expected = [policy.allows(step, count) for count in turns_of(video) for step in range(count)]
    assert [step.decisions[-1] == "reused" for step in video.trace.steps] == expected


def test_nothing_of_one_is_reused_in_the_other(loop: VideoPipeline) -> None:
    video = video_of(loop, Foresight(gamma=2, warmup=2))
    first, second = turns_of(video)
    for begin in (0, first):
        whole = video.trace.steps[begin : begin + 2]
        assert all(set(step.decisions) == {"computed"} for step in whole)
        assert whole[0].distances == (None,) * len(whole[0].distances)  # compared with nothing from before
    assert video.trace.blocks_reused > 0 and second > 4


@pytest.mark.parametrize("policy", [Forecast(tolerance=10, warmup=3), FixedSchedule(f"1-3 {STEPS}")])
def test_no_forecast_crosses_the_switch(loop: VideoPipeline, policy: Policy) -> None:
    video = video_of(loop, policy)
    first, _ = turns_of(video)
    forecast = [step.decisions[0] == "forecast" for step in video.trace.steps]
    assert not any(forecast[:3]) and not any(forecast[first : first + 3])
    assert any(forecast[3:first]) and any(forecast[first + 3 :])


def named_steps(policy: Policy) -> list[int]:
    """Those that a schedule says run, from 1."""
    assert isinstance(policy, FixedSchedule)
    ends = [piece.split("-") for piece in policy.computed.split()]
    return [step for first, *last in ends for step in range(int(first), int((last or [first])[0]) + 1)]


def test_calibrated_schedules_are_followed_step_by_step(loop: VideoPipeline) -> None:
    asked = VideoRequest("", steps=STEPS, guidance=GUIDANCE)
    recorded = calibration_of(loop, asked, [Pair(PROMPT, SEED), Pair("a dog", 1)], silent)
    assert [len(turn) for turn in recorded.turns] == turns_of(video_of(loop, NoReuse()))
    made = FixedSchedule().calibrate(recorded)
    assert min(made) == 3 + 3 + 1 and max(made) == STEPS
    for count, policy in made.items():
        trace = video_of(loop, policy).trace
        ran = [number for number, step in enumerate(trace.steps, 1) if step.decisions[0] != "forecast"]
        assert ran == named_steps(policy)
        assert trace.share_skipped == pytest.approx(1 - count / STEPS)


def test_the_share_skipped_counts_the_one_that_has_its_turn(loop: VideoPipeline) -> None:
    trace = video_of(loop, Static()).trace
    assert trace.blocks_possible == STEPS * len(trace.blocks)
    assert 0 < trace.share_skipped < 0.6


# Guidance


def test_the_second_has_a_guidance_of_its_own(make: Callable[[float], Path], swapped: Path) -> None:
    both, alone = load_pipeline(make(2000.0)), load_pipeline(swapped)
    expected = video_of(alone, NoReuse(), guidance=2.5).latents
    assert np.array_equal(video_of(both, NoReuse(), guidance=7, guidance_2=2.5).latents, expected)
    assert np.array_equal(video_of(both, NoReuse(), guidance=2.5).latents, expected)  # one for all
    default = video_of(both, NoReuse(), guidance=None)
    assert np.array_equal(default.latents, video_of(alone, NoReuse(), guidance=3.0).latents)
    assert default.trace.later_guidances == ((3.0,),)


def test_guidance_is_off_where_it_is_off_for_both(loop: VideoPipeline) -> None:
    rows = {guidance: video_of(loop, NoReuse(), guidance=1, guidance_2=guidance).trace for guidance in (1, 2)}
    assert rows[1].cache_bytes * 2 == rows[2].cache_bytes


def test_a_model_of_one_takes_no_second_guidance(pipeline: VideoPipeline) -> None:
    with pytest.raises(InvalidRequest, match=r"guidance_2: got 3, expected none: this model has one transformer"):
        video_of(pipeline, NoReuse(), guidance_2=3)


# Memory


def test_cache_and_scratch_are_those_of_one(loop: VideoPipeline, pipeline: VideoPipeline) -> None:
    assert video_of(loop, Static()).trace.cache_bytes == video_of(pipeline, Static()).trace.cache_bytes
    two, one = (p.memory() for p in (loop, pipeline))
    assert two.cache == one.cache
    assert two.denoise.weights == 2 * one.denoise.weights
    low = plan_memory(loop.manifest, low_memory=True)
    assert low.denoise.weights == one.denoise.weights


def test_with_low_memory_one_is_loaded_at_a_time(experts: Path, loop: VideoPipeline) -> None:
    low, backend = watched_pipeline(experts, low_memory=True)
    seen: set[frozenset[bool]] = set()

    def look(part: str, tensors: object) -> None:
        if is_block(part) or part.removeprefix("second.").isdigit():
            blocks = [name for name in (engine.part.name for engine in backend.alive) if name[-1].isdigit()]
            seen.add(frozenset(name.startswith("second.") for name in blocks))

    backend.before = look
    assert video_of(low, Foresight()).latents.tobytes() == video_of(loop, Foresight()).latents.tobytes()
    assert seen == {frozenset([False]), frozenset([True])}


def test_one_without_steps_is_not_loaded(make: Callable[[float], Path]) -> None:
    low, backend = watched_pipeline(make(2000.0), low_memory=True)
    ran: list[str] = []
    backend.before = lambda part, tensors: ran.append(part)
    video_of(low, NoReuse())
    assert "second.prologue" in ran and "prologue" not in ran


def look_into(ran: list[str]) -> Callable[[str, object], None]:
    return lambda part, tensors: ran.append(part)


def test_a_warm_up_runs_all_that_have_steps(make: Callable[[float], Path]) -> None:
    for below, expected in ((BELOW, ["prologue", "second.prologue"]), (2000.0, ["second.prologue"])):
        pipeline, backend = watched_pipeline(make(below))
        ran: list[str] = []
        backend.before = look_into(ran)
        pipeline.warm_up()
        assert [part for part in ran if part.endswith("prologue")] == expected


def test_prompts_with_policies_of_their_own_take_turns_together(loop: VideoPipeline) -> None:
    policies = [NoReuse(), Static()]
    asked = VideoRequest([PROMPT, "blue dog"], steps=STEPS, guidance=GUIDANCE, seed=[SEED, 5], policy=policies)
    videos = loop.generate(asked)
    for video, policy, prompt, seed in zip(videos, policies, (PROMPT, "blue dog"), (SEED, 5), strict=True):
        alone = loop(prompt, steps=STEPS, guidance=GUIDANCE, seed=seed, policy=policy)
        assert video.latents.tobytes() == alone.latents.tobytes()


def test_cancelled_in_the_second_turn_it_keeps_nothing(loop: VideoPipeline) -> None:
    before = loop.backend.arrays.used_bytes()
    reached: list[int] = []

    class Cancel:
        def is_set(self) -> bool:
            return bool(reached)

    def on_step(done: int, steps: int, trace: Any) -> None:
        if trace.steps[-1].expert == 1:
            reached.append(done)

    expected = video_of(loop, Foresight())
    with pytest.raises(Cancelled, match=rf"in step \d+ of {STEPS}"):
        video_of(loop, Foresight(), cancel=Cancel(), on_step=on_step)
    assert loop.backend.arrays.used_bytes() == before
    assert video_of(loop, Foresight()).latents.tobytes() == expected.latents.tobytes()


# The manifest


def other_kind(expert: Json) -> None:
    expert["blocks"][0]["kind"] = "another"


def other_tensors(expert: Json) -> None:
    expert["prologue"]["inputs"].reverse()


WRONG: dict[str, tuple[Callable[[Json], object], str]] = {
    "no boundary": (lambda expert: expert.update(below=0), "take over below the timesteps 0.0"),
    "other blocks": (other_kind, "its blocks are not of the kinds of the first expert's"),
    "guidance": (lambda expert: expert.update(guidance=0.5), "default guidance is 0.5"),
    "much guidance": (lambda expert: expert.update(guidance=1e12), "is 1000000000000.0, expected at most 10000"),
    "tensors": (other_tensors, "second.prologue: does not take and make what prologue does"),
    "a name twice": (lambda expert: expert["epilogue"].update(name="epilogue"), "two parts are called epilogue"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_experts_that_do_not_fit_are_refused(make: Callable[[float], Path], tmp_path: Path, wrong: str) -> None:
    change, message = WRONG[wrong]

    def edit(manifest: Json) -> None:
        change(manifest["later_experts"][0])

    folder = edit_manifest(copy_bundle(make(BELOW), tmp_path / "bundle"), edit)
    with pytest.raises(IntegrityError, match=message):
        open_bundle(folder)
