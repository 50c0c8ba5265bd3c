"""From noise to final latents: a batch and all that denoising it takes, made for it alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..engines.arrays import Array
from ..engines.backend import Engine
from ..engines.errors import EngineError
from .admission import Reservation
from .caches import BlockCache, create_caches
from .denoise import DenoiseState, Outputs, Pass, Transformer, denoise
from .latents import initial_latents
from .lifecycle import Calls
from .loaded import Batch, Loaded
from .parts import wrong_values
from .sampler import Noise
from .trace import Trace

DISTANCE_STRIDE = 64  # fp32 numbers from one block's distances to the next: engines want addresses 256 bytes apart


class Sampling:
    """One batch on its way from noise to latents, which each of the model's transformers takes on in its turn."""

    def __init__(self, loaded: Loaded, batch: Batch, conditions: Sequence[dict[str, Array]], calls: Calls) -> None:
        """`conditions` are what texts became, for each of the transformers; an entry goes when its turn is over."""
        request, manifest, arrays = batch.request, loaded.manifest, loaded.backend.arrays
        self._loaded, self._batch, self._calls = loaded, batch, calls
        self._conditions = list(conditions)
        self._turns = request.schedule.turns([expert.below for expert in manifest.later_experts])
        noise = Noise(request.seeds, manifest.shape.latents, arrays)
        self._sampler = request.schedule.begin(initial_latents(request.latents, noise, arrays), noise.draw)

    def has_turn(self, expert: int) -> bool:
        """Whether there are steps for one of the transformers."""
        return len(self._turns[expert]) > 0

    def take_turn(self, expert: int, engines: Sequence[Engine], memory: Reservation) -> None:
        """Run the steps of one transformer, whose engines these are. Raises Cancelled, EngineError."""
        prologue, *blocks, epilogue = engines
        model = Transformer(prologue, tuple(blocks), epilogue, self._loaded.manifest.guidance_order)
        state = self._state(expert, self._conditions[expert])
        self._conditions[expert] = {}
        with np.errstate(over="ignore", invalid="ignore"):  # it is looked for below, on every device
            denoise(model, state)
        memory.look()  # while the request's buffers are there

    def finish(self) -> Array:
        """Final latents (prompts, *latent shape) fp32. Raises EngineError where they are not finite."""
        final = self._sampler.latents
        if self._loaded.only_finite:
            _check_finite(final, self._batch.trace)
        return final

    def _state(self, expert: int, condition: dict[str, Array]) -> DenoiseState:
        loaded, batch = self._loaded, self._batch
        request, manifest, arrays = batch.request, loaded.manifest, loaded.backend.arrays
        turn = self._turns[expert]
        layout = loaded.limits.layout(request.policy, request.halves)
        caches = create_caches(layout, manifest, arrays, request.rows, batch.cached)
        batch.trace.cache_bytes = caches[-1].nbytes
        guidances = np.array(request.guidances[expert], np.float32).reshape(-1, *(1,) * len(manifest.shape.latents))
        return DenoiseState(
            arrays=arrays,
            sampler=self._sampler,
            schedule=request.schedule,
            turn=turn,
            expert=expert,
            mode=layout.mode,
            passes=_passes(loaded, caches, request.rows, condition),
            decider=request.policy.begin(request.context(batch.trace.kinds, turn)),
            outputs=Outputs(request.policy.outputs),
            guidances=arrays.from_host(guidances),
            halves=request.halves,
            trace=batch.trace,
            on_step=self._calls.on_step,
            on_progress=self._calls.on_progress,
            cancel=self._calls,
        )


def _passes(loaded: Loaded, caches: Sequence[BlockCache], rows: int, condition: dict[str, Array]) -> list[Pass]:
    """The rows of a batch, as many in each pass; they share what each step writes anew, but for the output."""
    manifest, arrays = loaded.manifest, loaded.backend.arrays
    each = rows // len(caches)
    sizes = manifest.largest(batch=each)
    shared = {spec.name: arrays.empty(spec.resolve(sizes), spec.dtype) for spec in manifest.step_tensors}
    output = manifest.epilogue.output("model_output")
    wide = -(-each // DISTANCE_STRIDE) * DISTANCE_STRIDE
    return [
        Pass(
            cache,
            shared
            | {output.name: arrays.empty(output.resolve(sizes), output.dtype)}
            | _rows_of(loaded, condition, slice(index * each, (index + 1) * each), rows),
            arrays.empty((len(manifest.blocks), wide), "fp32")[:, :each],
        )
        for index, cache in enumerate(caches)
    ]


def _rows_of(loaded: Loaded, condition: dict[str, Array], own: slice, rows: int) -> dict[str, Array]:
    """Of what the texts became, the rows of one pass: arrays of their own, as engines want them to begin anywhere."""
    if own.stop - own.start == rows:
        return condition
    by_row = {spec.name for spec in loaded.manifest.condition.outputs if spec.shape[0] == "batch"}
    return {name: array[own].copy() if name in by_row else array for name, array in condition.items()}


def _check_finite(latents: Array, trace: Trace) -> None:
    """Refuse latents that no video can be made of, or that came of changes that are not finite. Raises EngineError."""
    wrong = wrong_values(latents)
    if wrong is None and trace.has_finite_changes:
        return
    first = trace.first_not_finite()
    seen = "" if first is None else f", first seen in {first}"
    raise EngineError(
        f"latents: got {wrong or 'changes of blocks that are not finite'} after {len(trace.steps)} steps{seen}; lower "
        "the guidance, or export with dtype bf16 or fp32"
    )
