"""Open-Sora 1.2: pairs of a spatial and a temporal block over one stream (rows, frames, tokens, dim).

Its checkpoint is not one of diffusers: `transformer` and `vae` are published apart, each a config.json and
model.safetensors with the original's names, and text encoder and tokenizer are T5's as others publish them.
"""

from __future__ import annotations

import copy

import torch
from accelerate import init_empty_weights
from torch import nn

from ....engines.errors import CheckpointError
from ....engines.manifest import Dtype, Shape, TensorSpec, Text
from ...checkpoint import Checkpoint
from ..base import (
    TORCH_DTYPES,
    ExportRequest,
    Input,
    PartPlan,
    Split,
    StagePlan,
    chunks_of,
    draw_bias,
    draw_mask,
    draw_timestep,
    float_spec,
    frame_specs,
    require_equal,
)
from ..t5 import TOKENIZER, UNNEEDED, load_encoder, text_encoder_plan, tokenizer_json
from .parts import Block, Condition, Epilogue, Prologue, SpatialDecoder, TemporalDecoder, temporal_rotation
from .presets import DEFAULT_SIZE, VideoSize, size_cautions, video_size
from .schedule import RectifiedFlow
from .stdit3 import STDiT3, STDiT3Config, rotary_frequencies
from .vae import CHANNELS, VideoVAE, VideoVAEConfig

FPS, FPS_OF_AN_IMAGE = 24, 120  # what the model is told; it was trained on images as very fast videos
SCORE = "aesthetic score:"  # captions of the training set end in one
DECODE_PIXELS = 512 * 512  # of frames that the image VAE decodes at a time
ENCODERS = tuple(
    f"{stage}.{layers}" for stage in ("spatial_vae.module", "temporal_vae") for layers in ("encoder.*", "quant_conv.*")
)
OLD_ATTENTION = (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn"))


def split(checkpoint: Checkpoint, request: ExportRequest) -> Split:
    """Take an Open-Sora 1.2 checkpoint apart. Raises CheckpointError, InvalidRequest."""
    kind = checkpoint.config("transformer").get("model_type")
    if kind != "STDiT3":
        raise CheckpointError(
            f"checkpoint {checkpoint.name}: transformer is a {kind}, expected an STDiT3; choose the model it is"
        )
    dtype = TORCH_DTYPES[request.dtype]
    with init_empty_weights(include_buffers=False):
        transformer = STDiT3(STDiT3Config.from_json(checkpoint.config("transformer"))).eval()
        vae = VideoVAE(VideoVAEConfig.from_json(checkpoint.config("vae"))).eval()
    for module in (transformer, vae):
        nn.Module.to(module, dtype)
    encoder = load_encoder(checkpoint, request.dtype)
    config = transformer.config
    require_equal(
        checkpoint,
        ("transformer in_channels", config.in_channels, "the VAE's number of latent channels", CHANNELS),
        ("transformer caption_channels", config.caption_channels, "text_encoder d_model", encoder.config.d_model),
    )
    made_for = _trained_size(checkpoint, vae.config)
    size = video_size(request, vae.config, made_for or DEFAULT_SIZE)
    shape = _shape(size, vae, request)
    specs = _Specs(transformer, shape, request.dtype)
    chunk = max(1, min(shape.frames, DECODE_PIXELS // (shape.height * shape.width)))
    tokens = transformer.config.model_max_length
    return Split(
        shape=shape,
        ranges=_ranges(shape, specs, tokens, chunk),
        streams=("hidden",),
        guidance_order="positive_first",
        text_encoder=text_encoder_plan(encoder, request.dtype, tokens),
        condition=_condition(transformer, specs),
        prologue=_prologue(transformer, specs, size),
        blocks=_blocks(transformer, specs),
        epilogue=_epilogue(transformer, specs),
        decoder=(
            StagePlan(_temporal_decoder(vae, shape), None, 1, chunks_of(shape.latents[1], vae.config.micro_latents)),
            StagePlan(_spatial_decoder(vae, shape), None, 0, chunks_of(shape.frames, chunk)),
        ),
        text=Text(
            tokenizer=TOKENIZER,
            max_tokens=tokens,
            pad_id=0,
            cleaning="caption",
            suffix=f" {SCORE} 6.5.",
            suffix_unless=SCORE,
            null_caption=True,
        ),
        tokenizer=lambda: tokenizer_json(checkpoint),
        scheduler=lambda: RectifiedFlow(size.height, size.width, size.frames, dtype),
        cautions=size_cautions(size, made_for),
        unneeded={"text_encoder": UNNEEDED, "vae": ENCODERS},
        also_stored={"transformer": {"rope.freqs": tuple(transformer.rope.freqs.shape)}},
        check=lambda: _check_rotations(checkpoint, transformer),
    )


def _trained_size(checkpoint: Checkpoint, vae: VideoVAEConfig) -> VideoSize | None:
    """What a checkpoint was made for, if it says so: published ones, made for many sizes, have null there."""
    sides = checkpoint.config("transformer").get("input_size")
    if not isinstance(sides, list) or len(sides) != 3 or not all(isinstance(side, int) for side in sides):
        return None
    frames, height, width = sides  # of the latents
    chunks = frames // vae.micro_latents
    return VideoSize(
        height=height * vae.space_factor,
        width=width * vae.space_factor,
        frames=chunks * vae.micro_frame_size if chunks else 1,
    )


def _check_rotations(checkpoint: Checkpoint, transformer: STDiT3) -> None:
    """The stored rotations are the known ones, which the graphs have as constants."""
    stored = checkpoint.tensor("transformer", "rope.freqs").float()
    known = rotary_frequencies(transformer.config.head_dim)
    if stored.shape != known.shape or not torch.allclose(stored, known, rtol=1e-2):
        raise CheckpointError(
            f"checkpoint {checkpoint.name}: rope.freqs are not powers of 10000, as every published STDiT3 has them; "
            "download it again"
        )


def _shape(size: VideoSize, vae: VideoVAE, request: ExportRequest) -> Shape:
    latents = size.latents(vae.config)
    factor = vae.config.space_factor
    return Shape(
        height=latents[2] * factor,
        width=latents[3] * factor,
        frames=size.frames,
        latents=latents,
        max_batch=request.max_batch,
    )


class _Specs:
    """The tensors that several parts share."""

    def __init__(self, transformer: STDiT3, shape: Shape, dtype: Dtype) -> None:
        config = transformer.config
        dim, frames = config.hidden_size, shape.latents[1]
        high, wide = config.patches(*shape.latents[2:])
        self.shape = shape
        self.dtype: Dtype = dtype
        self.tokens = high * wide
        self.latents = Input(float_spec("latents", "fp32", "batch", *shape.latents))
        self.timestep = Input(float_spec("timestep", "fp32", "batch"), draw_timestep)
        self.hidden = Input(float_spec("hidden", dtype, "batch", frames, "tokens", dim))
        self.cached = Input(float_spec("cached_hidden", dtype, "batch", frames, "tokens", dim))
        self.new = float_spec("new_hidden", dtype, "batch", frames, "tokens", dim)
        self.modulation = Input(float_spec("modulation", dtype, "batch", 6, dim))
        self.time = Input(float_spec("time", dtype, "batch", dim))
        self.states = Input(float_spec("text_states", dtype, "batch", "text", config.caption_channels))
        self.text = Input(float_spec("text", dtype, "batch", "text", dim))
        self.text_bias = Input(float_spec("text_bias", dtype, "batch", 1, 1, "text"), draw_bias)
        self.distance = float_spec("distance", "fp32", "batch")
        self.model_output = float_spec("model_output", "fp32", "batch", *shape.latents)


def _ranges(shape: Shape, specs: _Specs, tokens: int, chunk: int) -> dict[str, tuple[int, int]]:
    fixed = {
        "tokens": specs.tokens,
        "latent_height": shape.latents[2],
        "latent_width": shape.latents[3],
        "height": shape.height,
        "width": shape.width,
    }
    ranges = {"batch": (1, 2 * shape.max_batch), "text": (1, tokens), "frames": (1, chunk)}
    return ranges | {name: (size, size) for name, size in fixed.items()}


def _condition(transformer: STDiT3, specs: _Specs) -> PartPlan:
    module = Condition(transformer)
    return PartPlan(
        name="condition",
        kind="condition",
        module=module,
        component="transformer",
        prefixes={"": ""},
        inputs=(
            specs.states,
            Input(TensorSpec(name="text_mask", dtype="int64", shape=("batch", "text")), draw_mask),
            Input(TensorSpec(name="unconditional", dtype="int64", shape=("batch",)), _draw_halves),
        ),
        outputs=(specs.text.spec, specs.text_bias.spec),
        reference=module.forward,
        check_sizes=({"batch": 1, "text": 5}, {"batch": 2, "text": min(17, transformer.config.model_max_length)}),
    )


def _draw_halves(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randint(2, shape, generator=generator)


def _prologue(transformer: STDiT3, specs: _Specs, size: VideoSize) -> PartPlan:
    fps = FPS_OF_AN_IMAGE if size.frames == 1 else FPS
    module = Prologue(transformer, specs.shape.latents, size.height, size.width, fps)
    return PartPlan(
        name="prologue",
        kind="prologue",
        module=module,
        component="transformer",
        prefixes={"": ""},
        inputs=(specs.latents, specs.timestep),
        outputs=(specs.hidden.spec, specs.modulation.spec, specs.time.spec),
        reference=module.forward,
        check_sizes=tuple({"batch": rows, "tokens": specs.tokens} for rows in (1, 2)),
    )


def _blocks(transformer: STDiT3, specs: _Specs) -> tuple[PartPlan, ...]:
    rotation = temporal_rotation(
        rotary_frequencies(transformer.config.head_dim), specs.shape.latents[1], TORCH_DTYPES[specs.dtype]
    )
    spatial, temporal = next(transformer.pairs)
    modules = {"spatial": Block(spatial), "temporal": Block(copy.deepcopy(temporal), rotation)}
    return tuple(
        PartPlan(
            name=f"block.{2 * pair + offset:03d}",
            kind=kind,
            module=modules[kind],
            component="transformer",
            prefixes={"block.": f"{kind}_blocks.{pair}."},
            inputs=(specs.hidden, specs.modulation, specs.cached, specs.text, specs.text_bias),
            outputs=(specs.new, specs.distance),
            reference=modules[kind].forward,
            check_sizes=({"batch": 1, "text": 5, "tokens": 12}, {"batch": 2, "text": 9, "tokens": 10}),
        )
        for pair in range(transformer.config.depth)
        for offset, kind in enumerate(modules)
    )


def _epilogue(transformer: STDiT3, specs: _Specs) -> PartPlan:
    module = Epilogue(transformer, specs.shape.latents)
    return PartPlan(
        name="epilogue",
        kind="epilogue",
        module=module,
        component="transformer",
        prefixes={"": ""},
        inputs=(specs.hidden, specs.time),
        outputs=(specs.model_output,),
        reference=module.forward,
        check_sizes=tuple({"batch": rows, "tokens": specs.tokens} for rows in (1, 2)),
    )


def _temporal_decoder(vae: VideoVAE, shape: Shape) -> PartPlan:
    channels, length = shape.latents[0], min(shape.latents[1], vae.config.micro_latents)
    frames = min(shape.frames, vae.config.micro_frame_size)
    module = TemporalDecoder(vae, frames)
    place: tuple[str, str] = ("latent_height", "latent_width")
    return PartPlan(
        name="vae_temporal_decoder",
        kind="vae_temporal_decoder",
        module=module,
        component="vae",
        prefixes={
            "scale": "scale",
            "shift": "shift",
            "post_quant_conv.": "temporal_vae.post_quant_conv.",
            "decoder.": "temporal_vae.decoder.",
        },
        inputs=(Input(float_spec("latents", "fp32", channels, length, *place)),),
        outputs=(float_spec("frame_latents", "fp32", frames, channels, *place),),
        reference=module.forward,
        check_sizes=({"latent_height": 4, "latent_width": 2}, {"latent_height": 3, "latent_width": 5}),
    )


def _spatial_decoder(vae: VideoVAE, shape: Shape) -> PartPlan:
    module = SpatialDecoder(vae)
    factor = vae.config.space_factor
    return PartPlan(
        name="vae_decoder",
        kind="vae_decoder",
        module=module,
        component="vae",
        prefixes={
            "post_quant_conv.": "spatial_vae.module.post_quant_conv.",
            "decoder.": "spatial_vae.module.decoder.",
        },
        inputs=(Input(float_spec("latents", "fp32", "frames", shape.latents[0], "latent_height", "latent_width")),),
        outputs=frame_specs("frames"),
        reference=module.forward,
        check_sizes=tuple(
            {"frames": n, "latent_height": h, "latent_width": w, "height": h * factor, "width": w * factor}
            for n, h, w in ((1, 8, 4), (2, 6, 10))
        ),
        aliases=OLD_ATTENTION,
    )
