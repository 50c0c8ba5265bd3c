"""Whether a manifest agrees with itself.

Hashes vouch for the files; nothing vouches for the numbers beside them. What the runtime derives from the manifest
(buffers, loops, bindings) is therefore checked when a bundle is opened: a contradiction is found there, before
anything is allocated, and not as a crash halfway through a request.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from .manifest import Manifest, Part, TensorSpec, stream_bytes_per_row


def contradictions(manifest: Manifest) -> Iterator[str]:
    """Every place where the manifest contradicts itself, in words; nothing for a sound one."""
    yield from _in_ranges(manifest)
    yield from _in_shape(manifest)
    yield from _in_defaults(manifest)
    yield from _in_tensors(manifest)
    yield from _in_cache(manifest)


def _in_ranges(manifest: Manifest) -> Iterator[str]:
    for name, (low, high) in manifest.ranges.items():
        if not 1 <= low <= high:
            yield f"range {name} is {low} to {high}"
    if manifest.ranges.get("batch", (0, 0))[1] < 2 * manifest.shape.max_batch:
        yield f"the range of batch is too small for {manifest.shape.max_batch} guided prompts, which take two rows each"
    for part in manifest.parts:
        for spec in (*part.inputs, *part.outputs):
            for dim in spec.shape:
                if dim not in manifest.ranges and not (isinstance(dim, int) and dim >= 1):
                    yield f"{part.name}: {spec.name} has a dimension {dim!r} that is neither a size nor a range"


def _in_shape(manifest: Manifest) -> Iterator[str]:
    shape = manifest.shape
    low, high = manifest.ranges.get("frames", (0, 0))
    if not 1 <= low <= shape.decode_frames <= high:
        yield f"decode_frames is {shape.decode_frames}, the decoder takes {low} to {high}"
    for name in ("height", "width", "frames", "max_batch"):
        if getattr(shape, name) < 1:
            yield f"{name} is {getattr(shape, name)}"


def _in_defaults(manifest: Manifest) -> Iterator[str]:
    defaults = manifest.defaults
    if not 1 <= defaults.steps <= manifest.sampler.max_steps:
        yield f"the default of {defaults.steps} steps is not in 1 to {manifest.sampler.max_steps}"
    if not (math.isfinite(defaults.guidance) and defaults.guidance >= 1):
        yield f"the default guidance is {defaults.guidance}"
    if defaults.fps < 1:
        yield f"the default is {defaults.fps} frames per second"
    if not defaults.prompt.strip():
        yield "the sample prompt is empty"


def _in_tensors(manifest: Manifest) -> Iterator[str]:
    """Whether every input is provided, by its name and type, by what runs before it."""
    shape, tokens = manifest.shape, ("batch", manifest.text.max_tokens)
    text_encoder, condition, prologue = manifest.text_encoder, manifest.condition, manifest.prologue
    yield from _unmet(text_encoder, {"input_ids": ("int64", tokens), "attention_mask": ("int64", tokens)})
    states = next((spec for spec in text_encoder.outputs if spec.name == "text_states"), None)
    if states is None or len(states.shape) != 3:
        yield "text_encoder: has no output text_states of three dimensions"
        return
    wanted: dict[str, _Type] = {
        "text_states": (states.dtype, ("batch", "text", states.shape[2])),
        "text_mask": ("int64", ("batch", "text")),
    }
    yield from _unmet(condition, wanted)
    latents: tuple[int | str, ...] = ("batch", *shape.latents)
    yield from _unmet(prologue, {"latents": ("fp32", latents), "timestep": ("fp32", ("batch",))})
    fixed = _types(condition.outputs)
    streams = {name: kind for name, kind in _types(prologue.outputs).items() if name in manifest.streams}
    fixed |= {name: kind for name, kind in _types(prologue.outputs).items() if name not in manifest.streams}
    if not manifest.streams or set(streams) != set(manifest.streams):
        yield f"streams are {', '.join(manifest.streams) or 'none'}, the prologue makes {', '.join(streams) or 'none'}"
    cached = {f"cached_{name}": kind for name, kind in streams.items()}
    made = {f"new_{name}": kind for name, kind in streams.items()} | {"distance": ("fp32", ("batch",))}
    for block in manifest.blocks:
        yield from _unmet(block, fixed | streams | cached)
        if not set(streams) | set(cached) <= {spec.name for spec in block.inputs}:
            yield f"{block.name}: does not read every stream and what was cached of it"
        if _types(block.outputs) != made:
            yield f"{block.name}: its outputs are not {', '.join(made)}, of the streams' types"
    yield from _unmet(manifest.epilogue, fixed | streams)
    if _types(manifest.epilogue.outputs) != {"model_output": ("fp32", latents)}:
        yield "epilogue: its output is not model_output, of the latents' shape"
    yield from _in_decoder(manifest)


def _in_decoder(manifest: Manifest) -> Iterator[str]:
    """The decoder takes one video's latents, a few frames at a time, and makes frames (F, H, W, 3) of them."""
    shape, decoder = manifest.shape, manifest.vae_decoder
    sizes = {name: high for name, (_, high) in manifest.ranges.items()}
    takes, makes = _types(decoder.inputs), _types(decoder.outputs)
    if set(takes) != {"latents"} or set(makes) != {"frames"} or makes["frames"][0] != "uint8":
        yield "vae_decoder: does not turn latents into frames"
        return
    dims = takes["latents"][1]
    fits = len(dims) == len(shape.latents) and dims.count("frames") == 1
    if not fits or any(
        sizes.get(str(dim), dim) != size for dim, size in zip(dims, shape.latents, strict=True) if dim != "frames"
    ):
        yield f"vae_decoder: takes latents {dims}, but a video's are {shape.latents}"
    if [sizes.get(str(dim), dim) for dim in makes["frames"][1][1:]] != [shape.height, shape.width, 3]:
        yield f"vae_decoder: its frames are not {shape.height} x {shape.width}"


def _in_cache(manifest: Manifest) -> Iterator[str]:
    names = [block.name for block in manifest.blocks]
    if not names or len(set(names)) != len(names) or set(names) != set(manifest.cache_bytes_per_row):
        yield "its blocks are not those it lists cache memory for"
        return
    for block in manifest.blocks:
        needed = stream_bytes_per_row(block, manifest.streams, manifest.ranges)
        if manifest.cache_bytes_per_row[block.name] != needed:
            yield f"{block.name}: caches {needed} bytes a row, not {manifest.cache_bytes_per_row[block.name]}"


_Type = tuple[str, tuple[int | str, ...]]


def _types(specs: tuple[TensorSpec, ...]) -> dict[str, _Type]:
    return {spec.name: (spec.dtype, spec.shape) for spec in specs}


def _unmet(part: Part, provided: dict[str, _Type]) -> Iterator[str]:
    for name, kind in _types(part.inputs).items():
        if name not in provided:
            yield f"{part.name}: nothing provides its input {name}"
        elif provided[name] != kind:
            yield f"{part.name}: takes {name} as {kind}, but is given {provided[name]}"
