"""From noise to final latents: a batch and all that denoising it takes, made for it alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..engines.arrays import Array
from ..engines.backend import Engine
from ..engines.errors import EngineError
from .admission import Reservation
from .caches import create_cache
from .denoise import DenoiseState, Outputs, Transformer, denoise
from .latents import initial_latents
from .lifecycle import Calls
from .loaded import Batch, Loaded
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
            _check_finite(self._loaded, final, self._batch.trace)
        return final

    def _state(self, expert: int, condition: dict[str, Array]) -> DenoiseState:
        loaded, batch = self._loaded, self._batch
        request, manifest, arrays = batch.request, loaded.manifest, loaded.backend.arrays
        rows, blocks, turn = request.rows, len(manifest.blocks), self._turns[expert]
        layout = loaded.limits.layout(request.policy)
        cache = create_cache(layout, manifest, arrays, rows, batch.cached)
        batch.trace.cache_bytes = cache.nbytes
        guidances = np.array(request.guidances[expert], np.float32).reshape(-1, *(1,) * len(manifest.shape.latents))
        return DenoiseState(
            arrays=arrays,
            sampler=self._sampler,
            schedule=request.schedule,
            turn=turn,
            expert=expert,
            mode=layout.mode,
            cache=cache,
            decider=request.policy.begin(request.context(batch.trace.kinds, turn)),
            outputs=Outputs(request.policy.outputs),
            tensors=_step_tensors(loaded, rows) | condition,
            distances=arrays.empty((blocks, -(-rows // DISTANCE_STRIDE) * DISTANCE_STRIDE), "fp32")[:, :rows],
            guidances=arrays.from_host(guidances),
            halves=request.halves,
            trace=batch.trace,
            on_step=self._calls.on_step,
            on_progress=self._calls.on_progress,
            cancel=self._calls,
        )


def _step_tensors(loaded: Loaded, rows: int) -> dict[str, Array]:
    """The inputs and outputs of prologue and epilogue, apart from the stream and from what no step changes."""
    sizes, empty = loaded.manifest.largest(batch=rows), loaded.backend.arrays.empty
    return {spec.name: empty(spec.resolve(sizes), spec.dtype) for spec in loaded.manifest.step_tensors}


def _check_finite(loaded: Loaded, latents: Array, trace: Trace) -> None:
    """Refuse latents that no video can be made of. Raises EngineError."""
    if bool(loaded.backend.arrays.xp.isfinite(latents).all()):
        return
    first = trace.first_not_finite()
    seen = "" if first is None else f", first seen in {first}"
    raise EngineError(
        f"latents: got values that are not finite after {len(trace.steps)} steps{seen}; lower the guidance, "
        "or export with dtype bf16 or fp32"
    )
