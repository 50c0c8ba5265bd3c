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
from .policies import Context
from .sampler import Noise
from .trace import Trace

DISTANCE_STRIDE = 64  # fp32 numbers from one block's distances to the next: engines want addresses 256 bytes apart


def sample(
    loaded: Loaded,
    batch: Batch,
    engines: Sequence[Engine],
    condition: dict[str, Array],
    memory: Reservation,
    calls: Calls,
) -> Array:
    """Final latents (prompts, *latent shape) fp32; `engines` are the transformer's, `condition` is what texts became.

    Raises Cancelled, EngineError.
    """
    prologue, *blocks, epilogue = engines
    model = Transformer(prologue, tuple(blocks), epilogue, loaded.manifest.guidance_order)
    state = _state(loaded, batch, condition, calls)
    with np.errstate(over="ignore", invalid="ignore"):  # it is looked for below, on every device
        final = denoise(model, state)
    if loaded.only_finite:
        _check_finite(loaded, final, batch.trace)
    memory.look()  # while the request's buffers are there
    return final


def _state(loaded: Loaded, batch: Batch, condition: dict[str, Array], calls: Calls) -> DenoiseState:
    request, manifest, arrays = batch.request, loaded.manifest, loaded.backend.arrays
    rows, blocks = request.rows, len(manifest.blocks)
    noise = Noise(request.seeds, manifest.shape.latents, arrays)
    initial = initial_latents(request.latents, noise, arrays)
    layout = loaded.limits.layout(request.policy)
    cache = create_cache(layout, manifest, arrays, rows, batch.cached)
    batch.trace.cache_bytes = cache.nbytes
    guidances = np.array(request.guidances, np.float32).reshape(-1, *(1,) * len(manifest.shape.latents))
    return DenoiseState(
        arrays=arrays,
        sampler=request.schedule.begin(initial, noise.draw),
        schedule=request.schedule,
        mode=layout.mode,
        cache=cache,
        decider=request.policy.begin(Context(request.schedule, batch.trace.kinds, len(request.prompts))),
        outputs=Outputs(request.policy.outputs),
        tensors=_step_tensors(loaded, rows) | condition,
        distances=arrays.empty((blocks, -(-rows // DISTANCE_STRIDE) * DISTANCE_STRIDE), "fp32")[:, :rows],
        guidances=arrays.from_host(guidances),
        halves=request.halves,
        trace=batch.trace,
        on_step=calls.on_step,
        on_progress=calls.on_progress,
        cancel=calls,
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
