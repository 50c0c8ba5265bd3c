"""Wan, text to video: blocks over one stream (rows, tokens, dim), for Wan 2.1, and the 5B and the A14B of Wan 2.2.

The 5B takes one timestep per token, so that an image may stand at the beginning; without one they are all the same, and
one per row is enough. The A14B is two transformers of one configuration: above a timestep runs the one for high noise,
below it the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import UMT5EncoderModel

from ....engines.errors import CheckpointError, InvalidRequest
from ....engines.manifest import Dtype, Shape, Text
from ...checkpoint import Checkpoint
from ...sampler import scheduler_from_checkpoint
from ...weights import some
from ..base import ExpertPlan, ExportRequest, FlowShift, Input, PartPlan, Split, float_spec, require_equal, untrained
from ..parts import (
    VAE_ENCODER,
    StepTensors,
    block_plans,
    epilogue_plan,
    prologue_plan,
    ranges_of,
    require_multiples,
    sole_part,
    without_values,
)
from ..t5 import TOKENIZER, UNNEEDED, load_encoder, text_encoder_plan, tokenizer_json
from .lora import LORA_NAMES
from .modules import Block, Condition, Epilogue, Prologue, keep_in_fp32
from .vae import check_vae, count_latent_frames, decoder_stage

MAX_TOKENS = 512  # WanPipeline pads every prompt to this unless it is told otherwise; the transformer reads all of it
SECOND = "transformer_2"


@dataclass(frozen=True)
class Size:
    """A size of video that models were trained on, and the flow shift that their authors recommend for it."""

    height: int
    width: int
    frames: int
    flow_shift: float

    @property
    def name(self) -> str:
        """What it is called."""
        return f"{self.height}p"


# By how many pixels a side the VAE makes of a latent; the first one is the default. No configuration has them.
SIZES = {
    2: (Size(32, 32, 9, 3.0),),  # of the small model that comes with a clone
    8: (Size(480, 832, 81, 3.0), Size(720, 1280, 81, 5.0)),
    16: (Size(704, 1280, 121, 5.0),),
}


def split(checkpoint: Checkpoint, request: ExportRequest) -> Split:
    """Take a WanPipeline checkpoint apart. Raises CheckpointError, InvalidRequest."""
    components = {
        "transformer": "WanTransformer3DModel",
        "text_encoder": "UMT5EncoderModel",
        "vae": "AutoencoderKLWan",
    }
    if checkpoint.has(SECOND):
        components[SECOND] = components["transformer"]
    checkpoint.require_pipeline("WanPipeline", components)
    boundary = _boundary(checkpoint)
    request.refuse_presets("Wan")
    transformer = without_values(
        lambda: WanTransformer3DModel.from_config(checkpoint.config("transformer")), request.dtype
    )
    keep_in_fp32(transformer)
    vae = without_values(lambda: AutoencoderKLWan.from_config(checkpoint.config("vae")), request.dtype_of("vae"))
    encoder = load_encoder(checkpoint, request.dtype, UMT5EncoderModel)
    check_config(checkpoint, transformer)
    check_vae(checkpoint, vae)
    config = transformer.config
    require_equal(
        checkpoint,
        ("transformer in_channels", config.in_channels, "vae z_dim", vae.config.z_dim),
        ("transformer text_dim", config.text_dim, "text_encoder d_model", encoder.config.d_model),
    )
    shape = _shape(transformer, vae, request)
    shift = _flow_shift(checkpoint, vae, shape, request)
    tensors = _Tensors(transformer, shape, request.dtype)
    first, max_tokens = _transformer(transformer, shape, tensors), _max_tokens(checkpoint)
    return Split(
        shape=shape,
        ranges=ranges_of(shape, text=max_tokens, tokens=tensors.tokens),
        streams=("hidden",),
        guidance_order="positive_first",
        text_encoder=text_encoder_plan(encoder, request.dtype, max_tokens, zero_padding=True),
        condition=first.condition,
        prologue=first.prologue,
        blocks=first.blocks,
        epilogue=first.epilogue,
        later_experts=() if boundary is None else (_for_low_noise(first, boundary),),
        decoder=(decoder_stage(vae, shape, request.dtype_of("vae")),),
        text=Text(tokenizer=TOKENIZER, max_tokens=max_tokens, pad_id=0, cleaning="whitespace", padded=True),
        tokenizer=lambda: tokenizer_json(checkpoint),
        scheduler=lambda: scheduler_from_checkpoint(checkpoint, **({"flow_shift": shift.value} if shift else {})),
        cautions=_cautions(vae, shape),
        unneeded={"text_encoder": UNNEEDED, "vae": VAE_ENCODER},
        flow_shift=shift,
        lora_names=LORA_NAMES,
    )


def check_config(checkpoint: Checkpoint, transformer: WanTransformer3DModel) -> None:
    """Refuse what the modules do not compute, image-to-video above all. Raises CheckpointError."""
    config = transformer.config
    for name, got, expected in (
        ("image_dim", config.image_dim, None),
        ("added_kv_proj_dim", config.added_kv_proj_dim, None),
        ("pos_embed_seq_len", config.pos_embed_seq_len, None),
        ("out_channels", config.out_channels or config.in_channels, config.in_channels),
        ("qk_norm", config.qk_norm, "rms_norm_across_heads"),
        ("patch_size", tuple(config.patch_size), (1, *config.patch_size[1:])),
    ):
        if got != expected:
            raise CheckpointError(
                f"checkpoint {checkpoint.name}: transformer {name} is {got!r}, expected {expected!r}; image-to-video "
                "models cannot be exported, choose a text-to-video model"
            )


def _boundary(checkpoint: Checkpoint) -> float | None:
    """Below which timestep the second transformer runs; None where there is one alone. Raises CheckpointError."""
    ratio = checkpoint.index.get("boundary_ratio")
    if not checkpoint.has(SECOND):
        if ratio is not None:
            raise CheckpointError(
                f"checkpoint {checkpoint.name}: boundary_ratio is {ratio} without a {SECOND}, expected both; download "
                "it again"
            )
        return None
    if not isinstance(ratio, float) or not 0 < ratio < 1:
        raise CheckpointError(
            f"checkpoint {checkpoint.name}: boundary_ratio is {ratio!r} beside a {SECOND}, expected a number between 0 "
            "and 1; download it again"
        )
    first, second = (_without_remarks(checkpoint.config(name)) for name in ("transformer", SECOND))
    if first != second:
        names = sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))
        raise CheckpointError(
            f"checkpoint {checkpoint.name}: transformer and {SECOND} differ in {some(names)}, expected one "
            "configuration; download it again"
        )
    steps = checkpoint.config("scheduler", "scheduler_config.json").get("num_train_timesteps", 1000)
    return ratio * float(steps)


def _without_remarks(config: dict[str, Any]) -> dict[str, Any]:
    """What makes the modules: versions and paths say nothing, and quantisation is refused by its own name."""
    return {name: value for name, value in config.items() if name[0] != "_" and name != "quantization_config"}


def _transformer(transformer: WanTransformer3DModel, shape: Shape, tensors: _Tensors) -> ExpertPlan:
    return ExpertPlan(
        below=math.inf,
        condition=_condition(Condition(transformer, shape.latents), tensors),
        prologue=_prologue(Prologue(transformer), tensors),
        blocks=_blocks(transformer, tensors),
        epilogue=epilogue_plan(Epilogue(transformer, shape.latents), tensors),
    )


def _for_low_noise(first: ExpertPlan, below: float) -> ExpertPlan:
    """The second transformer: the graphs of the first, with its own weights."""

    def own(plan: PartPlan) -> PartPlan:
        return replace(plan, name=f"low.{plan.name}", component=SECOND)

    return ExpertPlan(
        below, own(first.condition), own(first.prologue), tuple(map(own, first.blocks)), own(first.epilogue)
    )


def _max_tokens(checkpoint: Checkpoint) -> int:
    """As many as the pipeline pads prompts to, or as the model takes by its tokenizer, if those are fewer."""
    if not (checkpoint.component_folder("tokenizer") / "tokenizer_config.json").is_file():
        return MAX_TOKENS
    stored = checkpoint.config("tokenizer", "tokenizer_config.json").get("model_max_length", MAX_TOKENS)
    return min(int(stored), MAX_TOKENS)


def _shape(transformer: WanTransformer3DModel, vae: AutoencoderKLWan, request: ExportRequest) -> Shape:
    scale, longest = vae.config.scale_factor_spatial, transformer.config.rope_max_seq_len
    default = SIZES.get(scale, SIZES[8])[0]  # of other VAEs too, as in WanPipeline
    height, width, frames = (getattr(request, name) or getattr(default, name) for name in ("height", "width", "frames"))
    _, high, wide = transformer.config.patch_size
    require_multiples(scale * high, height=height)
    require_multiples(scale * wide, width=width)
    latent_frames = count_latent_frames(frames, vae.config.scale_factor_temporal)
    for name, got, unit in (("height", height, scale * high), ("width", width, scale * wide)):
        if got // unit > longest:
            raise InvalidRequest(f"{name}: got {got}, expected at most {longest * unit} pixels for this checkpoint")
    if latent_frames > longest:
        most = (longest - 1) * vae.config.scale_factor_temporal + 1
        raise InvalidRequest(f"frames: got {frames}, expected at most {most} for this checkpoint")
    return Shape(
        height=height,
        width=width,
        frames=frames,
        latents=(transformer.config.in_channels, latent_frames, height // scale, width // scale),
        max_batch=request.max_batch,
    )


def _nearest(vae: AutoencoderKLWan, shape: Shape) -> Size | None:
    """Of the sizes that models with such a VAE were trained on, the one with most nearly as many pixels."""
    pixels = shape.height * shape.width
    sizes = SIZES.get(vae.config.scale_factor_spatial, ())
    return min(sizes, key=lambda size: abs(size.height * size.width - pixels), default=None)


def _cautions(vae: AutoencoderKLWan, shape: Shape) -> tuple[str, ...]:
    """Upright videos are as good as those that lie."""
    size = _nearest(vae, shape)
    if size is None:
        return ()
    upright = shape.height > shape.width
    return (
        *untrained("height", shape.height, size.width if upright else size.height),
        *untrained("width", shape.width, size.height if upright else size.width),
        *untrained("frames", shape.frames, size.frames),
    )


def _flow_shift(
    checkpoint: Checkpoint, vae: AutoencoderKLWan, shape: Shape, request: ExportRequest
) -> FlowShift | None:
    """What is asked for, or what is stored. But published ones store that of their smallest size for all of them."""
    config = checkpoint.config("scheduler", "scheduler_config.json")
    stored = config.get("flow_shift") if config.get("use_flow_sigmas") else None
    if stored is None:
        return None
    if request.flow_shift is not None:
        return FlowShift(request.flow_shift, f"as asked for; the checkpoint has {stored:g}")
    size, smallest = _nearest(vae, shape), next(iter(SIZES.get(vae.config.scale_factor_spatial, ())), None)
    stays = size is None or smallest is None or stored != smallest.flow_shift or size.flow_shift == stored
    if size is None or stays or checkpoint.has(SECOND):
        return FlowShift(stored, "as the checkpoint has it")
    return FlowShift(size.flow_shift, f"as recommended for {size.name}; the checkpoint has {stored:g}")


class _Tensors(StepTensors):
    """With what the blocks read that no step changes, and their modulation."""

    def __init__(self, transformer: WanTransformer3DModel, shape: Shape, dtype: Dtype) -> None:
        config = transformer.config
        dim = config.num_attention_heads * config.attention_head_dim
        _, frames, height, width = shape.latents
        _, high, wide = config.patch_size
        tokens = frames * (height // high) * (width // wide)
        super().__init__(shape, dtype, tokens, dim, {"hidden": ("tokens", dim)})
        self.states = Input(float_spec("text_states", dtype, "batch", "text", config.text_dim))
        self.modulation = Input(float_spec("modulation", dtype, "batch", 6, dim))
        self.conditions = (
            Input(float_spec("text", dtype, "batch", "text", dim)),
            *(
                Input(float_spec(name, "fp32", "tokens", config.attention_head_dim // 2))
                for name in ("rotary_cos", "rotary_sin")
            ),
        )

    @property
    def from_timestep(self) -> tuple[Input, ...]:
        return self.modulation, self.time


def _condition(module: Condition, tensors: _Tensors) -> PartPlan:
    return sole_part(
        "condition",
        module,
        inputs=(tensors.states,),
        outputs=tuple(made.spec for made in tensors.conditions),
        check_sizes=tuple({"batch": rows, "text": text, "tokens": tensors.tokens} for rows, text in ((1, 5), (2, 7))),
        prefixes={"text_embedder.": "condition_embedder.text_embedder."},
    )


def _prologue(module: Prologue, tensors: _Tensors) -> PartPlan:
    of_embedder = {f"{name}.": f"condition_embedder.{name}." for name in ("time_embedder", "time_proj")}
    return prologue_plan(module, tensors, prefixes={"patch_embedding.": "patch_embedding."} | of_embedder)


def _blocks(transformer: WanTransformer3DModel, tensors: _Tensors) -> tuple[PartPlan, ...]:
    module = Block(transformer.blocks[0])
    inputs = (*tensors.streams, tensors.modulation, *tensors.cached, *tensors.conditions)
    return block_plans(module, module.reference, tensors, inputs, "blocks", transformer.config.num_layers)
