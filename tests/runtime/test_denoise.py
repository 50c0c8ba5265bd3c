"""The loop against a plain one: numpy, copies, ONNX Runtime's ordinary interface, and the paper's rules spelled out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from foresight.engines.arrays import Arrays, Download, HostArray
from foresight.engines.bundle import open_bundle
from foresight.engines.manifest import Manifest
from foresight.runtime.denoise import guide
from foresight.runtime.pipeline import VideoPipeline
from foresight.runtime.policies import Foresight, NoReuse, Policy, Static
from foresight.runtime.sampler import Noise, load_table
from foresight.runtime.text import Tokenizer
from foresight.runtime.video import Video
from tests.support import is_block, load_pipeline, watched_pipeline
from zoo import FAMILIES

PROMPT, NEGATIVE, SEED = "a red circle moving right", "blue square", 3


class Plain:
    """A bundle run in the most obvious way. `dead` blocks run too, but nothing of them is kept."""

    def __init__(self, folder: Path) -> None:
        opened = open_bundle(folder)
        self.manifest: Manifest = opened.manifest
        self.tokenizer = Tokenizer(folder / "tokenizer.json", self.manifest.text)
        self.table = load_table(folder / "sampler.npz", self.manifest.sampler.max_steps)
        self.sessions = {
            part.name: ort.InferenceSession(folder / part.graph, providers=["CPUExecutionProvider"])
            for part in self.manifest.parts
        }

    def run(self, part: str, **inputs: Any) -> dict[str, Any]:
        session = self.sessions[part]
        names = [output.name for output in session.get_outputs()]
        wanted = {graph_input.name: inputs[graph_input.name] for graph_input in session.get_inputs()}
        return dict(zip(names, session.run(names, wanted), strict=True))

    def condition(self, guided: bool) -> dict[str, Any]:
        settings = self.manifest.text
        texts = [(PROMPT, 0), (PROMPT if settings.null_caption else NEGATIVE, 1)][: 1 + guided]
        if self.manifest.guidance_order == "negative_first":
            texts.reverse()
        tokens = self.tokenizer.encode([text for text, _ in texts])
        length = settings.max_tokens if settings.padded else self.tokenizer.encode([PROMPT]).lengths[0]
        states = self.run("text_encoder", input_ids=tokens.ids, attention_mask=tokens.mask)["text_states"]
        mask = np.ones((len(texts), length), np.int64)
        unconditional = np.array([negative for _, negative in texts], np.int64)
        return self.run("condition", text_states=states[:, :length], text_mask=mask, unconditional=unconditional)

    def latents(self, steps: int, guidance: float, policy: Policy) -> tuple[Any, list[str]]:
        """The final latents, and for every step one letter per block: C computed, r reused, d dead."""
        guided = guidance != 1
        rows = 2 if guided else 1
        text = self.condition(guided)
        schedule = self.table.schedule(steps)
        noise = Noise((SEED,), self.manifest.shape.latents, Arrays())
        sampler = schedule.begin(noise.draw(), noise.draw)
        blocks = [block.name for block in self.manifest.blocks]
        cached: dict[str, Any] = {}
        metrics: dict[str, float] = {}
        warmup: dict[str, list[float]] = {name: [] for name in blocks}
        history = []
        for step in range(steps):
            plan = self.plan(policy, step, steps, blocks, metrics, warmup)
            latents = np.repeat(sampler.model_input(step), rows, 0)
            timestep = np.full(rows, schedule.timesteps[step], np.float32)
            start = self.run("prologue", latents=latents, timestep=timestep, **text)
            stream = {name: start[name] for name in self.manifest.streams}
            for name, decision in zip(blocks, plan, strict=True):
                residual = policy.cache == "residual"
                if decision == "r":
                    stream = {x: stream[x] + cached[name][x] if residual else cached[name][x] for x in stream}
                    continue
                known = name in cached
                old = (
                    {x: stream[x] + cached[name][x] if residual else cached[name][x] for x in stream}
                    if known
                    else stream
                )
                given = {f"cached_{x}": values for x, values in old.items()}
                result = self.run(name, **{**start, **text, **stream, **given})
                new = {x: result[f"new_{x}"] for x in stream}
                if decision == "C":
                    if known:
                        metrics[name] = float(result["distance"].mean(dtype=np.float64))
                        if step < self.warmup_steps(policy, steps):
                            warmup[name].append(metrics[name])
                    cached[name] = {x: new[x] - stream[x] for x in stream} if residual else new
                stream = new
            output = self.run("epilogue", **{**start, **text, **stream})["model_output"]
            sampler.advance(step, guide([output], np.float32(guidance), rows, self.manifest.guidance_order))
            history.append("".join(plan))
        return sampler.latents, history

    @staticmethod
    def warmup_steps(policy: Policy, steps: int) -> int:
        wanted = getattr(policy, "warmup", None)
        return int(wanted) if wanted is not None else max(2, -(-15 * steps // 100))

    def plan(
        self,
        policy: Policy,
        step: int,
        steps: int,
        blocks: list[str],
        metrics: dict[str, float],
        warmup: dict[str, list[float]],
    ) -> list[str]:
        if isinstance(policy, NoReuse):
            return ["C"] * len(blocks)
        assert isinstance(policy, (Static, Foresight))
        since = step - self.warmup_steps(policy, steps)
        if since < 0 or step == steps - 1 or since % policy.interval >= policy.reuse_steps:
            return ["C"] * len(blocks)
        if isinstance(policy, Static):
            plan = ["r"] * len(blocks)
        else:
            limits = {
                name: policy.gamma * sum(w * c for w, c in zip((1, 0.1, 0.01), warmup[name][::-1], strict=False))
                for name in blocks
            }
            plan = ["r" if metrics[name] <= limits[name] else "C" for name in blocks]
        if policy.cache == "output" and "r" in plan:
            deepest = max(index for index, decision in enumerate(plan) if decision == "r")
            plan[:deepest] = ["d"] * deepest
        return plan


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, example_bundles: Callable[[str], Path]) -> Path:
    """A bundle of every family: one stream and two, a sampler that adds noise, a null caption."""
    return example_bundles(request.param)


@pytest.fixture(scope="module")
def loop(family: Path) -> VideoPipeline:
    return load_pipeline(family)


@pytest.fixture(scope="module")
def plain(family: Path) -> Plain:
    return Plain(family)


def make(pipeline: VideoPipeline, policy: Policy, guidance: float, steps: int) -> Video:
    settings: dict[str, Any] = {"steps": steps, "guidance": guidance, "seed": SEED, "policy": policy}
    if not pipeline.manifest.text.null_caption:
        settings["negative_prompt"] = NEGATIVE
    return pipeline(PROMPT, **settings)


POLICIES: dict[str, Policy] = {
    "none": NoReuse(),
    "none-residual": NoReuse(cache="residual"),
    "static": Static(),
    "static-residual": Static(cache="residual", warmup=3, reuse_steps=2, interval=3),
    "foresight-N1R2": Foresight(gamma=2),
    "foresight-N2R3": Foresight(gamma=1.5, reuse_steps=2, interval=3),
    "foresight-residual": Foresight(gamma=2, cache="residual"),
    "foresight-residual-N2R3": Foresight(gamma=1, cache="residual", reuse_steps=2, interval=3),
}
LETTERS = {"computed": "C", "reused": "r", "dead": "d"}


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("name", POLICIES)
def test_the_loop_gives_the_bytes_of_the_plain_one(
    plain: Plain, loop: VideoPipeline, name: str, guidance: float
) -> None:
    policy, steps = POLICIES[name], 14
    expected, _ = plain.latents(steps, guidance, policy)
    assert make(loop, policy, guidance, steps).latents.tobytes() == expected[0].tobytes()


@pytest.mark.parametrize("name", POLICIES)
def test_the_loop_decides_as_the_plain_one(plain: Plain, loop: VideoPipeline, name: str) -> None:
    policy, steps = POLICIES[name], 14
    _, expected = plain.latents(steps, 4.0, policy)
    video = make(loop, policy, 4.0, steps)
    assert ["".join(LETTERS[d] for d in step.decisions) for step in video.trace.steps] == expected


def test_the_same_request_gives_the_same_bytes(loop: VideoPipeline) -> None:
    first, again = (make(loop, Foresight(gamma=2), 4.0, 10) for _ in range(2))
    assert first.latents.tobytes() == again.latents.tobytes()
    assert first.frames.tobytes() == again.frames.tobytes()


def test_without_reuse_both_caches_give_the_same_bytes(pipeline: VideoPipeline) -> None:
    outputs, residuals = (pipeline(PROMPT, steps=6, policy=NoReuse(cache=cache)) for cache in ("output", "residual"))
    assert outputs.latents.tobytes() == residuals.latents.tobytes()


def test_reuse_changes_the_video(pipeline: VideoPipeline) -> None:
    exact, reused = (pipeline(PROMPT, steps=14, policy=policy) for policy in (NoReuse(), Static()))
    assert exact.latents.tobytes() != reused.latents.tobytes()


def test_a_block_runs_exactly_where_the_trace_says_so(bundle: Path) -> None:
    pipeline, backend = watched_pipeline(bundle)
    ran: list[str] = []
    backend.before = lambda part, tensors: ran.append(part)
    trace = pipeline(PROMPT, steps=14, policy=Foresight(gamma=2)).trace
    expected = [
        name
        for step in trace.steps
        for name, decision in zip(trace.blocks, step.decisions, strict=True)
        if decision == "computed"
    ]
    assert [part for part in ran if is_block(part)] == expected


def test_the_loop_waits_for_a_step_only_after_it_began_the_next(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a GPU has the end of one step and the beginning of the next to do while the host decides."""
    pipeline, backend = watched_pipeline(bundle)
    happened: list[str] = []
    backend.before = lambda part, tensors: happened.append("block" if is_block(part) else part)
    kind = type(pipeline.backend.arrays)
    start = kind.start_download

    @dataclass
    class Watched:
        download: Download

        def wait(self) -> HostArray:
            happened.append("wait")
            return self.download.wait()

    def start_download(self: Arrays, values: Any) -> Watched:
        happened.append("start")
        return Watched(start(self, values))

    monkeypatch.setattr(kind, "start_download", start_download)
    pipeline(PROMPT, steps=3, policy=NoReuse())
    blocks = ["block"] * len(pipeline.manifest.blocks)
    first = ["prologue", *blocks, "start", "epilogue"]
    later = ["prologue", "wait", *blocks, "start", "epilogue"]
    assert happened == ["text_encoder", "condition", *first, *later, *later, "wait", "vae_decoder"]


def test_text_is_encoded_once_and_prologue_and_epilogue_run_every_step(bundle: Path) -> None:
    pipeline, backend = watched_pipeline(bundle)
    ran: list[str] = []
    backend.before = lambda part, tensors: ran.append(part)
    pipeline(PROMPT, steps=5)
    once, each = ("text_encoder", "condition", "vae_decoder"), ("prologue", "epilogue")
    assert {part: ran.count(part) for part in (*once, *each)} == dict.fromkeys(once, 1) | dict.fromkeys(each, 5)


def test_guidance_of_one_runs_half_the_rows(bundle: Path) -> None:
    pipeline, backend = watched_pipeline(bundle)
    rows: set[int] = set()
    backend.before = lambda part, tensors: rows.add(len(tensors["hidden"])) if is_block(part) else None
    pipeline(PROMPT, steps=2, guidance=1)
    assert rows == {1}
    pipeline(PROMPT, steps=2, guidance=3)
    assert rows == {1, 2}


@pytest.mark.parametrize(("order", "expected"), [("negative_first", [1 + 3 * 9.0]), ("positive_first", [10 - 3 * 9.0])])
def test_guidance_goes_from_the_negative_towards_the_positive(order: str, expected: list[float]) -> None:
    assert guide([np.array([[1.0], [10.0]], np.float32)], 3.0, 2, order).tolist() == [expected]


def test_guidance_of_a_batch_pairs_each_prompt_with_its_own_negative() -> None:
    output = np.array([1, 2, 11, 22], np.float32)
    assert guide([output], 2.0, 2, "negative_first").tolist() == [21.0, 42.0]


def test_without_guidance_the_output_is_a_copy() -> None:
    output = np.ones(2, np.float32)
    assert not np.shares_memory(guide([output], 1.0, 1, "negative_first"), output)


# The trace


def test_every_block_of_every_step_is_accounted_for(pipeline: VideoPipeline) -> None:
    trace = pipeline(PROMPT, steps=14, policy=Foresight(gamma=2)).trace
    assert trace.blocks_computed + trace.blocks_reused + trace.blocks_dead == trace.blocks_possible == 14 * 4
    assert trace.share_skipped == 1 - trace.blocks_computed / trace.blocks_possible > 0


def test_distances_are_there_for_every_block_that_ran_with_something_to_compare(pipeline: VideoPipeline) -> None:
    trace = pipeline(PROMPT, steps=14, policy=Foresight(gamma=2)).trace
    assert trace.steps[0].distances == (None,) * 4
    for step in trace.steps[1:]:
        assert [distance is not None for distance in step.distances] == [d == "computed" for d in step.decisions]


def test_reused_blocks_were_within_their_limit(pipeline: VideoPipeline) -> None:
    trace = pipeline(PROMPT, steps=14, policy=Foresight(gamma=2, cache="residual")).trace
    for step in trace.steps:
        for decision, metric, limit in zip(step.decisions, step.metrics, step.limits, strict=True):
            assert decision != "reused" or (metric is not None and limit is not None and metric <= limit)


def test_on_step_is_told_the_steps_done_and_their_number(pipeline: VideoPipeline) -> None:
    told: list[tuple[int, int, int]] = []
    pipeline(PROMPT, steps=4, on_step=lambda done, steps, trace: told.append((done, steps, len(trace.steps))))
    assert told == [(1, 4, 1), (2, 4, 2), (3, 4, 3), (4, 4, 4)]
