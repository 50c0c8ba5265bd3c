"""The builders that the families share: what stands around a family's own modules is much alike in all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from ...engines.errors import InvalidRequest
from ...engines.manifest import Dtype, Shape, TensorSpec
from .base import TORCH_DTYPES, Input, PartPlan, draw_bias, draw_mask, draw_timestep, float_spec, frame_specs

WHOLE: Mapping[str, str] = {"": ""}  # prefixes of a module whose weights are stored under its own names
VAE_ENCODER = ("encoder.*", "quant_conv.*")  # what is stored of diffusers' VAEs, and not read
OLD_ATTENTION = (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn"))  # in their middle
DECODE_PIXELS = 512 * 512  # of frames that an image VAE decodes at a time

Sizes = Mapping[str, int]
AnyModule = TypeVar("AnyModule", bound=nn.Module)


def without_values(make: Callable[[], AnyModule], dtype: Dtype) -> AnyModule:
    """A module with its parameters on the meta device, in that dtype; its buffers do have values."""
    with init_empty_weights(include_buffers=False):
        module = make().eval()
    nn.Module.to(module, TORCH_DTYPES[dtype])  # past diffusers' own to(), which advises on loading with from_pretrained
    return module


class StepTensors:
    """The tensors at the borders between prologue, blocks and epilogue.

    `streams` has every stream's dimensions, but for the rows; its first one is what the epilogue reads. Of a stream x
    there are x, cached_x and new_x. `time` is how wide the embedding of the timestep is, `tokens` how many tokens the
    named dimension of a video has.
    """

    def __init__(
        self, shape: Shape, dtype: Dtype, tokens: int, time: int, streams: Mapping[str, tuple[int | str, ...]]
    ) -> None:
        self.dtype: Dtype = dtype
        self.tokens = tokens
        self.latents = Input(float_spec("latents", "fp32", "batch", *shape.latents))
        self.timestep = Input(float_spec("timestep", "fp32", "batch"), draw_timestep)
        self.time = Input(float_spec("time", dtype, "batch", time))
        self.streams, self.cached, self.new = (
            tuple(Input(float_spec(f"{state}{name}", dtype, "batch", *dims)) for name, dims in streams.items())
            for state in ("", "cached_", "new_")
        )
        self.distance = float_spec("distance", "fp32", "batch")
        self.model_output = float_spec("model_output", "fp32", "batch", *shape.latents)

    @property
    def from_timestep(self) -> tuple[Input, ...]:
        """What the prologue makes of the timestep."""
        return (self.time,)

    @property
    def block_outputs(self) -> tuple[TensorSpec, ...]:
        """What every block returns."""
        return (*(stream.spec for stream in self.new), self.distance)

    def rows(self, **sizes: int) -> tuple[Sizes, ...]:
        """One row and two, to check parts with that see whole videos; `sizes` as well."""
        return tuple({"batch": rows, **sizes, "tokens": self.tokens} for rows in (1, 2))


class SpatioTemporalTensors(StepTensors):
    """Those of blocks that take turns over space and time: the one stream is hidden (B, frames, tokens, dim).

    Blocks are modulated by six tensors, and each row masks the padding of its own text, which has `text_width`
    channels when it comes from the text encoder.
    """

    def __init__(self, shape: Shape, dtype: Dtype, tokens: int, dim: int, text_width: int) -> None:
        super().__init__(shape, dtype, tokens, dim, {"hidden": (shape.latents[1], "tokens", dim)})
        self.modulation = Input(float_spec("modulation", dtype, "batch", 6, dim))
        self.text_states = Input(float_spec("text_states", dtype, "batch", "text", text_width))
        self.text_mask = Input(TensorSpec(name="text_mask", dtype="int64", shape=("batch", "text")), draw_mask)
        self.text = Input(float_spec("text", dtype, "batch", "text", dim))
        self.text_bias = Input(float_spec("text_bias", dtype, "batch", 1, 1, "text"), draw_bias)

    @property
    def from_timestep(self) -> tuple[Input, ...]:
        return self.modulation, self.time


def sole_part(
    name: str,
    module: nn.Module,
    inputs: tuple[Input, ...],
    outputs: tuple[TensorSpec, ...],
    check_sizes: tuple[Sizes, ...],
    component: str = "transformer",
    prefixes: Mapping[str, str] = WHOLE,
    aliases: tuple[tuple[str, str], ...] = (),
) -> PartPlan:
    """A part that is the only one of its kind, and checked against its own module in eager mode."""
    return PartPlan(
        name=name,
        kind=name,
        module=module,
        component=component,
        prefixes=prefixes,
        inputs=inputs,
        outputs=outputs,
        reference=module.forward,
        check_sizes=check_sizes,
        aliases=aliases,
    )


def masked_text_plan(module: nn.Module, tensors: SpatioTemporalTensors, max_tokens: int, *more: Input) -> PartPlan:
    """The part `condition`: text states, their mask and what is `more` to text and text_bias."""
    return sole_part(
        "condition",
        module,
        inputs=(tensors.text_states, tensors.text_mask, *more),
        outputs=(tensors.text.spec, tensors.text_bias.spec),
        check_sizes=({"batch": 1, "text": 5}, {"batch": 2, "text": min(17, max_tokens)}),
    )


def prologue_plan(
    module: nn.Module,
    tensors: StepTensors,
    conditions: tuple[Input, ...] = (),
    check_sizes: tuple[Sizes, ...] | None = None,
    prefixes: Mapping[str, str] = WHOLE,
) -> PartPlan:
    """The part that begins a step: latents, timestep and `conditions` to the streams and tensors of the timestep."""
    return sole_part(
        "prologue",
        module,
        inputs=(tensors.latents, tensors.timestep, *conditions),
        outputs=tuple(made.spec for made in (*tensors.streams, *tensors.from_timestep)),
        check_sizes=tensors.rows() if check_sizes is None else check_sizes,
        prefixes=prefixes,
    )


def block_plans(
    module: nn.Module,
    reference: Callable[..., Any],
    tensors: StepTensors,
    inputs: tuple[Input, ...],
    stored: str,
    count: int,
) -> tuple[PartPlan, ...]:
    """`count` blocks of one kind, whose weights are `block.…` in the module and stored under `stored`.INDEX."""
    return tuple(
        PartPlan(
            name=f"block.{index:03d}",
            kind="block",
            module=module,
            component="transformer",
            prefixes={"block.": f"{stored}.{index}."},
            inputs=inputs,
            outputs=tensors.block_outputs,
            reference=reference,
            check_sizes=({"batch": 1, "text": 5, "tokens": 12}, {"batch": 2, "text": 7, "tokens": 10}),
        )
        for index in range(count)
    )


def epilogue_plan(module: nn.Module, tensors: StepTensors) -> PartPlan:
    """The part that ends a step: the first stream and the time embedding to the model's output."""
    inputs = (tensors.streams[0], tensors.time)
    return sole_part("epilogue", module, inputs, (tensors.model_output,), tensors.rows())


def image_decoder_plan(
    module: nn.Module, latents: tuple[int | str, ...], factor: int, prefixes: Mapping[str, str] = WHOLE
) -> PartPlan:
    """The part that decodes frames one by one: latents of these dimensions, each latent `factor` pixels a side."""
    return sole_part(
        "vae_decoder",
        module,
        inputs=(Input(float_spec("latents", "fp32", *latents)),),
        outputs=frame_specs("frames"),
        check_sizes=tuple(
            {"frames": n, "latent_height": h, "latent_width": w, "height": h * factor, "width": w * factor}
            for n, h, w in ((1, 8, 4), (2, 6, 10))
        ),
        component="vae",
        prefixes=prefixes,
        aliases=OLD_ATTENTION,
    )


def frames_at_a_time(shape: Shape) -> int:
    """How many frames an image VAE decodes at a time."""
    return max(1, min(shape.frames, DECODE_PIXELS // (shape.height * shape.width)))


def frames_from_pixels(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """(N, H, W, 3) fp32 from -1 … 1 to frames (N, H, W, 3) uint8, and their means before that, (N,) fp32."""
    shades = (pixels / 2 + 0.5).clamp(0, 1) * 255
    # the cast is last: TensorRT has uint8 at the border of a graph only
    return shades.round().to(torch.uint8), pixels.mean((1, 2, 3))


def pixels_per_latent(vae: Any) -> int:
    """Along each side, of one of diffusers' VAEs."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def require_multiples(unit: int, **sides: int) -> None:
    """Refuse a height or width that is no multiple of `unit` pixels. Raises InvalidRequest."""
    for name, side in sides.items():
        if side % unit:
            raise InvalidRequest(f"{name}: got {side}, expected a multiple of {unit} pixels for this checkpoint")


def ranges_of(shape: Shape, **sizes: int | tuple[int, int]) -> dict[str, tuple[int, int]]:
    """The ranges of all named dimensions: rows, `sizes`, and those of `shape`. A single size is pinned."""
    pinned = {
        "latent_height": shape.latents[-2],
        "latent_width": shape.latents[-1],
        "height": shape.height,
        "width": shape.width,
    }
    ranges = {name: (size, size) if isinstance(size, int) else size for name, size in (sizes | pinned).items()}
    return {"batch": (1, 2 * shape.max_batch)} | ranges
