"""The manifest: everything a runtime has to know about a bundle, typed and versioned."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Literal

import msgspec

DTYPE_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int64": 8, "uint8": 1, "bool": 1}

FRAME_MEANS = "frame_means"
PLAIN_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")  # of a file, or of a profile

Dtype = Literal["fp32", "fp16", "bf16", "int64", "uint8", "bool"]
ModelDtype = Literal["fp32", "fp16", "bf16"]  # of weights, and of what is computed with them
Cleaning = Literal["none", "lower", "whitespace", "caption"]


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A part of the manifest: immutable, and an unknown key is an error."""


class TensorSpec(_Record, frozen=True, kw_only=True):
    """A graph's input or output; a dimension is a size, or the name of a range in `Manifest.ranges`."""

    name: str
    dtype: Dtype
    shape: tuple[int | str, ...]

    def resolve(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape with every named dimension replaced by its size."""
        return tuple(dim if isinstance(dim, int) else sizes[dim] for dim in self.shape)


class Part(_Record, frozen=True, kw_only=True):
    """One graph. Parts of one `kind` have the same graph and differ in their weights.

    `max_difference` is the largest absolute difference from the eager module that the export measured on random
    inputs; for uint8 frames it counts grey levels.
    """

    name: str
    kind: str
    graph: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_difference: float

    def input(self, name: str) -> TensorSpec:
        """The input of that name."""
        return next(spec for spec in self.inputs if spec.name == name)

    def output(self, name: str) -> TensorSpec:
        """The output of that name."""
        return next(spec for spec in self.outputs if spec.name == name)


class Stage(_Record, frozen=True, kw_only=True):
    """One stage of the decoder: it turns one sequence of frames into another, a chunk at a time.

    Chunks are cut from a part's first input along `axis`; `chunks` are their lengths, in order. What a chunk becomes
    is the part's first output, whose first dimension counts frames. `first` runs on the first chunk; on all later ones
    runs `next`, or `first` again where that is None. Every further output `new_x` of a chunk is the input `x` of the
    chunk after it: what a causal convolution has to know of the frames before. The first stage is given a video's
    latents, every other what the stage before it made; the last one makes frames (F, H, W, 3) uint8, and beside them
    `frame_means` (F,) fp32: each frame's mean before it was rounded, as uint8 cannot say that a value was not finite.
    """

    first: Part
    next: Part | None
    axis: int
    chunks: tuple[int, ...]

    @property
    def parts(self) -> tuple[Part, ...]:
        """Its one or two graphs."""
        return (self.first,) if self.next is None else (self.first, self.next)

    @property
    def plan(self) -> tuple[tuple[Part, int], ...]:
        """Every chunk in order: the part that runs on it, and its length."""
        return tuple((self.next if index and self.next else self.first, n) for index, n in enumerate(self.chunks))


def left_by(part: Part) -> tuple[TensorSpec, ...]:
    """Of a decoder's part, the outputs that the next chunk is given."""
    return tuple(spec for spec in part.outputs[1:] if spec.name != FRAME_MEANS)


class Source(_Record, frozen=True, kw_only=True):
    """Where the weights came from: the checkpoint as it was named, and a hash over its files.

    `revision` is the commit of a checkpoint on the hub, after the name that was given for it; `variant` the one that
    was read, such as fp16, where there were several.
    """

    checkpoint: str
    sha256: str
    revision: str | None = None
    variant: str | None = None


class LoraRecord(_Record, frozen=True, kw_only=True):
    """A LoRA that was merged into the weights, by the name and hash of its file; `scale` multiplied it.

    `component` is what it was said to be for, where its own names did not say.
    """

    file: str
    sha256: str
    scale: float
    component: str | None = None


class Shape(_Record, frozen=True, kw_only=True):
    """What one request may ask for. Height and width are in pixels, `latents` is one video's latent shape.

    `max_batch` counts prompts.
    """

    height: int
    width: int
    frames: int
    latents: tuple[int, ...]
    max_batch: int


class Expert(_Record, frozen=True, kw_only=True):
    """One transformer of several that take turns: it runs the steps whose timestep is below `below`.

    The next one takes over below its own. All of a bundle make and read the same tensors, and have blocks of the same
    kinds. `guidance` is what a request gets where it says nothing.
    """

    below: float
    condition: Part
    prologue: Part
    blocks: tuple[Part, ...]
    epilogue: Part
    guidance: float

    @property
    def transformer(self) -> tuple[Part, ...]:
        """The parts that a step runs, in order: prologue, blocks, epilogue."""
        return (self.prologue, *self.blocks, self.epilogue)


class Text(_Record, frozen=True, kw_only=True):
    """How prompts become what the transformer reads.

    `cleaning` comes first: none; `lower`, lower case without blanks around it; or `whitespace` and `caption`, see
    runtime/caption.py.
    `suffix` is then appended to a prompt that does not contain `suffix_unless`. `max_tokens` includes the end token,
    which survives truncation. The transformer reads a prompt's own tokens, or with `padded` all of them, padding
    included. The negative half reads a negative prompt, or with `null_caption` what the model learnt to read in place
    of a caption; then a request cannot bring a negative prompt.
    """

    tokenizer: str
    max_tokens: int
    pad_id: int
    cleaning: Cleaning
    suffix: str = ""
    suffix_unless: str = ""
    padded: bool = False
    null_caption: bool = False


class SamplerSettings(_Record, frozen=True, kw_only=True):
    """The table of coefficients for 1 … `max_steps` steps, and the diffusers scheduler it was read off.

    `kept` is how many samples and model outputs, of the latents' size, it asks for at once.
    """

    table: str
    scheduler: str
    max_steps: int
    kept: int


class Defaults(_Record, frozen=True, kw_only=True):
    """What a request gets where it says nothing."""

    prompt: str
    negative_prompt: str
    steps: int
    guidance: float
    fps: int


class HeldOut(_Record, frozen=True, kw_only=True):
    """What was measured of a profile on `pairs` of a prompt and a seed that it was not chosen by, against no reuse.

    PSNR is in dB: of the worst video, the mean over videos, and of the mean squared error of all of them; None where
    all are identical. `share_skipped` is of the block calls, 0 to 1; `speedup` that of denoising, the median, on the
    machine that it was tuned on.
    """

    pairs: int
    worst_psnr_db: float | None
    mean_psnr_db: float | None
    psnr_db: float | None
    share_skipped: float
    speedup: float


Setting = str | bool | int | float | tuple[int, ...] | None


class PolicyProfile(_Record, frozen=True, kw_only=True, omit_defaults=True):
    """A policy under a name, for one number of steps; `settings` are the fields of the policy.

    `goal` says in words what it was chosen for, `guidance` what it was measured with, `later_guidances` with which of
    the transformers that take over.
    """

    name: str
    steps: int
    policy: str
    settings: dict[str, Setting]
    goal: str
    guidance: float
    held_out: HeldOut
    later_guidances: tuple[float, ...] = ()


class FileRecord(_Record, frozen=True, kw_only=True):
    """Size and hash of one file."""

    bytes: int
    sha256: str


class Manifest(_Record, frozen=True, kw_only=True, omit_defaults=True):
    """Everything a runtime has to know about a bundle.

    `ranges` gives the smallest and largest size of every named dimension; `batch` counts rows, and a prompt takes two
    with guidance. `streams` are the tensors that run through the blocks: a block reads `x` and `cached_x` and writes
    `new_x` for every stream `x`, and `distance`, the mean squared change per row. `blocks` are in execution order.
    `guidance_order` says which half of a guided batch comes first. `decoder` are the stages from latents to frames,
    whose weights are in `vae_dtype`, where it is another than `dtype`. `later_experts` take over from the first
    transformer, in this order. `loras` were merged into the weights. `cautions` are sentences on what the checkpoint
    was not trained for. `profiles` may be written later than all else, and are no part of a bundle's id.
    """

    schema: int
    model: str
    family: str
    source: Source
    generator: dict[str, str]
    dtype: ModelDtype
    opset: int
    shape: Shape
    ranges: dict[str, tuple[int, int]]
    streams: tuple[str, ...]
    guidance_order: Literal["negative_first", "positive_first"]
    text_encoder: Part
    condition: Part
    prologue: Part
    blocks: tuple[Part, ...]
    epilogue: Part
    decoder: tuple[Stage, ...]
    text: Text
    sampler: SamplerSettings
    defaults: Defaults
    cache_bytes_per_row: dict[str, int]
    cautions: tuple[str, ...]
    files: dict[str, FileRecord]
    later_experts: tuple[Expert, ...] = ()
    loras: tuple[LoraRecord, ...] = ()
    profiles: tuple[PolicyProfile, ...] = ()
    vae_dtype: ModelDtype | None = None

    def dtype_of(self, part: Part) -> ModelDtype:
        """The dtype of a part's weights, but for those that are kept in fp32 whatever the others are in."""
        of_decoder = any(part.name == one.name for stage in self.decoder for one in stage.parts)
        return self.vae_dtype if of_decoder and self.vae_dtype is not None else self.dtype

    @property
    def experts(self) -> tuple[Expert, ...]:
        """All transformers, in the order in which they take turns; nearly always it is one."""
        first = Expert(
            below=math.inf,
            condition=self.condition,
            prologue=self.prologue,
            blocks=self.blocks,
            epilogue=self.epilogue,
            guidance=self.defaults.guidance,
        )
        return (first, *self.later_experts)

    @property
    def parts(self) -> tuple[Part, ...]:
        """All parts in the order in which a request runs them."""
        return (
            self.text_encoder,
            *(expert.condition for expert in self.experts),
            *(part for expert in self.experts for part in expert.transformer),
            *(part for stage in self.decoder for part in stage.parts),
        )

    @property
    def step_tensors(self) -> tuple[TensorSpec, ...]:
        """What every step writes anew, apart from the streams: inputs and outputs of prologue and epilogue."""
        known = {*self.streams, *(spec.name for spec in self.condition.outputs)}
        specs = (*self.prologue.inputs, *self.prologue.outputs, *self.epilogue.outputs)
        return tuple(spec for spec in specs if spec.name not in known)

    def largest(self, **known: int) -> dict[str, int]:
        """The largest size of every named dimension, but for those that are `known`."""
        return largest_sizes(self.ranges, **known)

    def cache_bytes(self, rows: int) -> int:
        """Bytes of all cached block outputs of a request with that many rows."""
        return rows * sum(self.cache_bytes_per_row.values())


def largest_sizes(ranges: Mapping[str, tuple[int, int]], **known: int) -> dict[str, int]:
    """The largest size of every dimension in `ranges`, but for those that are `known`."""
    return {name: largest for name, (_, largest) in ranges.items()} | known


def part_files(part: Part) -> tuple[str, str]:
    """The names of a part's files: the graph, and the weights it refers to."""
    return part.graph, f"{part.graph.removesuffix('.onnx')}.data"


def chunk_sizes(part: Part, axis: int, length: int) -> dict[str, int]:
    """The size of the named dimension that a chunk of `length` is cut along; empty where it has a fixed size."""
    dim = part.inputs[0].shape[axis]
    return {dim: length} if isinstance(dim, str) else {}


def stream_bytes_per_row(block: Part, streams: Iterable[str], ranges: Mapping[str, tuple[int, int]]) -> int:
    """Bytes that one row of a block's stream outputs takes in the cache."""
    sizes = largest_sizes(ranges, batch=1)
    specs = [block.output(f"new_{stream}") for stream in streams]
    return sum(DTYPE_BYTES[spec.dtype] * math.prod(spec.resolve(sizes)) for spec in specs)
