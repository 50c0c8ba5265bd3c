"""Whether a manifest agrees with itself.

Hashes vouch for the files; nothing vouches for the numbers beside them. What the runtime derives from the manifest
(buffers, loops, bindings) is therefore checked when a bundle is opened: a contradiction is found there, before
anything is allocated, and not as a crash halfway through a request.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from .manifest import (
    FRAME_MEANS,
    PLAIN_NAME,
    Expert,
    Manifest,
    Part,
    Stage,
    TensorSpec,
    chunk_sizes,
    left_by,
    stream_bytes_per_row,
)

MOST_KEPT = 32  # samples and model outputs that a sampler may ask for at once


def contradictions(manifest: Manifest) -> Iterator[str]:
    """Every place where the manifest contradicts itself, in words; nothing for a sound one."""
    yield from _in_names(manifest)
    yield from _in_ranges(manifest)
    yield from _in_shape(manifest)
    yield from _in_defaults(manifest)
    yield from _in_tensors(manifest)
    yield from _in_cache(manifest)
    yield from _in_profiles(manifest)


def _in_names(manifest: Manifest) -> Iterator[str]:
    names = [part.name for part in manifest.parts]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"two parts are called {name}"


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
    for name in ("height", "width", "frames", "max_batch"):
        if getattr(shape, name) < 1:
            yield f"{name} is {getattr(shape, name)}"


def _in_defaults(manifest: Manifest) -> Iterator[str]:
    defaults = manifest.defaults
    if not 1 <= defaults.steps <= manifest.sampler.max_steps:
        yield f"the default of {defaults.steps} steps is not in 1 to {manifest.sampler.max_steps}"
    if not 2 <= manifest.sampler.kept <= MOST_KEPT:
        yield f"the sampler keeps {manifest.sampler.kept} arrays, not 2 to {MOST_KEPT}"
    if manifest.text.null_caption and defaults.negative_prompt:
        yield "it has a negative prompt and a null caption"
    if not (math.isfinite(defaults.guidance) and defaults.guidance >= 1):
        yield f"the default guidance is {defaults.guidance}"
    if defaults.fps < 1:
        yield f"the default is {defaults.fps} frames per second"
    if not defaults.prompt.strip():
        yield "the sample prompt is empty"


def _in_tensors(manifest: Manifest) -> Iterator[str]:
    """Whether every input is provided, by its name and type, by what runs before it."""
    shape, tokens = manifest.shape, ("batch", manifest.text.max_tokens)
    text_encoder = manifest.text_encoder
    yield from _unmet(text_encoder, {"input_ids": ("int64", tokens), "attention_mask": ("int64", tokens)})
    states = next((spec for spec in text_encoder.outputs if spec.name == "text_states"), None)
    if states is None or len(states.shape) != 3:
        yield "text_encoder: has no output text_states of three dimensions"
        return
    wanted: dict[str, _Type] = {
        "text_states": (states.dtype, ("batch", "text", states.shape[2])),
        "text_mask": ("int64", ("batch", "text")),
        "unconditional": ("int64", ("batch",)),
    }
    latents: tuple[int | str, ...] = ("batch", *shape.latents)
    for expert in manifest.experts:
        yield from _in_expert(manifest, expert, wanted, latents)
    yield from _between_experts(manifest)
    yield from _in_decoder(manifest)


def _in_expert(
    manifest: Manifest, expert: Expert, wanted: dict[str, _Type], latents: tuple[int | str, ...]
) -> Iterator[str]:
    condition, prologue = expert.condition, expert.prologue
    yield from _unmet(condition, wanted)
    fixed = _types(condition.outputs)
    yield from _unmet(prologue, fixed | {"latents": ("fp32", latents), "timestep": ("fp32", ("batch",))})
    streams = {name: kind for name, kind in _types(prologue.outputs).items() if name in manifest.streams}
    fixed |= {name: kind for name, kind in _types(prologue.outputs).items() if name not in manifest.streams}
    if not manifest.streams or set(streams) != set(manifest.streams):
        yield f"streams are {', '.join(manifest.streams) or 'none'}, the prologue makes {', '.join(streams) or 'none'}"
    cached = {f"cached_{name}": kind for name, kind in streams.items()}
    made = {f"new_{name}": kind for name, kind in streams.items()} | {"distance": ("fp32", ("batch",))}
    for block in expert.blocks:
        yield from _unmet(block, fixed | streams | cached)
        if not set(streams) | set(cached) <= {spec.name for spec in block.inputs}:
            yield f"{block.name}: does not read every stream and what was cached of it"
        if _types(block.outputs) != made:
            yield f"{block.name}: its outputs are not {', '.join(made)}, of the streams' types"
    yield from _unmet(expert.epilogue, fixed | streams)
    if _types(expert.epilogue.outputs) != {"model_output": ("fp32", latents)}:
        yield f"{expert.epilogue.name}: its output is not model_output, of the latents' shape"


def _between_experts(manifest: Manifest) -> Iterator[str]:
    """They take turns in one set of buffers, and are told apart by timesteps alone."""
    first, *later = manifest.experts
    bounds = [expert.below for expert in later]
    if any(not (0 < below < math.inf) for below in bounds) or bounds != sorted(set(bounds), reverse=True):
        yield f"its experts take over below the timesteps {', '.join(map(str, bounds))}, which do not fall"
    for expert in later:
        if not (math.isfinite(expert.guidance) and expert.guidance >= 1):
            yield f"{expert.prologue.name}: the default guidance is {expert.guidance}"
        if [block.kind for block in expert.blocks] != [block.kind for block in first.blocks]:
            yield f"{expert.prologue.name}: its blocks are not of the kinds of the first expert's"
        for name in ("condition", "prologue", "epilogue"):
            own, other = getattr(expert, name), getattr(first, name)
            if (own.inputs, own.outputs) != (other.inputs, other.outputs):
                yield f"{own.name}: does not take and make what {other.name} does"


def _in_decoder(manifest: Manifest) -> Iterator[str]:
    """Every stage takes what the one before it makes, chunk by chunk; the last makes frames (F, H, W, 3)."""
    shape = manifest.shape
    made: _Type = ("fp32", shape.latents)
    for stage in manifest.decoder:
        name = stage.first.name
        if not all(part.inputs and part.outputs and part.outputs[0].shape for part in stage.parts):
            yield f"{name}: takes or makes nothing"
            return
        if any(len(part.inputs[0].shape) != len(made[1]) for part in stage.parts):
            yield f"{name}: takes {stage.first.inputs[0].shape}, but is given {made[1]}"
            return
        if not 0 <= stage.axis < len(made[1]) or not stage.chunks or sum(stage.chunks) != made[1][stage.axis]:
            yield f"{name}: chunks of {stage.chunks} along axis {stage.axis} do not cover what it takes, {made[1]}"
            return
        yield from _in_states(stage)
        frames = []
        for part, length in stage.plan:
            sizes = manifest.largest(**chunk_sizes(part, stage.axis, length))
            wanted = (*made[1][: stage.axis], length, *made[1][stage.axis + 1 :])
            took, gave = part.inputs[0], part.outputs[0]
            if took.dtype != made[0] or took.resolve(sizes) != wanted or not _in_range(manifest, part, stage, length):
                yield f"{part.name}: takes {took.dtype} {took.shape}, but is given {made[0]} {wanted}"
                return
            frames.append((gave.dtype, gave.resolve(sizes)))
        if len({(dtype, dims[1:]) for dtype, dims in frames}) != 1:
            yield f"{name}: its chunks become frames of different shapes"
        dtype, dims = frames[0]
        made = (dtype, (sum(dims[0] for _, dims in frames), *dims[1:]))
    if made != ("uint8", (shape.frames, shape.height, shape.width, 3)):
        yield f"the decoder makes {made[0]} {made[1]}, not {shape.frames} frames of {shape.height} x {shape.width}"
    for stage in manifest.decoder:
        last = stage is manifest.decoder[-1]
        for part in stage.parts:
            means = _types(part.outputs).get(FRAME_MEANS)
            if means != (("fp32", part.outputs[0].shape[:1]) if last else None):
                yield f"{part.name}: {FRAME_MEANS} are {means}, expected one a frame of the last stage, and of no other"


def _in_range(manifest: Manifest, part: Part, stage: Stage, length: int) -> bool:
    sizes = chunk_sizes(part, stage.axis, length)
    return all(low <= sizes.get(name, low) <= high for name, (low, high) in manifest.ranges.items())


def _in_states(stage: Stage) -> Iterator[str]:
    """What a chunk leaves behind is what the next one asks for."""
    if len(stage.first.inputs) != 1:
        yield f"{stage.first.name}: asks for what no chunk before the first has left"
    left = {f"new_{name}": kind for name, kind in _types(stage.next.inputs[1:] if stage.next else ()).items()}
    for part in stage.parts:
        if _types(left_by(part)) != left:
            yield f"{part.name}: does not leave behind what the next chunk asks for"


def _in_cache(manifest: Manifest) -> Iterator[str]:
    names = [block.name for block in manifest.blocks]
    if not names or set(names) != set(manifest.cache_bytes_per_row):
        yield "its blocks are not those it lists cache memory for"
        return
    for block in manifest.blocks:
        needed = stream_bytes_per_row(block, manifest.streams, manifest.ranges)
        if manifest.cache_bytes_per_row[block.name] != needed:
            yield f"{block.name}: caches {needed} bytes a row, not {manifest.cache_bytes_per_row[block.name]}"


def _in_profiles(manifest: Manifest) -> Iterator[str]:
    """Which policies and settings there are is for the runtime to know."""
    known = set()
    for profile in manifest.profiles:
        called = f"profile {profile.name} for {profile.steps} steps"
        if (profile.name, profile.steps) in known:
            yield f"it has {called} twice"
        known.add((profile.name, profile.steps))
        if not PLAIN_NAME.fullmatch(profile.name):
            yield f"profile {profile.name[:40]!r} has no plain name"
        if not 1 <= profile.steps <= manifest.sampler.max_steps:
            yield f"{called} is not in 1 to {manifest.sampler.max_steps}"
        held_out = profile.held_out
        if held_out.pairs < 1 or not 0 <= held_out.share_skipped <= 1 or not held_out.speedup > 0:
            yield f"{called} was measured on {held_out.pairs} pairs, with a share or a speed-up that cannot be"


_Type = tuple[str, tuple[int | str, ...]]


def _types(specs: tuple[TensorSpec, ...]) -> dict[str, _Type]:
    return {spec.name: (spec.dtype, spec.shape) for spec in specs}


def _unmet(part: Part, provided: dict[str, _Type]) -> Iterator[str]:
    for name, kind in _types(part.inputs).items():
        if name not in provided:
            yield f"{part.name}: nothing provides its input {name}"
        elif provided[name] != kind:
            yield f"{part.name}: takes {name} as {kind}, but is given {provided[name]}"
