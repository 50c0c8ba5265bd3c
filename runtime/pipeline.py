"""VideoPipeline: a loaded bundle; text in, videos out."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NoReturn, overload

import numpy as np

from ..engines.arrays import Array, Arrays
from ..engines.backend import Backend, Engine, choose_backend, create_backend
from ..engines.bundle import Bundle, Unchanged, open_bundle, verify_files
from ..engines.errors import EngineError, InvalidRequest, quoted
from ..engines.manifest import Part, part_files
from ..engines.progress import Counter, OnProgress, Progress
from .admission import CancelToken, MemoryReservations, OneAtATime, Reservation, check_cancelled
from .arguments import (
    check_count,
    check_guidance,
    check_policy,
    check_prompts,
    check_seeds,
    check_text,
)
from .budget import Profile, choose_cached
from .cache import Layout, create_cache
from .callbacks import check_callbacks
from .decode import check_finite, decode, run_part
from .denoise import OnStep, Request, Transformer, denoise
from .lifecycle import Calls, Lifecycle
from .memory import MemoryPlan, plan_memory
from .policies import Policy, policy_settings
from .release import released
from .sampler import Noise, Sampler, Schedule, load_table
from .text import Texts, Tokenizer, read_texts
from .trace import Trace
from .video import Video

APART = 64  # fp32 numbers from one block's distances to the next one's: engines want addresses 256 bytes apart


@dataclass(frozen=True)
class _Job:
    """What one call asks for, checked."""

    schedule: Schedule
    policy: Policy
    cached: tuple[bool, ...]
    latents: Array | None
    on_step: OnStep | None
    on_progress: OnProgress
    cancel: CancelToken | None
    to_host: bool


class VideoPipeline:
    """The engines of one bundle on one backend. Requests may run in several threads; they share nothing mutable."""

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        *,
        low_memory: bool = False,
        cache_memory: int | None = None,
        cache_profile: Profile | None = None,
        fixed_slots: bool = False,
        on_progress: OnProgress | None = None,
    ) -> None:
        """Load every engine of `bundle`, whose files must have been verified.

        With `low_memory` a request loads the engines of each phase when it needs them and frees them afterwards, and
        requests run one at a time. `cache_memory` is the most bytes that the stream and the cached outputs of one
        request may take; blocks that find no room are run every time, and `cache_profile` helps to choose them.
        `fixed_slots` gives every block cache addresses of its own, for CUDA graphs, at twice the memory of the cache.
        `on_progress` is told of the phase "loading", in bytes. Raises EngineError, BundleError, IntegrityError.
        """
        self.bundle = bundle
        self.manifest = bundle.manifest
        self.backend = backend
        self.low_memory = low_memory
        self.cache_memory = cache_memory
        self.cache_profile = cache_profile
        self.fixed_slots = fixed_slots
        self._files = Unchanged(bundle)
        self._table = load_table(bundle.file(self.manifest.sampler.table), self.manifest.sampler.max_steps)
        self._engines: dict[str, Engine] = {}
        self._life = Lifecycle(self._engines, backend)
        self._tokenizer = self._load(on_progress)
        self._turns = OneAtATime() if low_memory else None
        self._room = MemoryReservations(backend.arrays)

    @overload
    def __call__(
        self,
        prompt: str,
        *,
        negative_prompt: str | None = ...,
        steps: int | None = ...,
        guidance: float | None = ...,
        seed: int | Sequence[int] = ...,
        policy: Policy | None = ...,
        latents: Array | None = ...,
        on_step: OnStep | None = ...,
        on_progress: OnProgress | None = ...,
        cancel: CancelToken | None = ...,
        to_host: bool = ...,
    ) -> Video: ...

    @overload
    def __call__(
        self,
        prompt: list[str] | tuple[str, ...],
        *,
        negative_prompt: str | None = ...,
        steps: int | None = ...,
        guidance: float | None = ...,
        seed: int | Sequence[int] = ...,
        policy: Policy | None = ...,
        latents: Array | None = ...,
        on_step: OnStep | None = ...,
        on_progress: OnProgress | None = ...,
        cancel: CancelToken | None = ...,
        to_host: bool = ...,
    ) -> list[Video]: ...

    def __call__(
        self,
        prompt: str | list[str] | tuple[str, ...],
        *,
        negative_prompt: str | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int | Sequence[int] = 0,
        policy: Policy | None = None,
        latents: Array | None = None,
        on_step: OnStep | None = None,
        on_progress: OnProgress | None = None,
        cancel: CancelToken | None = None,
        to_host: bool = True,
    ) -> Video | list[Video]:
        """Make a video of a prompt, or of each prompt of a list in one batch.

        What is None is the bundle's default; `policy` is then `Foresight()`. `seed` is one number, to which a batch
        adds the prompt's position, or one per prompt. `latents` is the initial noise instead: (prompts, *latent
        shape) or, for one prompt, the latent shape; fp32; a numpy array, or one that speaks DLPack. `on_step` is
        called after every step with the steps done, their number and the trace so far; `on_progress`, with a Progress,
        where a phase begins, before every block and after every decoded chunk, and with `low_memory` after every engine
        that was loaded. `cancel` is looked at before every phase, text and block, after every decoded chunk, and while
        the request waits for its turn; while a graph runs, every few milliseconds from another thread, and ONNX Runtime
        ends it then. A guidance of 1 runs without the negative half. With `to_host` False, frames and latents stay
        arrays of the device, which others can
        take over by DLPack; on the CPU they are numpy's in any case.

        Raises InvalidRequest before anything runs; Cancelled, OutOfMemory and EngineError, which also tells of results
        that are not finite, leave the pipeline usable, and hold none of the request's arrays.
        """
        self._life.check()
        defaults = self.manifest.defaults
        prompts = check_prompts(prompt, self.manifest.shape.max_batch)
        schedule = self._table.schedule(defaults.steps if steps is None else steps)
        policy = check_policy(policy)
        check_callbacks(on_step, cancel, on_progress)
        seeds = check_seeds(seed, len(prompts))
        trace = Trace(
            model=self.manifest.model,
            bundle=self.bundle.id,
            blocks=tuple(block.name for block in self.manifest.blocks),
            kinds=tuple(block.kind for block in self.manifest.blocks),
            policy=policy_settings(policy),
            backend=self.backend.describe(),
            prompts=prompts,
            negative_prompt=self._check_negative(negative_prompt),
            steps_requested=schedule.steps,
            guidance=check_guidance(defaults.guidance if guidance is None else guidance),
            seeds=seeds,
            latents_given=latents is not None,
        )
        calls = Calls(self._life, on_step, cancel, on_progress)
        given = None if latents is None else self._check_latents(latents, len(prompts))
        cached = self._choose_cached(policy, trace)
        job = _Job(schedule, policy, cached, given, calls.on_step, calls.on_progress, calls, to_host)
        frames, final = calls.run(lambda: self._take_turn(job, trace))
        videos = [
            Video(frames=f, latents=x, fps=defaults.fps, prompt=text, seed=s, trace=trace)
            for f, x, text, s in zip(frames, final, prompts, seeds, strict=True)
        ]
        return videos[0] if isinstance(prompt, str) else videos

    def memory(self, prompts: int = 1, guided: bool = True, policy: Policy | None = None) -> MemoryPlan:
        """What a request takes of the device's memory. Raises InvalidRequest where `cache_memory` is too small."""
        policy = check_policy(policy)
        return self._plan_memory(policy, prompts, guided, sum(self._slots(policy, prompts * (2 if guided else 1))))

    def close(self, *, cancel: bool = False, timeout: float | None = None) -> bool:
        """Refuse new requests, wait for those that run, and free the engines; from any thread, as often as one likes.

        With `cancel` those that run are cancelled. Waits for at most `timeout` seconds (None: for ever); inside a
        callback of one of its own requests it does not wait. Returns whether all is free. If not, no request is let in
        any more, the last one to leave frees the engines, and close may be called again, with `cancel` say. In a forked
        child, which may not use the pipeline, it does nothing. Raises InvalidRequest.
        """
        return self._life.close(cancel, timeout)

    @property
    def closed(self) -> bool:
        """Whether `close` was called: requests are refused."""
        return self._life.closed

    def __enter__(self) -> VideoPipeline:
        """Raises InvalidRequest where the pipeline is closed."""
        self._life.check()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Close it; on an error, requests that still run are cancelled."""
        self.close(cancel=kind is not None)

    def __reduce__(self) -> NoReturn:
        raise InvalidRequest("pipeline: cannot be copied or sent to another process; load the bundle there")

    def _load(self, on_progress: OnProgress | None) -> Tokenizer:
        """The tokenizer; and load what stays loaded. Raises Cancelled where the interpreter exits meanwhile."""
        calls = Calls(self._life, on_progress=on_progress)

        def load_all() -> Tokenizer:
            tokenizer = Tokenizer(self.bundle.file(self.manifest.text.tokenizer), self.manifest.text)
            self._files.check(self.manifest.text.tokenizer, self.manifest.sampler.table)
            parts = () if self.low_memory else self.manifest.parts
            loaded = self._counter(parts, calls.on_progress)
            for part in parts:
                check_cancelled(calls, "while its engines were loaded")
                self._engines[part.name] = self._load_engine(part)
                loaded.advance(self._bytes(part))
            return tokenizer

        return calls.run(load_all)

    def _load_engine(self, part: Part) -> Engine:
        """The engine of the files that were verified, and of no others. Raises IntegrityError, EngineError."""
        self._files.check(*part_files(part))
        engine = self.backend.load(self.bundle, part)
        self._files.check(*part_files(part))
        return engine

    def _counter(self, parts: Sequence[Part], on_progress: OnProgress) -> Counter:
        """Of the bytes of parts that are about to be loaded."""
        return Counter("loading", sum(map(self._bytes, parts)), "bytes", on_progress if parts else None)

    def _bytes(self, part: Part) -> int:
        return sum(self.manifest.files[name].bytes for name in part_files(part))

    def _take_turn(self, job: _Job, trace: Trace) -> tuple[list[Array], Array]:
        """`_run`, when it is the request's turn."""
        check_cancelled(job.cancel, "before it began")
        with _timed(trace, "text_ms"):
            texts = read_texts(
                self._tokenizer,
                self.manifest,
                trace.prompts,
                trace.negative_prompt,
                _halves(trace.guidance),
                job.cancel,
            )
        trace.truncated_prompts = texts.truncated
        turn = nullcontext() if self._turns is None else self._turns.turn(job.cancel)
        with turn, self.backend.arrays.active():
            try:
                with released():
                    return self._run(job, trace, texts)
            finally:
                if self.low_memory:
                    self.backend.trim()

    def draws_noise(self, steps: int) -> bool:
        """Whether the sampler adds noise, drawn from a request's seeds, after the first. Raises InvalidRequest."""
        return bool(self._table.schedule(steps).noise_coefficients.any())

    def __repr__(self) -> str:
        shape = self.manifest.shape
        return (
            f"<VideoPipeline {self.manifest.model} of {self.bundle.path}: {shape.frames} frames of {shape.height} x "
            f"{shape.width}, {self.backend.name} on {self.backend.arrays.device}>"
        )

    def _run(self, job: _Job, trace: Trace, texts: Texts) -> tuple[list[Array], Array]:
        """Frames and final latents of every prompt; fills the trace."""
        self._files.check()
        arrays, prompts = self.backend.arrays, len(trace.prompts)
        plan = self._plan_memory(job.policy, prompts, _halves(trace.guidance) == 2, sum(job.cached))
        trace.planned_bytes = plan.total
        with self._room.reserve(plan.per_request, prompts) as memory:
            final = self._sample(job, trace, texts, memory)
            check_cancelled(job.cancel, "before its frames were decoded")
            memory.begin_phase()
            with _timed(trace, "decode_ms"):
                frames = self._decode(final, job)
            if job.to_host:
                final = arrays.to_host(final)
            trace.device_bytes = arrays.used_bytes()
            return frames, final

    def _sample(self, job: _Job, trace: Trace, texts: Texts, memory: Reservation) -> Array:
        """Final latents; all else that sampling takes is free again."""
        noise = Noise(trace.seeds, self.manifest.shape.latents, self.backend.arrays)
        initial = self._initial(job.latents, noise)
        with _timed(trace, "text_ms"):
            condition = self._encode(texts, job)
        check_cancelled(job.cancel, "before its first step")
        memory.begin_phase()
        with _timed(trace, "denoise_ms"):
            request = self._request(condition, job.schedule.begin(initial, noise.draw), job, trace)
            final = self._denoise(request, job)
        memory.look()  # while the request's buffers are there
        return final

    def _plan_memory(self, policy: Policy, prompts: int, guided: bool, slots: int) -> MemoryPlan:
        compiled, layout = self.backend.compiled(self.bundle), self._layout(policy)
        return plan_memory(self.manifest, prompts, guided, layout, slots, self.low_memory, compiled)

    def _layout(self, policy: Policy) -> Layout:
        return Layout(policy.cache, self.fixed_slots)

    def _slots(self, policy: Policy, rows: int) -> tuple[bool, ...]:
        buffer = rows * self.manifest.cache_bytes_per_row[self.manifest.blocks[0].name]
        blocks, layout = len(self.manifest.blocks), self._layout(policy)
        return choose_cached(layout, blocks, buffer, self.cache_memory, self.cache_profile)

    def _choose_cached(self, policy: Policy, trace: Trace) -> tuple[bool, ...]:
        """Per block whether there is room for its output. Raises InvalidRequest."""
        cached = self._slots(policy, len(trace.prompts) * _halves(trace.guidance))
        trace.uncached = tuple(name for name, kept in zip(trace.blocks, cached, strict=True) if not kept)
        return cached

    def _check_negative(self, negative_prompt: str | None) -> str:
        default = self.manifest.defaults.negative_prompt
        text = check_text("negative_prompt", default if negative_prompt is None else negative_prompt, True)
        if self.manifest.text.null_caption and text:
            raise InvalidRequest(
                f"negative_prompt: got {quoted(text)}, expected none: this model reads a learnt null caption instead; "
                "leave it out"
            )
        return text

    def _request(self, condition: dict[str, Array], sampler: Sampler, job: _Job, trace: Trace) -> Request:
        """Everything the loop needs, made for this request alone."""
        blocks, arrays = len(self.manifest.blocks), self.backend.arrays
        halves = _halves(trace.guidance)
        rows = halves * len(trace.prompts)
        cache = create_cache(self._layout(job.policy), self.manifest, arrays, rows, job.cached)
        trace.cache_bytes = cache.nbytes
        return Request(
            arrays=arrays,
            sampler=sampler,
            schedule=job.schedule,
            cache=cache,
            decider=job.policy.begin(job.schedule.steps, blocks),
            drop_dead=job.policy.cache == "output",
            tensors=self._step_tensors(rows) | condition,
            distances=arrays.empty((blocks, -(-rows // APART) * APART), "fp32")[:, :rows],
            guidance=trace.guidance,
            halves=halves,
            trace=trace,
            on_step=job.on_step,
            on_progress=job.on_progress,
            cancel=job.cancel,
        )

    def _denoise(self, request: Request, job: _Job) -> Array:
        with self._loaded(job, *self.manifest.transformer) as engines:
            prologue, *blocks, epilogue = engines
            model = Transformer(prologue, tuple(blocks), epilogue, self.manifest.guidance_order)
            with np.errstate(over="ignore", invalid="ignore"):  # it is looked for below, on every device
                final = denoise(model, request)
        self._check_finite(final, request.trace)
        return final

    def _check_finite(self, latents: Array, trace: Trace) -> None:
        """Refuse latents that no video can be made of. Raises EngineError."""
        if bool(self.backend.arrays.xp.isfinite(latents).all()):
            return
        first = trace.first_not_finite()
        seen = "" if first is None else f", first seen in step {first[0] + 1}, {trace.blocks[first[1]]}"
        raise EngineError(
            f"latents: got values that are not finite after {len(trace.steps)} steps{seen}; lower the guidance, or "
            "export with --dtype bf16 or fp32"
        )

    def _check_made(self, part: Part, arrays: Arrays, made: Mapping[str, Array]) -> None:
        """Refuse what text encoder, condition or decoder made where it is not finite. Raises EngineError."""
        check_finite(part, arrays, made)

    @contextmanager
    def _loaded(self, job: _Job, *parts: Part) -> Iterator[list[Engine]]:
        """The engines of a phase; with `low_memory` they are there only for it, and may be cancelled one by one."""
        if not self.low_memory:
            yield [self._engines[part.name] for part in parts]
            return
        self.backend.trim()
        engines: list[Engine] = []
        try:
            loaded = self._counter(parts, job.on_progress)
            for part in parts:
                check_cancelled(job.cancel, "while its engines were loaded")
                engines.append(self._load_engine(part))
                loaded.advance(self._bytes(part))
            yield engines
        finally:
            self.backend.arrays.synchronize()
            engines.clear()

    def _initial(self, latents: Array | None, noise: Noise) -> Array:
        """Initial noise (prompts, *latent shape) fp32 on the device: the first that is drawn, or the caller's."""
        drawn = noise.draw()
        if latents is None:
            return drawn
        return self.backend.arrays.from_host(latents) if isinstance(latents, np.ndarray) else latents

    def _check_latents(self, latents: Array, prompts: int) -> Array:
        """A view of the caller's array: (prompts, *latent shape) fp32, finite. Raises InvalidRequest."""
        arrays = self.backend.arrays
        on_host = isinstance(latents, np.ndarray)
        with nullcontext() if on_host else arrays.active():
            given = latents if on_host else self._taken_over(latents)
            expected = (prompts, *self.manifest.shape.latents)
            if given.shape == expected[1:] and prompts == 1:
                given = given[None]
            if given.shape != expected or given.dtype != np.float32:
                raise InvalidRequest(
                    f"latents: got {given.dtype} {given.shape}, expected float32 {expected}, as the bundle was exported"
                )
            if not bool((np if on_host else arrays.xp).isfinite(given).all()):
                raise InvalidRequest("latents: got values that are not finite, expected normal noise")
            return given

    def _taken_over(self, latents: Array) -> Array:
        try:
            return self.backend.arrays.xp.from_dlpack(latents)
        except (AttributeError, BufferError, TypeError, ValueError, RuntimeError) as error:
            got = f"a {type(latents).__name__}"
            raise InvalidRequest(f"latents: got {got}, expected a float32 array, numpy's or by DLPack") from error

    def _encode(self, texts: Texts, job: _Job) -> dict[str, Array]:
        """The inputs that no step changes: the condition part's outputs, in the order of the guided batch.

        Unless the model reads padding too, a prompt and its negative are both cut to the prompt's length, as their
        pipelines do for one prompt; in a batch each is masked to its own length, so that no prompt sees another's
        padding. The part is told which rows are the negative half, as a model may put its null caption there.
        """
        arrays, xp, tokens = self.backend.arrays, self.backend.arrays.xp, texts.tokens
        longest = int(texts.lengths.max())
        text_encoder, condition = self.manifest.text_encoder, self.manifest.condition
        with self._loaded(job, text_encoder, condition) as engines:
            job.on_progress(Progress("encoding text", 0, len(tokens.ids), "texts"))
            encoded = run_part(
                engines[0],
                text_encoder,
                arrays,
                {"input_ids": arrays.from_host(tokens.ids), "attention_mask": arrays.from_host(tokens.mask)},
                {"batch": len(tokens.ids)},
            )
            self._check_made(text_encoder, arrays, encoded)
            states = encoded["text_states"]
            mask = (np.arange(longest)[None] < texts.lengths[:, None]).astype(np.int64)
            made = run_part(
                engines[1],
                condition,
                arrays,
                {
                    "text_states": xp.ascontiguousarray(states[arrays.from_host(texts.order), :longest]),
                    "text_mask": arrays.from_host(mask),
                    "unconditional": arrays.from_host(texts.unconditional),
                },
                self._sizes(batch=len(texts.order), text=longest),
            )
            self._check_made(condition, arrays, made)
            return made

    def _step_tensors(self, rows: int) -> dict[str, Array]:
        """The inputs and outputs of prologue and epilogue, apart from the stream and from what no step changes."""
        sizes = {name: largest for name, (_, largest) in self.manifest.ranges.items()} | {"batch": rows}
        return {
            spec.name: self.backend.arrays.empty(spec.resolve(sizes), spec.dtype) for spec in self.manifest.step_tensors
        }

    def _sizes(self, **known: int) -> dict[str, int]:
        """Every named dimension, at its largest where it is not known."""
        return {name: largest for name, (_, largest) in self.manifest.ranges.items()} | known

    def _decode(self, latents: Array, job: _Job) -> list[Array]:
        """Each video's latents to frames (F, H, W, 3) uint8."""
        parts = [part for stage in self.manifest.decoder for part in stage.parts]
        with self._loaded(job, *parts) as loaded:
            engines = {part.name: engine for part, engine in zip(parts, loaded, strict=True)}
            arrays = self.backend.arrays
            chunks = len(latents) * sum(len(stage.chunks) for stage in self.manifest.decoder)
            made = Counter("decoding", chunks, "chunks", job.on_progress).advance
            try:
                return [
                    decode(self.manifest, engines, arrays, video, job.to_host, self._check_made, job.cancel, made)
                    for video in latents
                ]
            finally:
                engines.clear()  # the comprehension's frame has it


def load(
    bundle: str | os.PathLike[str],
    *,
    backend: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    low_memory: bool = False,
    cache_memory: int | None = None,
    cache_profile: Mapping[str, Any] | None = None,
    cuda_graphs: bool = False,
    shared_weights: bool = False,
    on_progress: OnProgress | None = None,
) -> VideoPipeline:
    """Open a bundle, verify all its files, and load its engines.

    `backend` None is the one that the bundle has engines for, built for the GPU at hand, else onnxruntime. `device`
    None is the backend's own: the CPU for onnxruntime, else the first GPU. `threads` is for CPU backends (None: the
    cores this process may use, up to 16): each engine has as many. `low_memory` loads each phase's engines when a
    request needs them. `cache_memory` is the most bytes for one request's stream and cache; what finds no room is not
    cached, chosen by what an earlier request reused if `cache_profile`, its `trace.to_dict()`, is given.
    `cuda_graphs`, with TensorRT, records every block's kernels and replays them; the cache then takes twice the memory.
    `shared_weights`, on CPUs, leaves weights mapped from the bundle instead of copying and repacking them: processes
    that serve the same bundle share them, each request takes some per cent longer, and to truncate a file of the
    bundle while a request runs ends the process. `on_progress` is called with a Progress as bytes are verified,
    then loaded.
    Raises BundleError, IntegrityError, EngineError, InvalidRequest.
    """
    check_callbacks(None, None, on_progress)
    check_count("threads", threads)
    check_count("cache_memory", cache_memory)
    opened = open_bundle(bundle)
    verify_files(opened, *(() if on_progress is None else (on_progress,)))
    return VideoPipeline(
        opened,
        create_backend(backend or choose_backend(opened, device), device, threads, cuda_graphs, shared_weights),
        low_memory=low_memory,
        cache_memory=cache_memory,
        cache_profile=None if cache_profile is None else Profile.from_trace(cache_profile),
        fixed_slots=cuda_graphs,
        on_progress=on_progress,
    )


@contextmanager
def _timed(trace: Trace, phase: str) -> Iterator[None]:
    """Add the wall time of the block to one of the trace's fields."""
    started = time.perf_counter()
    yield
    setattr(trace, phase, getattr(trace, phase) + 1e3 * (time.perf_counter() - started))


def _halves(guidance: float) -> int:
    """Guidance 1 needs no negative half."""
    return 1 if guidance == 1 else 2
