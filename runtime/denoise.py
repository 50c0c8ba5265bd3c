"""The denoising loop: from noise to latents, running the blocks that the policy wants run.

`denoise` is the algorithm of arXiv 2506.00329 and holds no state of its own: all that changes belongs to the request
whose state it is given. Blocks write into cache slots and the next block reads from there; see runtime/caches.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import numpy as np

from ..engines.arrays import Array, Arrays, Download
from ..engines.backend import Engine
from ..engines.errors import InvalidRequest
from ..engines.progress import OnProgress, Progress, silent
from .admission import CancelToken, check_cancelled
from .caches import BlockCache, CacheMode
from .decisions import Decision, Measure
from .parts import run_engine
from .policies import Decider
from .sampler import Sampler, Schedule
from .trace import Trace

OnStep = Callable[[int, int, Trace], object]
T = TypeVar("T")


@dataclass(frozen=True)
class Transformer:
    """The engines of one model's transformer, shared by all requests."""

    prologue: Engine
    blocks: tuple[Engine, ...]
    epilogue: Engine
    guidance_order: Literal["negative_first", "positive_first"]


class Outputs:
    """The last `most` computed model outputs of one request, newest first: what forecasts are made of."""

    def __init__(self, most: int) -> None:
        self._kept: deque[Array] = deque(maxlen=most)

    def keep(self, output: Array) -> None:
        """Add the newest; it is only read."""
        self._kept.appendleft(output)

    def weigh(self, weights: Sequence[float]) -> Array:
        """Their weighted sum, a new array. Raises InvalidRequest where there are fewer of them than weights."""
        if not 0 < len(weights) <= len(self._kept):
            raise InvalidRequest(
                f"policy: got a forecast of {len(weights)} outputs, expected 1 to {len(self._kept)}, which are kept"
            )
        total = self._kept[0] * np.float32(weights[0])
        for weight, output in zip(weights[1:], list(self._kept)[1:], strict=False):
            total += output * np.float32(weight)
        return total


@dataclass(frozen=True)
class Pass:
    """Rows of the guided batch that go through the model together: nearly always all, else the rows of one half.

    `tensors` are the graphs' inputs and outputs by name, apart from the stream, which `cache` holds; `distances` is
    (blocks, rows) fp32, written by the blocks.
    """

    cache: BlockCache
    tensors: dict[str, Array]
    distances: Array


@dataclass
class DenoiseState:
    """Everything that one request owns while it is denoised. Arrays are on the backend's device.

    `turn` are the steps that this transformer, the `expert`-th, runs, of all that the schedule has: nearly always all.
    Steps count from the first of them. `guidances` are those of the prompts, see `guide`; `halves` is 2 with guidance,
    else 1. `measuring` is the step whose distances are on their way to the host, and which of its blocks measured any;
    `erring` the step whose distance from what was expected is.
    """

    arrays: Arrays
    sampler: Sampler
    schedule: Schedule
    turn: range
    expert: int
    mode: CacheMode
    passes: Sequence[Pass]
    decider: Decider
    outputs: Outputs
    guidances: Array
    halves: int
    trace: Trace
    on_step: OnStep | None = None
    on_progress: OnProgress = silent
    cancel: CancelToken | None = None
    measuring: tuple[int, list[bool], list[Download]] | None = field(default=None, init=False)
    erring: tuple[int, Download] | None = field(default=None, init=False)


def denoise(model: Transformer, state: DenoiseState) -> None:
    """Run all steps of a turn; what comes of it is the sampler's latents. Raises Cancelled, EngineError.

    On a GPU this hands work over and runs ahead of it. Only to decide on a step it waits, for what the blocks of the
    step before measured; by then the device has the end of that step and the beginning of this one still to do.
    """
    blocks, of = len(model.blocks), state.schedule.steps
    for step, overall in enumerate(state.turn):
        started = time.perf_counter()
        _observe_output(state)
        weights, estimate = state.decider.forecast(step), state.decider.estimate()
        if weights is None:
            decisions, measures, output = _run_step(model, state, step)
        else:
            check_cancelled(state.cancel, f"in step {overall + 1} of {of}, before its forecast")
            decisions, measures, output = [Decision.FORECAST] * blocks, [None] * blocks, state.outputs.weigh(weights)
        state.sampler.advance(overall, output)
        if overall == state.turn[-1]:
            _wait(state, state.arrays.synchronize)
        elapsed_ms = 1e3 * (time.perf_counter() - started)
        state.trace.record(
            float(state.schedule.timesteps[overall]), elapsed_ms, decisions, measures, estimate, state.expert
        )
        if state.on_step is not None:
            state.on_step(overall + 1, of, state.trace)
    _observe(state)
    _observe_output(state)


def _run_step(model: Transformer, state: DenoiseState, step: int) -> tuple[list[Decision], list[Measure | None], Array]:
    """A step in which the model runs: what was decided for each block, on which grounds, and the guided output."""
    first, *others = state.passes
    _begin_pass(model, state, first, step)
    _observe(state)
    measures = state.decider.measures()
    decisions = _decide(state, step)
    measured, download = _finish_pass(model, state, first, step, decisions)
    downloads = [download]
    for rows in others:
        _begin_pass(model, state, rows, step)
        downloads.append(_finish_pass(model, state, rows, step, decisions)[1])
    state.measuring = step, measured, downloads
    outputs = [rows.tensors["model_output"] for rows in state.passes]
    output = guide(outputs, state.guidances, state.halves, model.guidance_order)
    state.decider.see(step, output)
    expected = state.decider.expected(step)
    if expected is not None:
        state.erring = step, state.arrays.start_download(_rms(output - state.outputs.weigh(expected), state.arrays))
    state.outputs.keep(output)
    return decisions, measures, output


def _begin_pass(model: Transformer, state: DenoiseState, rows: Pass, step: int) -> None:
    _set_inputs(state, rows, step)
    _run(model.prologue, state, rows, rows.cache.enter(step))


def _finish_pass(
    model: Transformer, state: DenoiseState, rows: Pass, step: int, decisions: Sequence[Decision]
) -> tuple[list[bool], Download]:
    """Run what was decided; returns which blocks measured a change, and the distances on their way."""
    measured, overall = [False] * len(model.blocks), state.turn[step]
    for block, decision in enumerate(decisions):
        check_cancelled(state.cancel, f"in step {overall + 1} of {state.schedule.steps}, before block {block}")
        _tell(state, rows, overall, block)
        if decision is Decision.COMPUTE:
            stream, measured[block] = rows.cache.bind(block)
            _run(model.blocks[block], state, rows, {**stream, "distance": rows.distances[block]})
            rows.cache.commit(block)
        elif decision is Decision.REUSE:
            rows.cache.reuse(block)
    download = state.arrays.start_download(rows.distances)
    _run(model.epilogue, state, rows, rows.cache.stream)
    rows.cache.leave()
    return measured, download


def guide(outputs: Sequence[Array], guidances: Array, halves: int, order: str) -> Array:
    """Classifier-free guidance: negative + guidance (positive - negative); without halves a copy.

    `outputs` are the model's for all rows (halves x prompts, …), or for each half (prompts, …). `guidances` are fp32,
    one a prompt, (prompts, 1, …) with as many dimensions as the output has.
    """
    if halves == 1:
        return outputs[0].copy()
    if len(outputs) == 1:
        prompts = len(outputs[0]) // 2
        outputs = (outputs[0][:prompts], outputs[0][prompts:])
    first, second = outputs
    negative, positive = (first, second) if order == "negative_first" else (second, first)
    return negative + guidances * (positive - negative)


def _tell(state: DenoiseState, rows: Pass, overall: int, block: int) -> None:
    """Say that this block comes now."""
    blocks, done = len(state.trace.blocks), state.passes.index(rows)
    detail, share = f"block {block + 1} of {blocks}", (done * blocks + block) / (len(state.passes) * blocks)
    state.on_progress(Progress("denoising", overall, state.schedule.steps, "steps", detail, share))


def _set_inputs(state: DenoiseState, rows: Pass, step: int) -> None:
    latents = state.sampler.model_input(state.turn[step])
    given = rows.tensors["latents"]
    for first in range(0, len(given), len(latents)):
        given[first : first + len(latents)] = latents
    rows.tensors["timestep"][:] = state.schedule.timesteps[state.turn[step]]


def _run(engine: Engine, state: DenoiseState, rows: Pass, tensors: Mapping[str, Array]) -> None:
    started = time.perf_counter()
    run_engine(engine, {**rows.tensors, **tensors})
    state.trace.engine_ms += 1e3 * (time.perf_counter() - started)


def _decide(state: DenoiseState, step: int) -> list[Decision]:
    """The policy's decisions, as far as blocks are cached at all; without those that nothing depends on."""
    planned = zip(state.decider.plan(step), state.passes[0].cache.cached, strict=True)
    return state.mode.eliminate_dead([decision if cached else Decision.COMPUTE for decision, cached in planned])


def _observe(state: DenoiseState) -> None:
    """Tell the policy and the trace what the last step that ran has measured, once that is on the host."""
    if state.measuring is None:
        return
    step, measured, downloads = state.measuring
    state.measuring = None
    rows = np.concatenate([_wait(state, distances.wait) for distances in downloads], axis=1)
    prompts = rows.reshape(len(rows), state.halves, -1).mean(axis=1, dtype=np.float64)
    changes = [tuple(map(float, row)) if known else None for row, known in zip(prompts, measured, strict=True)]
    state.decider.observe(step, changes)
    state.trace.measure(state.turn[step], [max(change) if change else None for change in changes])


def _observe_output(state: DenoiseState) -> None:
    """Tell the policy and the trace how far from what was expected the last computed output was."""
    if state.erring is None:
        return
    step, distances = state.erring
    state.erring = None
    errors = tuple(map(float, _wait(state, distances.wait)))
    state.decider.observe_output(step, errors)
    state.trace.err(state.turn[step], max(errors))


def _rms(difference: Array, arrays: Arrays) -> Array:
    """Root mean square over all but the first dimension, (prompts,) fp32."""
    rows = difference.reshape(len(difference), -1)
    root: Array = arrays.xp.sqrt((rows * rows).mean(axis=1))
    return root


def _wait(state: DenoiseState, wait: Callable[[], T]) -> T:
    started = time.perf_counter()
    result = wait()
    state.trace.wait_ms += 1e3 * (time.perf_counter() - started)
    return result
