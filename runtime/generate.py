"""One request's way through a loaded bundle: texts, noise, steps, frames."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from ..engines.arrays import Array
from ..engines.backend import Backend
from ..engines.errors import EngineError
from ..engines.manifest import Manifest
from ..engines.progress import Counter, Progress
from .admission import MemoryReservations, Reservation, check_cancelled
from .caches import create_cache
from .callbacks import OnFrames
from .decode import decode
from .denoise import DenoiseState, Outputs, Transformer, denoise
from .encode import encode
from .latents import initial_latents
from .lifecycle import Calls
from .memory import MemoryLimits
from .parts import Check, check_finite, pass_all
from .policies import Context
from .release import released
from .request import CheckedRequest
from .residency import Residency
from .sampler import Noise, Sampler
from .text import Texts, Tokenizer, read_texts
from .trace import Trace

DISTANCE_STRIDE = 64  # fp32 numbers from one block's distances to the next: engines want addresses 256 bytes apart


@dataclass(frozen=True)
class Loaded:
    """What the requests of a pipeline share; none of them changes it.

    With `only_finite`, values that no video can be made of are refused wherever they come up.
    """

    manifest: Manifest
    backend: Backend
    residency: Residency
    tokenizer: Tokenizer
    limits: MemoryLimits
    reservations: MemoryReservations
    only_finite: bool

    @property
    def check(self) -> Check:
        """Judges what every part but the blocks made."""
        return check_finite if self.only_finite else pass_all


@dataclass(frozen=True)
class Generation:
    """A request on its way; `trace` is filled as it goes. Everything else that it makes is its own and goes with it."""

    loaded: Loaded
    request: CheckedRequest
    cached: tuple[bool, ...]
    calls: Calls
    trace: Trace

    def run(self) -> tuple[list[Array], Array]:
        """Frames (F, H, W, 3) uint8 of every prompt, and final latents (prompts, *latent shape) fp32.

        Raises Cancelled, OutOfMemory, EngineError, IntegrityError; the error holds none of the request's arrays.
        """
        request, loaded = self.request, self.loaded
        check_cancelled(self.calls, "before it began")
        with self._timed("text_ms"):
            texts = read_texts(
                loaded.tokenizer,
                loaded.manifest,
                request.prompts,
                request.negative_prompt,
                request.halves,
                self.calls,
            )
        self.trace.truncated_prompts = texts.truncated
        with loaded.residency.turn(self.calls), released():
            return self._run(texts)

    def _run(self, texts: Texts) -> tuple[list[Array], Array]:
        loaded, request, arrays = self.loaded, self.request, self.loaded.backend.arrays
        loaded.residency.files.check()
        compiled, prompts = loaded.backend.compiled(loaded.residency.bundle), len(request.prompts)
        plan = loaded.limits.plan(loaded.manifest, request.policy, prompts, request.halves == 2, compiled)
        self.trace.planned_bytes = plan.total
        with loaded.reservations.reserve(plan.per_request, prompts) as memory:
            final = self._sample(texts, memory)
            check_cancelled(self.calls, "before its frames were decoded")
            memory.begin_phase()
            with self._timed("decode_ms"):
                frames = self._decode(final)
            if request.to_host:
                final = arrays.to_host(final)
            self.trace.device_bytes = arrays.used_bytes()
            return frames, final

    def _sample(self, texts: Texts, memory: Reservation) -> Array:
        """Final latents; all else that sampling takes is free again."""
        request, arrays = self.request, self.loaded.backend.arrays
        noise = Noise(request.seeds, self.loaded.manifest.shape.latents, arrays)
        initial = initial_latents(request.latents, noise, arrays)
        with self._timed("text_ms"):
            condition = self._encode(texts)
        check_cancelled(self.calls, "before its first step")
        memory.begin_phase()
        with self._timed("denoise_ms"):
            state = self._state(condition, request.schedule.begin(initial, noise.draw))
            final = self._denoise(state)
        memory.look()  # while the request's buffers are there
        return final

    def _encode(self, texts: Texts) -> dict[str, Array]:
        loaded, manifest = self.loaded, self.loaded.manifest
        parts = (manifest.text_encoder, manifest.condition)
        with loaded.residency.phase(parts, self.calls, self.calls.on_progress) as engines:
            self.calls.on_progress(Progress("encoding text", 0, len(texts.tokens.ids), "texts"))
            return encode(manifest, engines, loaded.backend.arrays, texts, loaded.check)

    def _state(self, condition: dict[str, Array], sampler: Sampler) -> DenoiseState:
        """Everything the loop needs, made for this request alone."""
        request, manifest, arrays = self.request, self.loaded.manifest, self.loaded.backend.arrays
        rows, blocks = request.rows, len(manifest.blocks)
        layout = self.loaded.limits.layout(request.policy)
        cache = create_cache(layout, manifest, arrays, rows, self.cached)
        self.trace.cache_bytes = cache.nbytes
        return DenoiseState(
            arrays=arrays,
            sampler=sampler,
            schedule=request.schedule,
            mode=layout.mode,
            cache=cache,
            decider=request.policy.begin(Context(request.schedule, self.trace.kinds, len(request.prompts))),
            outputs=Outputs(request.policy.outputs),
            tensors=self._step_tensors() | condition,
            distances=arrays.empty((blocks, -(-rows // DISTANCE_STRIDE) * DISTANCE_STRIDE), "fp32")[:, :rows],
            guidance=request.guidance,
            halves=request.halves,
            trace=self.trace,
            on_step=self.calls.on_step,
            on_progress=self.calls.on_progress,
            cancel=self.calls,
        )

    def _step_tensors(self) -> dict[str, Array]:
        """The inputs and outputs of prologue and epilogue, apart from the stream and from what no step changes."""
        manifest, sizes = self.loaded.manifest, self.loaded.manifest.largest(batch=self.request.rows)
        empty = self.loaded.backend.arrays.empty
        return {spec.name: empty(spec.resolve(sizes), spec.dtype) for spec in manifest.step_tensors}

    def _denoise(self, state: DenoiseState) -> Array:
        manifest = self.loaded.manifest
        with self.loaded.residency.phase(manifest.transformer, self.calls, self.calls.on_progress) as engines:
            prologue, *blocks, epilogue = engines
            model = Transformer(prologue, tuple(blocks), epilogue, manifest.guidance_order)
            with np.errstate(over="ignore", invalid="ignore"):  # it is looked for below, on every device
                final = denoise(model, state)
        if self.loaded.only_finite:
            self._check_final(final)
        return final

    def _check_final(self, latents: Array) -> None:
        """Refuse latents that no video can be made of. Raises EngineError."""
        if bool(self.loaded.backend.arrays.xp.isfinite(latents).all()):
            return
        first = self.trace.first_not_finite()
        seen = "" if first is None else f", first seen in {first}"
        raise EngineError(
            f"latents: got values that are not finite after {len(self.trace.steps)} steps{seen}; lower the guidance, "
            "or export with dtype bf16 or fp32"
        )

    def _decode(self, latents: Array) -> list[Array]:
        """Each video's latents to frames (F, H, W, 3) uint8."""
        loaded, manifest = self.loaded, self.loaded.manifest
        parts = [part for stage in manifest.decoder for part in stage.parts]
        with loaded.residency.phase(parts, self.calls, self.calls.on_progress) as listed:
            engines = {part.name: engine for part, engine in zip(parts, listed, strict=True)}
            chunks = len(latents) * sum(len(stage.chunks) for stage in manifest.decoder)
            counter = Counter("decoding", chunks, "chunks", self.calls.on_progress)
            told = [_Decoded(place, counter, self.calls.on_frames) for place in range(len(latents))]
            arrays, to_host = loaded.backend.arrays, self.request.to_host
            try:
                return [
                    decode(manifest, engines, arrays, video, to_host, loaded.check, self.calls, tell)
                    for video, tell in zip(latents, told, strict=True)
                ]
            finally:
                engines.clear()  # the comprehension's frame has it

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        """Add the wall time of the block to one of the trace's fields."""
        started = time.perf_counter()
        yield
        setattr(self.trace, phase, getattr(self.trace, phase) + 1e3 * (time.perf_counter() - started))


@dataclass
class _Decoded:
    """Tells that a chunk of one prompt's video was decoded, and the frames of those that are some."""

    prompt: int
    counter: Counter
    on_frames: OnFrames | None
    frames: int = 0

    def __call__(self, frames: Array | None) -> None:
        self.counter.advance()
        if frames is None:
            return
        if self.on_frames is not None:
            self.on_frames(self.prompt, self.frames, frames)
        self.frames += len(frames)
