"""One request's way through a loaded bundle: texts, noise, steps, frames."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from ..engines.arrays import Array
from ..engines.backend import Engine
from ..engines.manifest import Part
from ..engines.progress import Counter, Progress
from .admission import Reservation, check_cancelled
from .callbacks import OnFrames
from .decode import decode
from .encode import encode
from .lifecycle import Calls
from .loaded import Batch, Loaded
from .memory import MemoryPlan, in_turns
from .release import released
from .request import CheckedRequest
from .sample import Sampling
from .text import Texts, read_embeddings, read_texts
from .trace import Trace


@dataclass(frozen=True)
class Generation:
    """A request on its way, whose batches go through each phase one after the other.

    Their traces are filled as it goes. Everything else that it makes is its own and goes with it.
    """

    loaded: Loaded
    batches: tuple[Batch, ...]
    calls: Calls

    def run(self) -> list[tuple[list[Array], Array]]:
        """Of every batch, frames (F, H, W, 3) uint8 of every prompt, and final latents (prompts, *latent shape) fp32.

        Raises Cancelled, OutOfMemory, EngineError, IntegrityError; the error holds none of the request's arrays.
        """
        check_cancelled(self.calls, "before it began")
        texts = [self._read(batch) for batch in self.batches]
        with self.loaded.residency.turn(self.calls), released():
            return self._run(texts)

    def _read(self, batch: Batch) -> Texts:
        loaded, request = self.loaded, batch.request
        prompts, halves = request.prompts, request.halves
        with timed(batch.trace, "text_ms"):
            if request.embeddings is not None:
                texts = read_embeddings(
                    loaded.manifest, prompts, request.embeddings, request.negative_embeddings, halves
                )
            else:
                texts = read_texts(
                    loaded.tokenizer, loaded.manifest, prompts, request.negative_prompts, halves, self.calls
                )
        batch.trace.truncated_prompts = texts.truncated
        return texts

    def _run(self, texts: Sequence[Texts]) -> list[tuple[list[Array], Array]]:
        loaded = self.loaded
        loaded.residency.files.check()
        plans = [self._plan(batch.request) for batch in self.batches]
        for batch in self.batches:
            batch.trace.planned_bytes = in_turns(plans).total
        prompts = sum(len(batch.request.prompts) for batch in self.batches)
        with loaded.reservations.reserve(in_turns(plans).per_request, prompts) as memory:
            finals = self._sample(texts, memory)
            if not self.batches[0].request.decode:
                return [self._undecoded(batch, finals.pop(0)) for batch in self.batches]
            check_cancelled(self.calls, "before its frames were decoded")
            memory.begin_phase()
            return self._decode(finals)

    def _plan(self, request: CheckedRequest) -> MemoryPlan:
        loaded = self.loaded
        compiled = loaded.backend.compiled(loaded.residency.bundle)
        return loaded.limits.plan(loaded.manifest, request.policy, len(request.prompts), request.halves == 2, compiled)

    def _sample(self, texts: Sequence[Texts], memory: Reservation) -> list[Array]:
        """Final latents of every batch; all else that sampling takes is free again."""
        conditions = self._encode(texts)
        check_cancelled(self.calls, "before its first step")
        memory.begin_phase()
        batches = [Sampling(self.loaded, batch, conditions.pop(0), self.calls) for batch in self.batches]
        for index, expert in enumerate(self.loaded.manifest.experts):
            if not any(batch.has_turn(index) for batch in batches):
                continue
            with self._phase(expert.transformer, "denoise_ms") as engines:
                for batch, sampling in zip(self.batches, batches, strict=True):
                    with timed(batch.trace, "denoise_ms"):
                        sampling.take_turn(index, engines, memory)
        return [batches.pop(0).finish() for _ in self.batches]

    def _encode(self, texts: Sequence[Texts]) -> list[list[dict[str, Array]]]:
        loaded, manifest = self.loaded, self.loaded.manifest
        reads = any(own.states is None for own in texts)
        conditions_of = tuple(expert.condition for expert in manifest.experts)
        parts = (manifest.text_encoder, *conditions_of) if reads else conditions_of
        conditions = []
        with self._phase(parts, "text_ms") as engines:
            for batch, own in zip(self.batches, texts, strict=True):
                self.calls.on_progress(Progress("encoding text", 0, len(set(own.order)), "texts"))
                with timed(batch.trace, "text_ms"):
                    conditions.append(encode(manifest, engines, loaded.backend.arrays, own, loaded.check))
        return conditions

    @contextmanager
    def _phase(self, parts: Sequence[Part], field: str) -> Iterator[list[Engine]]:
        """The engines of a phase. What it takes to load them counts for each batch, as each has to wait for it."""
        started = time.perf_counter()
        with self.loaded.residency.phase(parts, self.calls, self.calls.on_progress) as engines:
            for batch in self.batches:
                add_time(batch.trace, field, started)
            yield engines

    def _decode(self, finals: list[Array]) -> list[tuple[list[Array], Array]]:
        """Latents of every batch to frames (F, H, W, 3) uint8 of every video, beside the latents."""
        manifest = self.loaded.manifest
        parts = [part for stage in manifest.decoder for part in stage.parts]
        chunks = sum(map(len, finals)) * sum(len(stage.chunks) for stage in manifest.decoder)
        with self._phase(parts, "decode_ms") as listed:
            engines = {part.name: engine for part, engine in zip(parts, listed, strict=True)}
            counter = Counter("decoding", chunks, "chunks", self.calls.on_progress)
            told = [_Decoded(place, counter, self.calls.on_frames) for place in range(sum(map(len, finals)))]
            try:
                return [self._decode_batch(batch, engines, finals.pop(0), told) for batch in self.batches]
            finally:
                engines.clear()  # the comprehension's frame has them
                finals.clear()

    def _undecoded(self, batch: Batch, final: Array) -> tuple[list[Array], Array]:
        arrays, shape = self.loaded.backend.arrays, self.loaded.manifest.shape
        nothing = arrays.empty((0, shape.height, shape.width, 3), "uint8")
        return [nothing] * len(final), self._leaving(batch, final)

    def _leaving(self, batch: Batch, final: Array) -> Array:
        """Latents where the caller wants them, at the end of a batch."""
        arrays = self.loaded.backend.arrays
        batch.trace.device_bytes = arrays.used_bytes()
        return arrays.to_host(final) if batch.request.to_host else final

    def _decode_batch(
        self, batch: Batch, engines: dict[str, Engine], final: Array, told: list[_Decoded]
    ) -> tuple[list[Array], Array]:
        loaded, arrays, to_host = self.loaded, self.loaded.backend.arrays, batch.request.to_host
        with timed(batch.trace, "decode_ms"):
            frames = [
                decode(loaded.manifest, engines, arrays, video, to_host, loaded.check, self.calls, told.pop(0))
                for video in final
            ]
        return frames, self._leaving(batch, final)


@contextmanager
def timed(trace: Trace, phase: str) -> Iterator[None]:
    """Add the wall time of the block to one of the trace's fields."""
    started = time.perf_counter()
    yield
    add_time(trace, phase, started)


def add_time(trace: Trace, phase: str, started: float) -> None:
    """Add what has passed since then."""
    setattr(trace, phase, getattr(trace, phase) + 1e3 * (time.perf_counter() - started))


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
