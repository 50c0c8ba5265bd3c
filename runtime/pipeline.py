"""VideoPipeline: a loaded bundle; text in, videos out."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import overload

import numpy as np

from ..engines.arrays import Array, HostArray
from ..engines.backend import Backend, Engine, create_backend
from ..engines.bundle import Bundle, open_bundle, verify_files
from ..engines.errors import InvalidRequest
from ..engines.manifest import Part
from .arguments import check_guidance, check_policy, check_prompts, check_seeds, check_text
from .cache import create_cache
from .denoise import CancelToken, OnStep, Request, Transformer, denoise
from .policies import Policy, policy_settings
from .sampler import Sampler, Schedule, load_table
from .text import Tokenizer
from .trace import Trace
from .video import Video


class VideoPipeline:
    """The engines of one bundle on one backend. Requests may run in several threads; they share nothing mutable."""

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        """Load every engine of `bundle`, whose files must have been verified. Raises EngineError, IntegrityError."""
        self.bundle = bundle
        self.manifest = bundle.manifest
        self.backend = backend
        self._tokenizer = Tokenizer(bundle.file(self.manifest.text.tokenizer), self.manifest.text)
        self._table = load_table(bundle.file(self.manifest.sampler.table), self.manifest.sampler.max_steps)
        self._text_encoder = self._load(self.manifest.text_encoder)
        self._condition = self._load(self.manifest.condition)
        self._transformer = Transformer(
            prologue=self._load(self.manifest.prologue),
            blocks=tuple(self._load(block) for block in self.manifest.blocks),
            epilogue=self._load(self.manifest.epilogue),
            guidance_order=self.manifest.guidance_order,
        )
        self._vae_decoder = self._load(self.manifest.vae_decoder)

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
        cancel: CancelToken | None = ...,
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
        cancel: CancelToken | None = ...,
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
        cancel: CancelToken | None = None,
    ) -> Video | list[Video]:
        """Make a video of a prompt, or of each prompt of a list in one batch.

        What is None is the bundle's default; `policy` is then `Foresight()`. `seed` is one number, to which a batch
        adds the prompt's position, or one per prompt. `latents` is the initial noise instead: (prompts, *latent
        shape) or, for one prompt, the latent shape; fp32; a numpy array, or one that speaks DLPack. `on_step` is
        called after every step with the steps done, their number and the trace so far. `cancel` is looked at before
        every block. A guidance of 1 runs without the negative half.

        Raises InvalidRequest before anything runs; Cancelled and EngineError leave the pipeline usable.
        """
        defaults = self.manifest.defaults
        prompts = self._check_prompts(prompt)
        schedule = self._table.schedule(defaults.steps if steps is None else steps)
        policy = check_policy(policy)
        seeds = check_seeds(seed, len(prompts))
        noise = self._noise(latents, seeds)
        trace = Trace(
            model=self.manifest.model,
            bundle=self.bundle.id,
            blocks=tuple(block.name for block in self.manifest.blocks),
            kinds=tuple(block.kind for block in self.manifest.blocks),
            policy=policy_settings(policy),
            backend=self.backend.describe(),
            prompts=prompts,
            negative_prompt=check_text(
                "negative_prompt", defaults.negative_prompt if negative_prompt is None else negative_prompt, True
            ),
            steps_requested=schedule.steps,
            guidance=check_guidance(defaults.guidance if guidance is None else guidance),
            seeds=seeds,
            latents_given=latents is not None,
        )
        with _timed(trace, "text_ms"):
            condition = self._encode(trace)
        with _timed(trace, "denoise_ms"):
            request = self._request(condition, schedule.begin(noise), schedule, policy, trace)
            request.on_step, request.cancel = on_step, cancel
            final = self.backend.arrays.to_host(denoise(self._transformer, request))
            del request
        with _timed(trace, "decode_ms"):
            frames = [self._decode(video) for video in final]
        videos = [
            Video(frames=f, latents=x, fps=defaults.fps, prompt=text, seed=s, trace=trace)
            for f, x, text, s in zip(frames, final, prompts, seeds, strict=True)
        ]
        return videos[0] if isinstance(prompt, str) else videos

    def _check_prompts(self, prompt: str | Sequence[str]) -> tuple[str, ...]:
        prompts = check_prompts(prompt)
        if len(prompts) > self.manifest.shape.max_batch:
            raise InvalidRequest(
                f"prompts: got {len(prompts)} at once, this bundle takes {self.manifest.shape.max_batch}; send fewer, "
                "or export with a larger --max-batch"
            )
        return prompts

    def _request(
        self, condition: dict[str, Array], sampler: Sampler, schedule: Schedule, policy: Policy, trace: Trace
    ) -> Request:
        """Everything the loop needs, made for this request alone."""
        blocks, arrays = len(self.manifest.blocks), self.backend.arrays
        halves = _halves(trace.guidance)
        rows = halves * len(trace.prompts)
        cache = create_cache(policy.cache, self.manifest, arrays, rows)
        trace.cache_bytes = cache.nbytes
        return Request(
            arrays=arrays,
            sampler=sampler,
            schedule=schedule,
            cache=cache,
            decider=policy.begin(schedule.steps, blocks),
            drop_dead=policy.cache == "output",
            tensors=condition | self._step_tensors(rows),
            distances=arrays.empty((blocks, rows), "fp32"),
            guidance=trace.guidance,
            halves=halves,
            trace=trace,
        )

    def _load(self, part: Part) -> Engine:
        return self.backend.load(self.bundle.file(part.graph), part)

    def _noise(self, latents: Array | None, seeds: tuple[int, ...]) -> Array:
        """Initial noise (prompts, *latent shape) fp32 on the device."""
        shape = self.manifest.shape.latents
        if latents is None:
            draws = [np.random.default_rng(seed).standard_normal(shape, dtype=np.float32) for seed in seeds]
            return self.backend.arrays.from_host(np.stack(draws))
        given = self._array(latents)
        if given.shape == shape and len(seeds) == 1:
            given = given[None]
        if given.shape != (len(seeds), *shape) or given.dtype != np.float32:
            raise InvalidRequest(
                f"latents: got {given.dtype} {given.shape}, expected float32 {(len(seeds), *shape)}, as this "
                "bundle was exported"
            )
        if not bool(self.backend.arrays.xp.isfinite(given).all()):
            raise InvalidRequest("latents: got values that are not finite, expected normal noise")
        return given

    def _array(self, latents: Array) -> Array:
        """The caller's array, on the device; no copy where it is there already."""
        try:
            if isinstance(latents, np.ndarray):
                return self.backend.arrays.from_host(latents) if latents.dtype == np.float32 else latents
            return self.backend.arrays.xp.from_dlpack(latents)
        except (AttributeError, BufferError, TypeError, ValueError, RuntimeError) as error:
            got = f"a {type(latents).__name__}"
            raise InvalidRequest(f"latents: got {got}, expected a float32 array, numpy's or by DLPack") from error

    def _encode(self, trace: Trace) -> dict[str, Array]:
        """The inputs that no step changes: the condition part's outputs, in the order of the guided batch.

        A prompt and its negative are both cut to the prompt's length, as diffusers does for one prompt; in a batch
        each is masked to its own length, so that no prompt sees another's padding.
        """
        arrays, xp, prompts = self.backend.arrays, self.backend.arrays.xp, trace.prompts
        halves = [list(prompts)]
        if _halves(trace.guidance) == 2:
            halves.insert(
                0 if self.manifest.guidance_order == "negative_first" else 1, [trace.negative_prompt] * len(prompts)
            )
        texts = [text for half in halves for text in half]
        distinct = list(dict.fromkeys(texts))
        tokens = self._tokenizer.encode(distinct)
        trace.truncated_prompts = tuple(text for text in prompts if tokens.truncated[distinct.index(text)])
        lengths = np.array([tokens.lengths[distinct.index(prompt)] for prompt in prompts] * len(halves))
        longest = int(lengths.max())
        states = self._run(
            self._text_encoder,
            self.manifest.text_encoder,
            {"input_ids": arrays.from_host(tokens.ids), "attention_mask": arrays.from_host(tokens.mask)},
            {"batch": len(distinct)},
        )["text_states"]
        order = arrays.from_host(np.array([distinct.index(text) for text in texts]))
        mask = (np.arange(longest)[None] < lengths[:, None]).astype(np.int64)
        return self._run(
            self._condition,
            self.manifest.condition,
            {"text_states": xp.ascontiguousarray(states[order, :longest]), "text_mask": arrays.from_host(mask)},
            {"batch": len(texts), "text": longest},
        )

    def _step_tensors(self, rows: int) -> dict[str, Array]:
        """The inputs and outputs of prologue and epilogue, apart from the stream."""
        sizes = {name: largest for name, (_, largest) in self.manifest.ranges.items()} | {"batch": rows}
        specs = [*self.manifest.prologue.inputs, *self.manifest.prologue.outputs, *self.manifest.epilogue.outputs]
        return {
            spec.name: self.backend.arrays.empty(spec.resolve(sizes), spec.dtype)
            for spec in specs
            if spec.name not in self.manifest.streams
        }

    def _decode(self, latents: HostArray) -> HostArray:
        """One video's latents to frames (F, H, W, 3) uint8, a few frames at a time."""
        part = self.manifest.vae_decoder
        axis = part.input("latents").shape.index("frames")
        chunk = self.manifest.shape.decode_frames
        frames = []
        for first in range(0, latents.shape[axis], chunk):
            piece = np.take(latents, range(first, min(first + chunk, latents.shape[axis])), axis)
            sizes = {name: largest for name, (_, largest) in self.manifest.ranges.items()}
            inputs = {"latents": self.backend.arrays.from_host(piece)}
            result = self._run(self._vae_decoder, part, inputs, sizes | {"frames": piece.shape[axis]})
            frames.append(self.backend.arrays.to_host(result["frames"]))
        return np.concatenate(frames)

    def _run(self, engine: Engine, part: Part, inputs: dict[str, Array], sizes: dict[str, int]) -> dict[str, Array]:
        """Run a part whose outputs nobody has allocated yet; returns them."""
        outputs = {spec.name: self.backend.arrays.empty(spec.resolve(sizes), spec.dtype) for spec in part.outputs}
        engine.run({**inputs, **outputs})
        return outputs


def load(
    bundle: str | os.PathLike[str], *, backend: str = "onnxruntime", device: str = "cpu", threads: int | None = None
) -> VideoPipeline:
    """Open a bundle, verify all its files, and load its engines.

    `threads` is for CPU backends (None: the cores this process may use) and is one number per process. Raises
    BundleError, IntegrityError, EngineError, InvalidRequest.
    """
    opened = open_bundle(bundle)
    verify_files(opened)
    return VideoPipeline(opened, create_backend(backend, device, threads))


@contextmanager
def _timed(trace: Trace, phase: str) -> Iterator[None]:
    """Write the wall time of the block into one of the trace's fields."""
    started = time.perf_counter()
    yield
    setattr(trace, phase, 1e3 * (time.perf_counter() - started))


def _halves(guidance: float) -> int:
    """Guidance 1 needs no negative half."""
    return 1 if guidance == 1 else 2
