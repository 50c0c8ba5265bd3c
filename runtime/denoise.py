"""The denoising loop: from noise to latents, running the blocks that the policy wants run.

`denoise` is the algorithm of arXiv 2506.00329 and holds no state of its own: all that changes belongs to the request
it is given. Blocks write into cache slots and the next block reads from there; see cache.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np

from ..engines.arrays import Array, Arrays, Download
from ..engines.backend import Engine
from ..engines.progress import OnProgress, Progress, silent
from .admission import CancelToken, check_cancelled
from .cache import BlockCache
from .decode import run_engine
from .policies import Decider, Decision, eliminate_dead
from .sampler import Sampler, Schedule
from .trace import Trace

OnStep = Callable[[int, int, Trace], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Transformer:
    """The engines of one model's transformer, shared by all requests."""

    prologue: Engine
    blocks: tuple[Engine, ...]
    epilogue: Engine
    guidance_order: Literal["negative_first", "positive_first"]


@dataclass
class Request:
    """Everything one request owns. Arrays are on the backend's device.

    `tensors` are the graphs' inputs and outputs by name, apart from the stream, which `cache` holds; `distances` is
    (blocks, rows) fp32, written by the blocks. `halves` is 2 with guidance, else 1.
    """

    arrays: Arrays
    sampler: Sampler
    schedule: Schedule
    cache: BlockCache
    decider: Decider
    drop_dead: bool
    tensors: dict[str, Array]
    distances: Array
    guidance: float
    halves: int
    trace: Trace
    on_step: OnStep | None = None
    on_progress: OnProgress = silent
    cancel: CancelToken | None = None


def denoise(model: Transformer, request: Request) -> Array:
    """Run all steps; returns the final latents, (prompts, …) fp32. Raises Cancelled, EngineError.

    On a GPU this hands work over and runs ahead of it. Only to decide on a step it waits, for what the blocks of the
    step before measured; by then the device has the end of that step and the beginning of this one still to do.
    """
    arrays, cache, sampler, steps = request.arrays, request.cache, request.sampler, request.schedule.steps
    distances: Download | None = None
    measured: list[bool] = []
    for step in range(steps):
        started = time.perf_counter()
        _set_inputs(request, step)
        _run(model.prologue, request, cache.enter())
        if distances is not None:
            _observe(request, step - 1, distances, measured)
        measures = request.decider.measures()
        decisions = _decide(request, step)
        measured = [False] * len(model.blocks)
        for block, decision in enumerate(decisions):
            check_cancelled(request.cancel, f"in step {step + 1} of {steps}, before block {block}")
            _tell(request, step, block)
            if decision is Decision.COMPUTE:
                stream, measured[block] = cache.bind(block)
                _run(model.blocks[block], request, {**stream, "distance": request.distances[block]})
                cache.commit(block)
            elif decision is Decision.REUSE:
                cache.reuse(block)
        distances = arrays.start_download(request.distances)
        _run(model.epilogue, request, cache.stream)
        output = request.tensors["model_output"]
        sampler.advance(step, guide(output, request.guidance, request.halves, model.guidance_order))
        if step == steps - 1:
            _wait(request, arrays.synchronize)
        elapsed_ms = 1e3 * (time.perf_counter() - started)
        request.trace.record(float(request.schedule.timesteps[step]), elapsed_ms, decisions, measures)
        if request.on_step is not None:
            request.on_step(step + 1, steps, request.trace)
    if distances is not None:
        _observe(request, steps - 1, distances, measured)
    return sampler.latents


def guide(output: Array, guidance: float, halves: int, order: str) -> Array:
    """Classifier-free guidance over a batch (halves x prompts, …): negative + guidance (positive - negative)."""
    if halves == 1:
        return output.copy()
    prompts = len(output) // 2
    first, second = output[:prompts], output[prompts:]
    negative, positive = (first, second) if order == "negative_first" else (second, first)
    return negative + np.float32(guidance) * (positive - negative)


def _tell(request: Request, step: int, block: int) -> None:
    """Say that this block comes now."""
    steps, blocks = request.schedule.steps, len(request.trace.blocks)
    detail, share = f"block {block + 1} of {blocks}", block / blocks
    request.on_progress(Progress("denoising", step, steps, "steps", detail, share))


def _set_inputs(request: Request, step: int) -> None:
    latents = request.sampler.model_input(step)
    rows = request.tensors["latents"]
    for half in range(request.halves):
        rows[half * len(latents) : (half + 1) * len(latents)] = latents
    request.tensors["timestep"][:] = request.schedule.timesteps[step]


def _run(engine: Engine, request: Request, tensors: Mapping[str, Array]) -> None:
    started = time.perf_counter()
    run_engine(engine, {**request.tensors, **tensors})
    request.trace.engine_ms += 1e3 * (time.perf_counter() - started)


def _decide(request: Request, step: int) -> list[Decision]:
    """The policy's decisions, as far as outputs are cached at all; without the blocks that nothing depends on."""
    planned = zip(request.decider.plan(step), request.cache.cached, strict=True)
    decisions = [decision if cached else Decision.COMPUTE for decision, cached in planned]
    return eliminate_dead(decisions) if request.drop_dead else decisions


def _observe(request: Request, step: int, distances: Download, measured: Sequence[bool]) -> None:
    """Tell the policy and the trace what a step measured, once that is on the host."""
    rows = _wait(request, distances.wait)
    prompts = rows.reshape(len(rows), request.halves, -1).mean(axis=1, dtype=np.float64)
    changes = [tuple(map(float, row)) if known else None for row, known in zip(prompts, measured, strict=True)]
    request.decider.observe(step, changes)
    request.trace.measure(step, [max(change) if change else None for change in changes])


def _wait(request: Request, wait: Callable[[], T]) -> T:
    started = time.perf_counter()
    result = wait()
    request.trace.wait_ms += 1e3 * (time.perf_counter() - started)
    return result
