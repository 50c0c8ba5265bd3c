"""What a model family says about a checkpoint: its parts, their tensors, and what the runtime has to know."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ...engines.errors import CheckpointError, InvalidRequest
from ...engines.manifest import FRAME_MEANS, Dtype, ModelDtype, Part, Shape, TensorSpec, Text
from ..checkpoint import Checkpoint
from ..lora_names import LoraNames

TORCH_DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int64": torch.int64,
    "uint8": torch.uint8,
    "bool": torch.bool,
}

MASKED = -10000.0  # as diffusers biases masked keys; exp() of it is 0 in every dtype used here

Draw = Callable[[tuple[int, ...], torch.Generator], Tensor]


@dataclass(frozen=True)
class ExportRequest:
    """What to export: sizes left at None are the checkpoint's own.

    `vae_dtype` is the decoder's, where it is another than `dtype`; `flow_shift` replaces the scheduler's, where it has
    one. Models with tables of sizes take their rows' names instead: `resolution` ("240p"), `aspect` ("9:16", height to
    width) and `duration` ("2s").
    """

    dtype: ModelDtype = "fp32"
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    max_batch: int = 4
    resolution: str | None = None
    aspect: str | None = None
    duration: str | None = None
    vae_dtype: ModelDtype | None = None
    flow_shift: float | None = None

    def __post_init__(self) -> None:
        for name in ("dtype", "vae_dtype"):
            dtype = getattr(self, name)
            if dtype not in get_args(ModelDtype) and (name == "dtype" or dtype is not None):
                raise InvalidRequest(f"{name}: got {dtype!r}, expected fp32, fp16 or bf16")
        if self.flow_shift is not None and not 0 < self.flow_shift < math.inf:
            raise InvalidRequest(f"flow_shift: got {self.flow_shift!r}, expected a number above 0, such as 5")
        for name in ("height", "width", "frames", "max_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidRequest(f"{name}: got {value}, expected 1 or more")

    def asked(self) -> dict[str, Any]:
        """What was asked for; without what came later where nothing was, so that bundles keep their keys."""
        later = ("vae_dtype", "flow_shift")
        return {name: value for name, value in vars(self).items() if name not in later or value is not None}

    def dtype_of(self, component: str) -> ModelDtype:
        """The dtype of a component of the checkpoint."""
        return self.vae_dtype if component == "vae" and self.vae_dtype is not None else self.dtype

    def refuse_presets(self, family: str) -> None:
        """For families without tables of sizes. Raises InvalidRequest."""
        for name in ("resolution", "aspect", "duration"):
            if getattr(self, name) is not None:
                raise InvalidRequest(
                    f"{name}: got {getattr(self, name)!r}, but {family} has no table of sizes; give height, width and "
                    "frames"
                )


def normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Standard normal numbers, fp32."""
    return torch.randn(shape, generator=generator)


def draw_mask(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Masks (B, S) int64 of texts of any length, 1 where there is a token."""
    lengths = torch.randint(1, shape[1] + 1, (shape[0], 1), generator=generator)
    return (torch.arange(shape[1])[None] < lengths).long()


def draw_bias(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """What attention adds for such masks, (B, 1, 1, S)."""
    return bias_from_mask(draw_mask((shape[0], shape[-1]), generator), torch.float32)


def bias_from_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Mask (B, S) int64 of ones and zeros -> what is added to attention scores, (B, 1, 1, S): 0 or MASKED."""
    return ((1 - mask[:, None, None]) * MASKED).to(dtype)


def draw_timestep(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Timesteps from 0 to 999."""
    return torch.randint(1000, shape, generator=generator).float()


@dataclass(frozen=True)
class Input:
    """A graph input and how to draw random values for it, to trace the graph with and to check it."""

    spec: TensorSpec
    draw: Draw = normal

    def example(self, sizes: Mapping[str, int], generator: torch.Generator) -> Tensor:
        """Random values of the input's shape and dtype."""
        return self.draw(self.spec.resolve(sizes), generator).to(TORCH_DTYPES[self.spec.dtype])


@dataclass(frozen=True)
class PartPlan:
    """One graph to be.

    `module` computes the outputs from the inputs, in order and by name; its parameters are on the meta device. Parts
    of one `kind` share one module object and so one graph; `parameter` then tells them apart: it returns the part's
    own value of a parameter, by the module's name for it. `prefixes` turns the module's names into the checkpoint's,
    `aliases` are substrings that older checkpoints spell differently. `reference` computes the same by the model's
    original code; the graph is checked against it with every named dimension as each of `check_sizes` has it. Sizes
    that a bundle pins (tokens, say) are named all the same, so that a check can be cheap.
    """

    name: str
    kind: str
    module: nn.Module
    component: str
    prefixes: Mapping[str, str]
    inputs: tuple[Input, ...]
    outputs: tuple[TensorSpec, ...]
    reference: Callable[..., Any]
    check_sizes: tuple[Mapping[str, int], ...]
    aliases: tuple[tuple[str, str], ...] = ()

    @property
    def part(self) -> Part:
        """What the manifest says of it, but for the difference from eager that a check will find."""
        return Part(
            name=self.name,
            kind=self.kind,
            graph=f"{self.name}.onnx",
            inputs=tuple(graph_input.spec for graph_input in self.inputs),
            outputs=self.outputs,
            max_difference=0.0,
        )

    def reads(self, checkpoint: Checkpoint) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every weight that the part is made of, by the checkpoint's name for it, with its shape."""
        for name, parameter in self.module.named_parameters():
            yield self._tensor_name(checkpoint, name), tuple(parameter.shape)

    def parameter(self, checkpoint: Checkpoint, name: str) -> Tensor:
        """The value of one of the module's parameters, in the dtype the module has it in.

        Raises CheckpointError, where it has not the shape or is not finite in that dtype too.
        """
        wanted = self.module.get_parameter(name)
        stored = self._tensor_name(checkpoint, name)
        tensor = checkpoint.tensor(self.component, stored)
        if tensor.shape != wanted.shape:
            raise CheckpointError(
                f"checkpoint {checkpoint.name}: {self.component} {stored} has shape {tuple(tensor.shape)}, expected "
                f"{tuple(wanted.shape)} by its config.json; download it again"
            )
        value = tensor.to(wanted.dtype)
        if not _is_finite(value):
            name = f"checkpoint {checkpoint.name}: {self.component} {stored}"
            if _is_finite(tensor.float()):
                raise CheckpointError(
                    f"{name} has values that are too large for {wanted.dtype}, up to {tensor.float().abs().max():.3g}, "
                    "expected ones that fit; export with dtype bf16 or fp32"
                )
            raise CheckpointError(f"{name} has values that are not finite, expected finite ones; download it again")
        return value

    def _tensor_name(self, checkpoint: Checkpoint, parameter: str) -> str:
        prefix = max((prefix for prefix in self.prefixes if parameter.startswith(prefix)), key=len)
        name = self.prefixes[prefix] + parameter.removeprefix(prefix)
        if not checkpoint.has_tensor(self.component, name):
            for new, old in self.aliases:
                if new in name and checkpoint.has_tensor(self.component, name.replace(new, old)):
                    return name.replace(new, old)
        return name


@dataclass(frozen=True)
class StagePlan:
    """One stage of the decoder, as in engines.manifest.Stage."""

    first: PartPlan
    next: PartPlan | None
    axis: int
    chunks: tuple[int, ...]

    @property
    def parts(self) -> tuple[PartPlan, ...]:
        """Its one or two graphs."""
        return (self.first,) if self.next is None else (self.first, self.next)


@dataclass(frozen=True)
class FlowShift:
    """How far a flow's schedule is shifted to high noise, and a few words on who says so."""

    value: float
    reason: str


@dataclass(frozen=True)
class ExpertPlan:
    """A transformer that takes over from the one before it below a timestep, as in engines.manifest.Expert."""

    below: float
    condition: PartPlan
    prologue: PartPlan
    blocks: tuple[PartPlan, ...]
    epilogue: PartPlan


@dataclass(frozen=True)
class Split:
    """A checkpoint taken apart. Parts, and `later_experts`, as in engines.manifest.Manifest.

    `cautions` are sentences on sizes that the checkpoint was not trained on, `flow_shift` is the scheduler's, if it has
    one. Of what components store beside what the parts read, `unneeded` has patterns of names that are of no use, and
    `also_stored` names and shapes that have to be there for `check`, which refuses values that are not the ones
    expected, before the first is exported: CheckpointError. `lora_names` are what LoRAs call a transformer's weights.
    """

    shape: Shape
    ranges: dict[str, tuple[int, int]]
    streams: tuple[str, ...]
    guidance_order: Literal["negative_first", "positive_first"]
    text_encoder: PartPlan
    condition: PartPlan
    prologue: PartPlan
    blocks: tuple[PartPlan, ...]
    epilogue: PartPlan
    decoder: tuple[StagePlan, ...]
    text: Text
    tokenizer: Callable[[], str]
    scheduler: Callable[[], Any]
    cautions: tuple[str, ...] = ()
    unneeded: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    also_stored: Mapping[str, Mapping[str, tuple[int, ...]]] = field(default_factory=dict)
    check: Callable[[], None] = lambda: None
    flow_shift: FlowShift | None = None
    later_experts: tuple[ExpertPlan, ...] = ()
    lora_names: LoraNames = field(default_factory=LoraNames)

    @property
    def parts(self) -> Iterator[PartPlan]:
        """All parts in execution order."""
        first = ExpertPlan(float("inf"), self.condition, self.prologue, self.blocks, self.epilogue)
        experts = (first, *self.later_experts)
        yield self.text_encoder
        yield from (expert.condition for expert in experts)
        for expert in experts:
            yield from (expert.prologue, *expert.blocks, expert.epilogue)
        for stage in self.decoder:
            yield from stage.parts


def float_spec(name: str, dtype: Dtype, *shape: int | str) -> TensorSpec:
    """A TensorSpec in one line."""
    return TensorSpec(name=name, dtype=dtype, shape=shape)


def frame_specs(count: int | str) -> tuple[TensorSpec, TensorSpec]:
    """What the parts of a decoder's last stage make first and last, see engines.manifest.Stage."""
    frames = TensorSpec(name="frames", dtype="uint8", shape=(count, "height", "width", 3))
    return frames, float_spec(FRAME_MEANS, "fp32", count)


def untrained(name: str, got: int, trained: int) -> Iterator[str]:
    """A caution where a height, width or number of frames is not the one that the checkpoint was trained on."""
    if got != trained:
        yield f"{name}: {got}, the checkpoint was trained on {trained}; videos may be torn or drift apart"


def require_equal(checkpoint: Checkpoint, *pairs: tuple[str, object, str, object]) -> None:
    """Refuse settings that do not fit together, each pair as (name, value, name, value). Raises CheckpointError."""
    for name, got, other, expected in pairs:
        if got != expected:
            raise CheckpointError(
                f"checkpoint {checkpoint.name}: {name} is {got}, expected {expected}, as {other} is; its components do "
                "not belong together, download them again"
            )


def chunks_of(length: int, chunk: int) -> tuple[int, ...]:
    """`length` in pieces of `chunk`, the last one what is left."""
    return tuple(min(chunk, length - first) for first in range(0, length, chunk))


def assign_parameters(module: nn.Module, value: Callable[[str], Tensor]) -> None:
    """Give every parameter of `module` the value of that name; tied parameters stay tied."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    made: dict[int, nn.Parameter] = {}
    for child in module.modules():
        for key, parameter in child._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(value(names[id(parameter)]), requires_grad=False)
            child._parameters[key] = made[id(parameter)]


def mean_squared_change(new: Tensor, cached: Tensor) -> Tensor:
    """Mean of (new - cached)² per row, fp32, as a mean of means, which keeps seven digits over millions of elements."""
    change = new.float() - cached.float()
    square = change * change
    while square.ndim > 1:
        square = square.mean(-1)
    return square


def _is_finite(tensor: Tensor) -> bool:
    """Whether all values are, without an array of their number: the least and the largest are NaN if any value is."""
    return tensor.numel() == 0 or all(bool(torch.isfinite(value)) for value in tensor.aminmax())
