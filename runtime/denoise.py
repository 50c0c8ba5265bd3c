"""The denoising loop: from noise to latents, running the blocks that the policy wants run.

`denoise` is the algorithm of arXiv 2506.00329 and holds no state of its own: all that changes belongs to the request
it is given. Blocks write into cache slots and the next block reads from there; see cache.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from ..engines.arrays import Array, Arrays
from ..engines.backend import Engine
from ..engines.errors import Cancelled
from .cache import BlockCache
from .policies import Decider, Decision, eliminate_dead
from .sampler import Sampler, Schedule
from .trace import Trace

OnStep = Callable[[int, int, Trace], None]


class CancelToken(Protocol):
    """Anything like threading.Event: the request stops before its next block once `is_set()` is true."""

    def is_set(self) -> bool:
        """Whether to stop."""


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
    cancel: CancelToken | None = None


def denoise(model: Transformer, request: Request) -> Array:
    """Run all steps; returns the final latents, (prompts, …) fp32. Raises Cancelled, EngineError."""
    cache, sampler, steps = request.cache, request.sampler, request.schedule.steps
    measured: list[bool] = []
    for step in range(steps):
        started = time.perf_counter()
        if step:
            _observe(request, step - 1, measured)
        measures = request.decider.measures()
        decisions = request.decider.plan(step)
        if request.drop_dead:
            decisions = eliminate_dead(decisions)
        _set_inputs(request, step)
        _run(model.prologue, request, cache.enter())
        measured = [False] * len(model.blocks)
        for block, decision in enumerate(decisions):
            if request.cancel is not None and request.cancel.is_set():
                raise Cancelled(f"request: cancelled in step {step + 1} of {steps}, before block {block}")
            if decision is Decision.COMPUTE:
                stream, measured[block] = cache.bind(block)
                _run(model.blocks[block], request, {**stream, "distance": request.distances[block]})
                cache.commit(block)
            elif decision is Decision.REUSE:
                cache.reuse(block)
        _run(model.epilogue, request, cache.stream)
        output = request.tensors["model_output"]
        sampler.advance(step, guide(output, request.guidance, request.halves, model.guidance_order))
        request.arrays.synchronize()
        elapsed_ms = 1e3 * (time.perf_counter() - started)
        request.trace.record(float(request.schedule.timesteps[step]), elapsed_ms, decisions, measures)
        if request.on_step is not None:
            request.on_step(step + 1, steps, request.trace)
    _observe(request, steps - 1, measured)
    return sampler.latents


def guide(output: Array, guidance: float, halves: int, order: str) -> Array:
    """Classifier-free guidance over a batch (halves x prompts, …): negative + guidance (positive - negative)."""
    if halves == 1:
        return output.copy()
    prompts = len(output) // 2
    first, second = output[:prompts], output[prompts:]
    negative, positive = (first, second) if order == "negative_first" else (second, first)
    return negative + np.float32(guidance) * (positive - negative)


def _set_inputs(request: Request, step: int) -> None:
    latents = request.sampler.model_input(step)
    rows = request.tensors["latents"]
    for half in range(request.halves):
        rows[half * len(latents) : (half + 1) * len(latents)] = latents
    request.tensors["timestep"][:] = request.schedule.timesteps[step]


def _run(engine: Engine, request: Request, tensors: Mapping[str, Array]) -> None:
    started = time.perf_counter()
    engine.run({**request.tensors, **tensors})
    request.trace.engine_ms += 1e3 * (time.perf_counter() - started)


def _observe(request: Request, step: int, measured: Sequence[bool]) -> None:
    """Bring the step's distances to the host, in one transfer, and tell the policy and the trace."""
    rows = request.arrays.to_host(request.distances)
    prompts = rows.reshape(len(rows), request.halves, -1).mean(axis=1, dtype=np.float64)
    distances = [tuple(map(float, row)) if known else None for row, known in zip(prompts, measured, strict=True)]
    request.decider.observe(step, distances)
    request.trace.measure(step, [max(distance) if distance else None for distance in distances])
