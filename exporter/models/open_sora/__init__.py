"""Open-Sora 1.2: pairs of a spatial and a temporal block over one stream (rows, frames, tokens, dim).

Its checkpoint is not one of diffusers: `transformer` and `vae` are published apart, each a config.json and
model.safetensors with the original's names, and text encoder and tokenizer are T5's as others publish them.
"""

from __future__ import annotations

import copy
import math

import torch

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
    float_spec,
    require_equal,
)
from ..parts import (
    VAE_ENCODER,
    SpatioTemporalTensors,
    epilogue_plan,
    frames_at_a_time,
    image_decoder_plan,
    masked_text_plan,
    prologue_plan,
    ranges_of,
    sole_part,
    without_values,
)
from ..t5 import TOKENIZER, UNNEEDED, load_encoder, text_encoder_plan, tokenizer_json
from .config import CHANNELS, STDiT3Config, VideoVAEConfig
from .modules import Block, Condition, Epilogue, Prologue, SpatialDecoder, TemporalDecoder, temporal_rotation
from .presets import DEFAULT_SIZE, VideoSize, size_cautions, video_size
from .schedule import RectifiedFlow
from .stdit3 import STDiT3, rotary_frequencies
from .vae import VideoVAE

FPS, FPS_OF_AN_IMAGE = 24, 120  # what the model is told; it was trained on images as very fast videos
SCORE = "aesthetic score:"  # captions of the training set end in one
ENCODERS = tuple(f"{stage}.{layers}" for stage in ("spatial_vae.module", "temporal_vae") for layers in VAE_ENCODER)


def _draw_halves(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randint(2, shape, generator=generator)


UNCONDITIONAL = Input(TensorSpec(name="unconditional", dtype="int64", shape=("batch",)), _draw_halves)


def split(checkpoint: Checkpoint, request: ExportRequest) -> Split:
    """Take an Open-Sora 1.2 checkpoint apart. Raises CheckpointError, InvalidRequest."""
    kind = checkpoint.config("transformer").get("model_type")
    if kind != "STDiT3":
        raise CheckpointError(
            f"checkpoint {checkpoint.name}: transformer is a {kind}, expected an STDiT3; choose the model it is"
        )
    transformer = without_values(
        lambda: STDiT3(STDiT3Config.from_json(checkpoint.config("transformer"))), request.dtype
    )
    vae = without_values(lambda: VideoVAE(VideoVAEConfig.from_json(checkpoint.config("vae"))), request.dtype_of("vae"))
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
    tensors = _tensors(config, shape, request.dtype)
    chunk, tokens = frames_at_a_time(shape), config.model_max_length
    return Split(
        shape=shape,
        ranges=ranges_of(shape, text=(1, tokens), frames=(1, chunk), tokens=tensors.tokens),
        streams=("hidden",),
        guidance_order="positive_first",
        text_encoder=text_encoder_plan(encoder, request.dtype, tokens),
        condition=masked_text_plan(Condition(transformer), tensors, tokens, UNCONDITIONAL),
        prologue=prologue_plan(_prologue(transformer, shape, size), tensors),
        blocks=_blocks(transformer, shape, tensors),
        epilogue=epilogue_plan(Epilogue(transformer, shape.latents), tensors),
        decoder=_decoder(vae, shape, chunk),
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
        scheduler=lambda: RectifiedFlow(size.height, size.width, size.frames, TORCH_DTYPES[request.dtype]),
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


def _tensors(config: STDiT3Config, shape: Shape, dtype: Dtype) -> SpatioTemporalTensors:
    tokens = math.prod(config.patches(*shape.latents[2:]))
    return SpatioTemporalTensors(shape, dtype, tokens, dim=config.hidden_size, text_width=config.caption_channels)


def _prologue(transformer: STDiT3, shape: Shape, size: VideoSize) -> Prologue:
    fps = FPS_OF_AN_IMAGE if size.frames == 1 else FPS
    return Prologue(transformer, shape.latents, size.height, size.width, fps)


def _blocks(transformer: STDiT3, shape: Shape, tensors: SpatioTemporalTensors) -> tuple[PartPlan, ...]:
    rotation = temporal_rotation(
        rotary_frequencies(transformer.config.head_dim), shape.latents[1], TORCH_DTYPES[tensors.dtype]
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
            inputs=(*tensors.streams, tensors.modulation, *tensors.cached, tensors.text, tensors.text_bias),
            outputs=tensors.block_outputs,
            reference=modules[kind].forward,
            check_sizes=({"batch": 1, "text": 5, "tokens": 12}, {"batch": 2, "text": 9, "tokens": 10}),
        )
        for pair in range(transformer.config.depth)
        for offset, kind in enumerate(modules)
    )


def _decoder(vae: VideoVAE, shape: Shape, chunk: int) -> tuple[StagePlan, ...]:
    """Latents to those of every frame, then these to pixels, `chunk` frames at a time."""
    return (
        StagePlan(_temporal_decoder(vae, shape), None, 1, chunks_of(shape.latents[1], vae.config.micro_latents)),
        StagePlan(_spatial_decoder(vae), None, 0, chunks_of(shape.frames, chunk)),
    )


def _temporal_decoder(vae: VideoVAE, shape: Shape) -> PartPlan:
    channels, length = shape.latents[0], min(shape.latents[1], vae.config.micro_latents)
    frames = min(shape.frames, vae.config.micro_frame_size)
    place: tuple[str, str] = ("latent_height", "latent_width")
    return sole_part(
        "vae_temporal_decoder",
        TemporalDecoder(vae, frames),
        inputs=(Input(float_spec("latents", "fp32", channels, length, *place)),),
        outputs=(float_spec("frame_latents", "fp32", frames, channels, *place),),
        check_sizes=({"latent_height": 4, "latent_width": 2}, {"latent_height": 3, "latent_width": 5}),
        component="vae",
        prefixes={
            "scale": "scale",
            "shift": "shift",
            "post_quant_conv.": "temporal_vae.post_quant_conv.",
            "decoder.": "temporal_vae.decoder.",
        },
    )


def _spatial_decoder(vae: VideoVAE) -> PartPlan:
    return image_decoder_plan(
        SpatialDecoder(vae),
        ("frames", CHANNELS, "latent_height", "latent_width"),
        vae.config.space_factor,
        {"post_quant_conv.": "spatial_vae.module.post_quant_conv.", "decoder.": "spatial_vae.module.decoder."},
    )
