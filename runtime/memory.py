"""What a request takes of the device's memory, counted from the bundle before anything runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..engines.compiled import Compiled
from ..engines.manifest import DTYPE_BYTES, Manifest, Part, TensorSpec, chunk_sizes, part_files
from .budget import Profile, choose_cached
from .caches import CACHE_MODES, Layout, find_mode
from .policies import Policy

# fp32 arrays of the latents' size that the sampler has at hand besides the samples and outputs its table asks for:
# the noise, and the terms of a sum.
SAMPLER_ARRAYS = 4


@dataclass(frozen=True)
class Phase:
    """Bytes of one phase. `arrays` are those the runtime allocates; `scratch` is None where an engine keeps its own."""

    weights: int
    arrays: int
    scratch: int | None

    @property
    def total(self) -> int:
        """All that is known."""
        return self.weights + self.arrays + (self.scratch or 0)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a request, phase by phase. `cache` is the part of the denoising arrays that holds stream and cache.

    `handed_on` is what lies between two phases: what the texts became, and final latents.

    Normally all weights stay, and one scratch buffer serves all; with `low_memory` only one phase is there at a time.
    """

    rows: int
    cache: int
    handed_on: int
    low_memory: bool
    text: Phase
    denoise: Phase
    decode: Phase

    @property
    def phases(self) -> tuple[Phase, Phase, Phase]:
        """In their order."""
        return self.text, self.denoise, self.decode

    @property
    def weights(self) -> int:
        """Of all phases."""
        return sum(phase.weights for phase in self.phases)

    @property
    def scratch(self) -> int | None:
        """One buffer, as large as the largest phase needs."""
        return max((phase.scratch for phase in self.phases if phase.scratch is not None), default=None)

    @property
    def total(self) -> int:
        """The most that is taken at any time, as far as it is known."""
        if self.low_memory:
            return max(phase.total for phase in self.phases)
        return self.weights + (self.scratch or 0) + max(phase.arrays for phase in self.phases)

    @property
    def per_request(self) -> int:
        """What a request takes that a loaded pipeline has not taken yet."""
        return self.total if self.low_memory else max(phase.arrays for phase in self.phases)

    def to_dict(self) -> dict[str, Any]:
        """As plain values, with the sums."""
        sums = {"weights": self.weights, "scratch": self.scratch, "per_request": self.per_request, "total": self.total}
        return asdict(self) | sums


@dataclass(frozen=True)
class Sums:
    """Of several plans: see MemoryPlan."""

    total: int
    per_request: int


def in_turns(plans: Sequence[MemoryPlan]) -> Sums:
    """What batches take that go through each phase one after the other: the largest, and what is held of the others."""
    largest = max(plans, key=lambda plan: plan.per_request)
    others = sum(plan.handed_on for plan in plans) - largest.handed_on
    return Sums(largest.total + others, largest.per_request + others)


@dataclass(frozen=True)
class MemoryLimits:
    """What a pipeline's requests may take, and how.

    `cache_memory` is the most bytes of one request's stream and cache; blocks that find no room are run every time, and
    `cache_profile` helps to choose them. `fixed_slots` gives every block cache addresses of its own, for CUDA graphs.
    With `split_guidance` the two halves of a guided batch go through the blocks one after the other.
    """

    low_memory: bool = False
    cache_memory: int | None = None
    cache_profile: Profile | None = None
    fixed_slots: bool = False
    split_guidance: bool = False

    def layout(self, policy: Policy, halves: int) -> Layout:
        """How that policy's caches are laid out, for requests of one half or two."""
        return Layout(find_mode(policy.cache), self.fixed_slots, halves if self.split_guidance else 1)

    def cached(self, manifest: Manifest, policy: Policy, prompts: int, halves: int) -> tuple[bool, ...]:
        """Per block whether there is room for its output. Raises InvalidRequest where there is none for a request."""
        layout = self.layout(policy, halves)
        buffer = prompts * halves * manifest.cache_bytes_per_row[manifest.blocks[0].name] // layout.passes
        reusable = policy.reusable([block.kind for block in manifest.blocks])
        return choose_cached(layout, reusable, buffer, self.cache_memory, self.cache_profile)

    def plan(
        self, manifest: Manifest, policy: Policy, prompts: int, guided: bool, compiled: Compiled | None
    ) -> MemoryPlan:
        """What a request takes. Raises InvalidRequest where `cache_memory` is too small."""
        halves = 2 if guided else 1
        slots, layout = sum(self.cached(manifest, policy, prompts, halves)), self.layout(policy, halves)
        return plan_memory(manifest, prompts, guided, layout, slots, self.low_memory, compiled, policy.outputs)


def plan_memory(
    manifest: Manifest,
    prompts: int = 1,
    guided: bool = True,
    layout: Layout | None = None,
    slots: int | None = None,
    low_memory: bool = False,
    compiled: Compiled | None = None,
    outputs: int = 0,
) -> MemoryPlan:
    """The plan of a request of that many prompts.

    `slots` is the number of blocks that are cached (None: all); without `compiled`, weights are those of the ONNX
    graphs and the scratch, which ONNX Runtime allocates as it runs, is not known. `outputs` is the number of model
    outputs that the policy keeps.
    """
    layout = layout or Layout(next(iter(CACHE_MODES.values())))
    rows, blocks = prompts * (2 if guided else 1), len(manifest.blocks)
    each = rows // layout.passes
    buffer = manifest.cache_bytes_per_row[manifest.blocks[0].name] * each
    cache = layout.buffers(blocks, blocks if slots is None else slots) * buffer
    sizes = manifest.largest(batch=rows)
    latents = 4 * prompts * math.prod(manifest.shape.latents)
    sampler = (SAMPLER_ARRAYS + manifest.sampler.kept + outputs) * latents
    experts = manifest.experts
    condition = len(experts) * _bytes(manifest.condition.outputs, sizes)
    own = condition // len(experts) if layout.passes > 1 else 0  # each pass has its rows of it apart
    output = (layout.passes - 1) * _bytes(manifest.epilogue.outputs, manifest.largest(batch=each))
    arrays = cache + condition + own + output + sampler
    arrays += _bytes(manifest.step_tensors, manifest.largest(batch=each))
    turns = [_phase(manifest, expert.transformer, arrays, compiled) for expert in experts]
    return MemoryPlan(
        rows=rows,
        cache=cache,
        handed_on=condition + latents,
        low_memory=low_memory,
        text=_phase(
            manifest,
            (manifest.text_encoder, *(expert.condition for expert in experts)),
            _bytes([*manifest.text_encoder.inputs, *manifest.text_encoder.outputs, *manifest.condition.inputs], sizes)
            + condition,
            compiled,
        ),
        denoise=max(turns, key=lambda turn: turn.total) if low_memory else _together(turns),
        decode=_decode_phase(manifest, prompts, latents + _decoding(manifest, sizes), compiled),
    )


def _decode_phase(manifest: Manifest, prompts: int, arrays: int, compiled: Compiled | None) -> Phase:
    parts = [part for stage in manifest.decoder for part in stage.parts]
    video = 3 * manifest.shape.frames * manifest.shape.height * manifest.shape.width
    return _phase(manifest, parts, arrays + prompts * video, compiled)


def _together(turns: Sequence[Phase]) -> Phase:
    """Of transformers that take turns in the same arrays and scratch, and are all loaded."""
    scratch = [turn.scratch for turn in turns if turn.scratch is not None]
    return Phase(sum(turn.weights for turn in turns), turns[0].arrays, max(scratch, default=None))


def _decoding(manifest: Manifest, sizes: dict[str, int]) -> int:
    """Bytes of the stage that takes most: a chunk with all it is given and leaves, and the sequence from before."""
    most = given = 0
    for stage in manifest.decoder:
        plan = [(part, sizes | chunk_sizes(part, stage.axis, length)) for part, length in stage.plan]
        chunk = max(_bytes([*part.inputs, *part.outputs], sizes) for part, sizes in plan)
        made = 0 if stage is manifest.decoder[-1] else sum(_bytes(part.outputs[:1], sizes) for part, sizes in plan)
        most = max(most, given + chunk + 2 * made)  # the chunks, and the sequence they are joined to
        given = made
    return most


def _phase(manifest: Manifest, parts: Sequence[Part], arrays: int, compiled: Compiled | None) -> Phase:
    if compiled is None:
        weights = sum(manifest.files[part_files(part)[1]].bytes for part in parts)
        return Phase(weights, arrays, None)
    plans = [compiled.part(part.name) for part in parts]
    return Phase(
        sum(plan.record.bytes for plan in plans), arrays, max((plan.scratch_bytes for plan in plans), default=0)
    )


def _bytes(specs: Sequence[TensorSpec], sizes: dict[str, int]) -> int:
    return sum(DTYPE_BYTES[spec.dtype] * math.prod(spec.resolve(sizes)) for spec in specs)
