"""VideoPipeline: a loaded bundle; text in, videos out."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn, overload

from ..engines.arrays import Array
from ..engines.backend import Backend, choose_backend, create_backend
from ..engines.bundle import Bundle, open_bundle, verify_files
from ..engines.errors import InvalidRequest
from ..engines.progress import OnProgress
from ..engines.signatures import KeyFile, read_public_keys
from .admission import CancelToken, MemoryReservations
from .budget import Profile
from .callbacks import OnFrames, check_callbacks
from .denoise import OnStep
from .estimate import Estimate, Pace
from .generate import Generation
from .lifecycle import Calls, Lifecycle
from .loaded import Batch, Loaded
from .memory import MemoryLimits, MemoryPlan, in_turns
from .policies import Policy, policy_settings
from .profiles import check_profiles, profile_policy
from .prompts import encode_prompts
from .request import CheckedRequest, VideoRequest, check_count, check_policy, check_request
from .residency import Residency
from .sampler import load_table
from .schedules import can_forecast, draws_noise, fewest_steps, turns
from .stream import agenerate, astream, stream
from .text import Tokenizer
from .trace import Trace
from .video import Video


class VideoPipeline:
    """The engines of one bundle on one backend. Requests may run in several threads; they share nothing mutable."""

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        limits: MemoryLimits | None = None,
        *,
        only_finite: bool = True,
        on_progress: OnProgress | None = None,
    ) -> None:
        """Load every engine of `bundle`, whose files must have been verified.

        With `limits.low_memory` a request loads the engines of each phase when it needs them and frees them afterwards,
        and requests run one at a time. With `only_finite` False, results that are not finite are no errors.
        `on_progress` is told of the phase "loading", in bytes. Raises EngineError, BundleError, IntegrityError.
        """
        self.bundle = bundle
        self.manifest = bundle.manifest
        self.backend = backend
        compiled = backend.compiled(bundle)
        self.limits = limits or MemoryLimits()
        if compiled is not None and compiled.split_guidance:
            self.limits = replace(self.limits, split_guidance=True)
        residency = Residency(bundle, backend, self.limits.low_memory)
        sampler = self.manifest.sampler
        self._table = load_table(bundle.file(sampler.table), sampler.max_steps, sampler.kept)
        self._pace = Pace()
        self._life = Lifecycle(residency.engines, backend)
        calls = Calls(self._life, on_progress=on_progress)
        tokenizer = calls.run(lambda: _load(bundle, residency, calls))
        room = MemoryReservations(backend.arrays)
        self._loaded = Loaded(self.manifest, backend, residency, tokenizer, self.limits, room, only_finite)

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
        arrays of the device, which others can take over by DLPack; on the CPU they are numpy's in any case.

        Raises InvalidRequest before anything runs; Cancelled, OutOfMemory and EngineError, which also tells of results
        that are not finite, leave the pipeline usable, and hold none of the request's arrays.
        """
        request = VideoRequest(prompt, negative_prompt, steps, guidance, seed, policy, latents, to_host)
        videos = self.generate(request, on_step=on_step, on_progress=on_progress, cancel=cancel)
        return videos[0] if isinstance(prompt, str) else videos

    def generate(
        self,
        request: VideoRequest,
        *,
        on_step: OnStep | None = None,
        on_progress: OnProgress | None = None,
        on_frames: OnFrames | None = None,
        cancel: CancelToken | None = None,
    ) -> list[Video]:
        """Make the videos of a request, one a prompt; see `__call__`.

        `on_frames` is told frames as they are decoded: of which prompt, from which frame on, and (n, H, W, 3) uint8,
        on the host or, with `to_host` False, the device; they are only read.
        """
        self._life.check()
        check_callbacks(on_step, cancel, on_progress, on_frames)
        checked = check_request(request, self.manifest, self._table, self.backend.arrays)
        batches = tuple(_batch_of(one, self.limits, self.bundle, self.backend) for one in checked)
        calls = Calls(self._life, on_step, cancel, on_progress, on_frames, request.deadline)
        made = calls.run(Generation(self._loaded, batches, calls).run)
        for batch in batches:
            self._pace.record(batch.request, batch.trace)
            if batch.request.trace == "summary":
                batch.trace.summarise()
        return [
            Video(frames=f, latents=x, fps=self.manifest.defaults.fps, prompt=text, seed=s, trace=batch.trace)
            for batch, (frames, final) in zip(batches, made, strict=True)
            for f, x, text, s in zip(frames, final, batch.request.prompts, batch.request.seeds, strict=True)
        ]

    stream, astream, agenerate, encode = stream, astream, agenerate, encode_prompts
    turns, fewest_steps, draws_noise, can_forecast = turns, fewest_steps, draws_noise, can_forecast

    def check(self, request: VideoRequest) -> Estimate:
        """What a request takes of memory and time; nothing runs. Raises InvalidRequest where `generate` would."""
        checked = check_request(request, self.manifest, self._table, self.backend.arrays)
        plans = [self.memory(len(one.prompts), one.halves == 2, one.policy) for one in checked]
        return Estimate(in_turns(plans).per_request, self._pace.seconds(checked, len(self.manifest.blocks)))

    def warm_up(self, *, on_progress: OnProgress | None = None, cancel: CancelToken | None = None) -> None:
        """Make the bundle's sample video in as few steps as there can be: what only a first request does, is done.

        From then on `check` tells seconds. Raises what `generate` does.
        """
        request = VideoRequest(self.manifest.defaults.prompt, steps=self.fewest_steps())
        self.generate(request, on_progress=on_progress, cancel=cancel)

    def memory(self, prompts: int = 1, guided: bool = True, policy: Policy | None = None) -> MemoryPlan:
        """What a request takes of the device's memory. Raises InvalidRequest where `cache_memory` is too small."""
        compiled = self.backend.compiled(self.bundle)
        policy = check_policy(policy)
        return self.limits.plan(self.manifest, policy, prompts, guided, compiled)

    def profile(self, name: str, steps: int | None = None) -> Policy:
        """The policy that the bundle has under a name for so many steps (None: its default). Raises InvalidRequest."""
        return profile_policy(self.manifest, name, steps)

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

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close it; on an error, requests that still run are cancelled."""
        self.close(cancel=kind is not None)

    def __reduce__(self) -> NoReturn:
        raise InvalidRequest("pipeline: cannot be copied or sent to another process; load the bundle there")

    def __repr__(self) -> str:
        shape = self.manifest.shape
        return (
            f"<VideoPipeline {self.manifest.model} of {self.bundle.path}: {shape.frames} frames of {shape.height} x "
            f"{shape.width}, {self.backend.name} on {self.backend.arrays.device}>"
        )


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
    split_guidance: bool = False,
    shared_weights: bool = False,
    keys: Iterable[KeyFile] | None = None,
    on_progress: OnProgress | None = None,
) -> VideoPipeline:
    """Open a bundle, verify all its files, and load its engines.

    `backend` None is the one that the bundle has engines for, built for the GPU at hand, else onnxruntime. `device`
    None is the backend's own: the CPU for onnxruntime and openvino, else the first GPU. `threads` is for CPU backends
    (None: the cores this process may use, up to 16): each engine has as many. `low_memory` loads each phase's engines
    when a request needs them. `cache_memory` is the most bytes for one request's stream and cache; what finds no room
    is not cached, chosen by what an earlier request reused if `cache_profile`, its `trace.to_dict()`, is given.
    `cuda_graphs`, with TensorRT, records every block's kernels and replays them; the cache then takes twice the memory.
    With `split_guidance` the negative and the positive half of a guided batch go through the model one after the other:
    half the scratch, results within the backend's rounding of those of one batch.
    `shared_weights`, on CPUs, leaves weights mapped from the bundle instead of copying and repacking them: processes
    that serve the same bundle share them, each request takes some per cent longer, and to truncate a file of the
    bundle while a request runs ends the process. `keys` are PEM files of public Ed25519 keys, one of which must have
    signed the bundle, and its compiled engines where they are used; None takes any bundle. `on_progress` is called with
    a Progress as bytes are verified, then loaded.
    Raises BundleError, IntegrityError, EngineError, InvalidRequest.
    """
    check_callbacks(None, None, on_progress)
    check_count("threads", threads)
    check_count("cache_memory", cache_memory)
    profile = None if cache_profile is None else Profile.from_trace(cache_profile)
    opened = open_bundle(bundle, read_public_keys(keys))
    check_profiles(opened)
    verify_files(opened, *(() if on_progress is None else (on_progress,)))
    return VideoPipeline(
        opened,
        create_backend(backend or choose_backend(opened, device), device, threads, cuda_graphs, shared_weights),
        MemoryLimits(low_memory, cache_memory, profile, fixed_slots=cuda_graphs, split_guidance=split_guidance),
        on_progress=on_progress,
    )


def _load(bundle: Bundle, residency: Residency, calls: Calls) -> Tokenizer:
    """The tokenizer; and load what stays loaded. Raises Cancelled where the interpreter exits meanwhile."""
    text, table = bundle.manifest.text, bundle.manifest.sampler.table
    tokenizer = Tokenizer(bundle.file(text.tokenizer), text)
    residency.files.check(text.tokenizer, table)
    residency.load(calls, calls.on_progress)
    return tokenizer


def _batch_of(request: CheckedRequest, limits: MemoryLimits, bundle: Bundle, backend: Backend) -> Batch:
    cached = limits.cached(bundle.manifest, request.policy, len(request.prompts), request.halves)
    return Batch(request, cached, _trace_of(request, cached, bundle, backend))


def _trace_of(request: CheckedRequest, cached: Sequence[bool], bundle: Bundle, backend: Backend) -> Trace:
    """The record of a request, to be filled."""
    blocks = bundle.manifest.blocks
    reusable = request.policy.reusable([block.kind for block in blocks])
    return Trace(
        model=bundle.manifest.model,
        bundle=bundle.id,
        blocks=tuple(block.name for block in blocks),
        kinds=tuple(block.kind for block in blocks),
        policy=policy_settings(request.policy),
        backend=backend.describe(),
        prompts=request.prompts,
        negative_prompts=request.negative_prompts,
        steps_requested=request.schedule.steps,
        guidances=request.guidances[0],
        later_guidances=request.guidances[1:],
        seeds=request.seeds,
        latents_given=request.latents is not None,
        uncached=tuple(
            block.name for block, wanted, kept in zip(blocks, reusable, cached, strict=True) if wanted and not kept
        ),
    )
