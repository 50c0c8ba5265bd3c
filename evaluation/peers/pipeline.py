"""A checkpoint in the pipeline that diffusers ships for it, in fp32 on the CPU: what peers are switched on in."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from ...engines.arrays import HostArray
from ...engines.errors import EngineError, one_line
from ...engines.manifest import Manifest
from ..bench import Aborted, Made, Task
from ..own import Stopwatch

# the ends of the names of modules that run once whenever a block does, on all that the block has
FEED_FORWARD = (".ff", ".ffn")
INDEX = "model_index.json"  # of a folder that diffusers can load, whose pipeline it names
MOST_KEPT = 2  # requests' text embeddings


class DiffusersPipeline:
    """One pipeline, for one request at a time. Whoever changes it, changes it back.

    `options` are more arguments of its call. Prompts are encoded once for all that make a pair's video, outside of what
    is timed.
    """

    def __init__(self, checkpoint: str, manifest: Manifest, threads: int, revision: str | None = None) -> None:
        """Load it, and have torch use that many threads from now on. Raises EngineError where it cannot be loaded."""
        self._manifest = manifest
        self.pipeline = _load(checkpoint, threads, revision)
        self.options: dict[str, Any] = {}
        self._encoded: dict[tuple[str, str, bool], dict[str, Any]] = {}
        self._takes = _parameters(type(self.pipeline).__call__)
        self._block_work = 0
        for name, module in self.transformer.named_modules():
            if name.endswith(FEED_FORWARD):
                module.register_forward_pre_hook(self._count)

    @property
    def transformer(self) -> Any:
        """The model that the loop calls."""
        return self.pipeline.transformer

    @property
    def frames(self) -> int:
        """Of a video, before it is decoded."""
        latents, channels = self._manifest.shape.latents, self.transformer.config.in_channels
        return latents[1] if latents[0] == channels else latents[0]

    def make(self, task: Task, stop_after: int | None = None) -> Made:
        """A video by the pipeline's own call; an abort is an exception of its callback."""
        import torch

        loop = _Loop()
        final: list[Any] = []

        def on_step_end(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if step + 1 == stop_after:
                raise Aborted
            final[:] = [tensors["latents"]]
            return {}

        self.pipeline.progress_bar = loop
        self._block_work = 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = self.pipeline(
                prompt=None,
                **self._encode(task),
                **self._sizes(),
                **self.options,
                num_inference_steps=task.steps,
                guidance_scale=task.guidance,
                latents=torch.from_numpy(task.latents.copy())[None],
                generator=torch.Generator().manual_seed(task.seed),
                callback_on_step_end=on_step_end,
                output_type="np",
            )
        latents: HostArray = final[0][0].numpy().copy()
        frames = _grey_levels(made.frames[0])
        return Made(frames, latents, loop.watch.cpu_ms, loop.watch.wall_ms, self._block_work)

    def _count(self, module: Any, arguments: tuple[Any, ...]) -> None:
        """A block runs, on so many numbers: rows count, so half a batch is half the work."""
        self._block_work += arguments[0].numel()

    def _sizes(self) -> dict[str, int]:
        """Of the bundle's videos, by the names that this pipeline has for them."""
        shape = self._manifest.shape
        known = {
            "height": shape.height,
            "width": shape.width,
            "num_frames": shape.frames,
            "video_length": shape.frames,
            "decode_chunk_size": shape.frames,
        }
        return {name: size for name, size in known.items() if name in self._takes}

    def _encode(self, task: Task) -> dict[str, Any]:
        """The arguments that stand in for the prompts."""
        import torch

        key = task.prompt, task.negative_prompt, task.guidance > 1
        if key not in self._encoded:
            text = self._manifest.text
            known = {"max_sequence_length": text.max_tokens, "clean_caption": text.cleaning == "caption"}
            takes = _parameters(self.pipeline.encode_prompt)
            with torch.no_grad():
                prompt, negative = self.pipeline.encode_prompt(
                    task.prompt,
                    negative_prompt=task.negative_prompt,
                    do_classifier_free_guidance=key[2],
                    **{name: value for name, value in known.items() if name in takes},
                )
            while len(self._encoded) >= MOST_KEPT:
                del self._encoded[next(iter(self._encoded))]
            self._encoded[key] = {
                "prompt_embeds": prompt,
                "negative_prompt_embeds": negative,
                "negative_prompt": None,
                # they are masked already
                **({"mask_feature": False} if "mask_feature" in self._takes else {}),
            }
        return self._encoded[key]


class _Loop:
    """Stands in for the progress bar, which a pipeline opens for its denoising loop and for nothing else."""

    def __init__(self) -> None:
        self.watch = Stopwatch()

    def __call__(self, iterable: Any = None, total: int | None = None) -> _Loop:
        return self

    def __enter__(self) -> _Loop:
        self.watch.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.watch.stop()

    def update(self, count: int = 1) -> None:
        """A step is done."""


def _load(checkpoint: str, threads: int, revision: str | None) -> Any:
    if Path(checkpoint).is_dir() and not (Path(checkpoint) / INDEX).is_file():
        raise EngineError(f"diffusers has no pipeline for it: {Path(checkpoint).name} has no {INDEX}")
    try:
        import diffusers
        import torch
        import transformers
    except ImportError as error:
        raise EngineError(f"{one_line(error)}; pip install foresight-engines[peers]") from error
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    try:
        return diffusers.DiffusionPipeline.from_pretrained(checkpoint, revision=revision).to(torch.float32)
    except (OSError, ValueError, AttributeError, RuntimeError) as error:
        raise EngineError(f"diffusers cannot load {checkpoint}: {one_line(error)}") from error


def _parameters(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters)


def _grey_levels(frames: HostArray) -> HostArray:
    """From 0 to 1, to uint8."""
    levels: HostArray = np.rint(frames * 255).astype(np.uint8)
    return levels
