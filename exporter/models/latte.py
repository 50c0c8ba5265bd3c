"""Latte: pairs of a spatial and a temporal block over one stream (rows, frames, tokens, dim).

The blocks compute what diffusers' LatteTransformer3DModel computes, with two differences in how. The stream keeps one
layout; attention alone looks at it frame by frame or position by position. And the text's keys and values are
computed once per row, where the original repeats the text for every frame first. Each row also masks its own padding,
so that prompts of different length share a batch without attending to it.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, LatteTransformer3DModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from ...engines.errors import CheckpointError, InvalidRequest
from ...engines.manifest import Dtype, Shape, TensorSpec, Text
from ..checkpoint import Checkpoint
from ..sampler import scheduler_from_checkpoint
from .base import (
    MASKED,
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
    mean_squared_change,
    require_equal,
    untrained,
)
from .t5 import TOKENIZER, UNNEEDED, load_encoder, text_encoder_plan, tokenizer_json

MAX_TOKENS = 120  # LattePipeline.encode_prompt pads every prompt to this
DECODE_PIXELS = 512 * 512  # of frames that the VAE decodes at a time
TABLES = ("pos_embed.pos_embed", "temp_pos_embed")  # constants, which diffusers computes anew as well
ENCODER = ("encoder.*", "quant_conv.*")  # of the VAE


class Block(nn.Module):
    """One BasicTransformerBlock with `ada_norm_single` modulation, over the whole stream.

    hidden (B, F, T, D); modulation (B, 6, D); text (B, S, D) and text_bias (B, 1, 1, S) for spatial blocks only;
    cached_hidden (B, F, T, D). Returns the new hidden and the mean squared change from cached_hidden, (B,) fp32.
    """

    def __init__(self, block: BasicTransformerBlock, temporal: bool, positions: Tensor | None = None) -> None:
        super().__init__()
        self.block = block
        self.temporal = temporal
        self.positions: Tensor | None
        self.register_buffer("positions", positions, persistent=False)

    def forward(
        self,
        hidden: Tensor,
        modulation: Tensor,
        cached_hidden: Tensor,
        text: Tensor | None = None,
        text_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        cached, block = cached_hidden, self.block
        if self.positions is not None:
            hidden = hidden + self.positions
        table = block.scale_shift_table[None] + modulation
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = table[:, :, None, None].unbind(1)
        normed = block.norm1(hidden) * (1 + scale_msa) + shift_msa
        hidden = hidden + gate_msa * self._self_attention(normed)
        if text is not None and text_bias is not None:
            hidden = hidden + cross_attention(block.attn2, hidden, text, text_bias)
        normed = block.norm2(hidden) * (1 + scale_mlp) + shift_mlp
        hidden = hidden + gate_mlp * block.ff(normed)
        return hidden, mean_squared_change(hidden, cached)

    def reference(
        self,
        hidden: Tensor,
        modulation: Tensor,
        cached_hidden: Tensor,
        text: Tensor | None = None,
        text_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The same by the original block's own forward, laid out as LatteTransformer3DModel.forward does."""
        rows, frames, tokens, dim = hidden.shape
        if self.temporal:
            hidden = hidden.permute(0, 2, 1, 3).flatten(0, 1)
            if self.positions is not None:
                hidden = hidden + self.positions[:, :, 0]
            timestep = modulation.repeat_interleave(tokens, 0).flatten(1)
            new = self.block(hidden, None, None, None, timestep, None, None)
            new = new.view(rows, tokens, frames, dim).permute(0, 2, 1, 3)
        else:
            assert text is not None and text_bias is not None
            timestep = modulation.repeat_interleave(frames, 0).flatten(1)
            text = text.repeat_interleave(frames, 0)
            bias = text_bias[:, 0].repeat_interleave(frames, 0)
            new = self.block(hidden.flatten(0, 1), None, text, bias, timestep, None, None)
            new = new.view(rows, frames, tokens, dim)
        return new, (new.double() - cached_hidden.double()).square().mean((1, 2, 3)).float()

    def _self_attention(self, hidden: Tensor) -> Tensor:
        rows, frames, tokens, _ = hidden.shape
        attn = self.block.attn1
        query, key, value = (
            project(hidden).view(rows, frames, tokens, attn.heads, -1) for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        # attend over tokens within a frame, or over frames at a position: (rows x outer, heads, inner, head dim)
        order = (0, 2, 3, 1, 4) if self.temporal else (0, 1, 3, 2, 4)
        query, key, value = (states.permute(order).flatten(0, 1) for states in (query, key, value))
        states = F.scaled_dot_product_attention(query, key, value)
        states = states.view(rows, -1, *states.shape[1:])
        inverse = (0, 3, 1, 2, 4) if self.temporal else (0, 1, 3, 2, 4)
        return attn.to_out[0](states.permute(inverse).reshape(rows, frames, tokens, -1))  # type: ignore[no-any-return]


def cross_attention(attn: Attention, hidden: Tensor, text: Tensor, text_bias: Tensor) -> Tensor:
    """All positions of a row attend to the row's text; hidden (B, F, T, D), text (B, S, D), text_bias (B, 1, 1, S)."""
    rows, frames, tokens, _ = hidden.shape
    query = attn.to_q(hidden).view(rows, frames * tokens, attn.heads, -1).transpose(1, 2)
    key = attn.to_k(text).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
    value = attn.to_v(text).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
    # ONNX's Attention does not broadcast the mask over queries in every runtime, so it is expanded here
    bias = text_bias.expand(-1, -1, frames * tokens, -1)
    states = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    return attn.to_out[0](states.transpose(1, 2).reshape(rows, frames, tokens, -1))  # type: ignore[no-any-return]


class Condition(nn.Module):
    """What no step changes: text_states (B, S, C), text_mask (B, S) int64 -> text (B, S, D), text_bias (B, 1, 1, S)."""

    def __init__(self, transformer: LatteTransformer3DModel) -> None:
        super().__init__()
        self.caption_projection = transformer.caption_projection

    def forward(self, text_states: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
        text = self.caption_projection(text_states)
        return text, ((1 - text_mask[:, None, None]) * MASKED).to(text.dtype)


class Prologue(nn.Module):
    """latents (B, C, F, h, w) fp32, timestep (B,) fp32 -> hidden (B, F, T, D), modulation (B, 6, D), time (B, D)."""

    def __init__(self, transformer: LatteTransformer3DModel) -> None:
        super().__init__()
        self.pos_embed = transformer.pos_embed
        self.adaln_single = transformer.adaln_single

    def forward(self, latents: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, _, frames = latents.shape[:3]
        dtype = self.pos_embed.proj.weight.dtype
        hidden = self.pos_embed(latents.to(dtype).transpose(1, 2).flatten(0, 1))
        unconditional = {"resolution": None, "aspect_ratio": None}
        modulation, time = self.adaln_single(timestep, unconditional, batch_size=rows, hidden_dtype=dtype)
        return hidden.unflatten(0, (rows, frames)), modulation.unflatten(1, (6, -1)), time


class Epilogue(nn.Module):
    """hidden (B, F, T, D), time (B, D) -> model_output (B, C, F, h, w) fp32, without the learned variance."""

    def __init__(self, transformer: LatteTransformer3DModel, latents: tuple[int, ...]) -> None:
        super().__init__()
        self.norm_out = transformer.norm_out
        self.scale_shift_table = transformer.scale_shift_table
        self.proj_out = transformer.proj_out
        self.channels, _, self.height, self.width = latents
        self.patch = transformer.config.patch_size

    def forward(self, hidden: Tensor, time: Tensor) -> Tensor:
        rows, frames = hidden.shape[:2]
        shift, scale = (self.scale_shift_table[None] + time[:, None])[:, :, None, None].unbind(1)
        patches = self.proj_out(self.norm_out(hidden) * (1 + scale) + shift)
        high, wide = self.height // self.patch, self.width // self.patch
        patches = patches.view(rows, frames, high, wide, self.patch, self.patch, -1)[..., : self.channels]
        latents = patches.permute(0, 6, 1, 2, 4, 3, 5)  # (B, C, F, high, patch, wide, patch)
        output: Tensor = latents.reshape(rows, self.channels, frames, self.height, self.width).float()
        return output


class VaeDecoder(nn.Module):
    """latents (C, N, h, w) fp32 of N frames -> frames (N, H, W, 3) uint8, frame_means (N,) fp32."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.post_quant_conv = vae.post_quant_conv if vae.config.use_post_quant_conv else nn.Identity()
        self.decoder = vae.decoder
        self.scaling = float(vae.config.scaling_factor)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        scaled = (latents.transpose(0, 1) / self.scaling).to(self.decoder.conv_in.weight.dtype)
        pixels = self.decoder(self.post_quant_conv(scaled)).float().permute(0, 2, 3, 1)
        shades = (pixels / 2 + 0.5).clamp(0, 1) * 255
        # the cast is last: TensorRT has uint8 at the border of a graph only
        return shades.round().to(torch.uint8), pixels.mean((1, 2, 3))


def split(checkpoint: Checkpoint, request: ExportRequest) -> Split:
    """Take a LattePipeline checkpoint apart. Raises CheckpointError, InvalidRequest."""
    components = {
        "transformer": "LatteTransformer3DModel",
        "text_encoder": "T5EncoderModel",
        "vae": "AutoencoderKL",
    }
    checkpoint.require_pipeline("LattePipeline", components)
    request.refuse_presets("Latte")
    dtype = TORCH_DTYPES[request.dtype]
    with init_empty_weights(include_buffers=False):
        transformer = LatteTransformer3DModel.from_config(checkpoint.config("transformer")).eval()
        vae = AutoencoderKL.from_config(checkpoint.config("vae")).eval()
    for module in (transformer, vae):
        nn.Module.to(module, dtype)  # past diffusers' own to(), which advises on loading with from_pretrained
    encoder = load_encoder(checkpoint, request.dtype)
    _check_config(checkpoint, transformer)
    _check_fit(checkpoint, transformer, vae, encoder.config.d_model)
    shape = _shape(transformer, vae, request)
    side = transformer.config.sample_size * _scale(vae)
    specs = _Specs(transformer, shape, request.dtype)
    chunk = max(1, min(shape.frames, DECODE_PIXELS // (shape.height * shape.width)))
    return Split(
        shape=shape,
        ranges=_ranges(shape, specs.tokens, chunk),
        streams=("hidden",),
        guidance_order="negative_first",
        text_encoder=text_encoder_plan(encoder, request.dtype, MAX_TOKENS),
        condition=_condition(transformer, encoder.config.d_model, request.dtype),
        prologue=_prologue(transformer, specs),
        blocks=_blocks(transformer, specs),
        epilogue=_epilogue(transformer, specs),
        decoder=(StagePlan(_vae_decoder(vae, shape), None, axis=1, chunks=chunks_of(shape.frames, chunk)),),
        text=Text(tokenizer=TOKENIZER, max_tokens=MAX_TOKENS, pad_id=0, cleaning="lower"),
        tokenizer=lambda: tokenizer_json(checkpoint),
        scheduler=lambda: scheduler_from_checkpoint(checkpoint),
        cautions=(*untrained("height", shape.height, side), *untrained("width", shape.width, side)),
        unneeded={"text_encoder": UNNEEDED, "transformer": TABLES, "vae": ENCODER},
    )


def _ranges(shape: Shape, tokens: int, chunk: int) -> dict[str, tuple[int, int]]:
    _, _, height, width = shape.latents
    return {
        "batch": (1, 2 * shape.max_batch),
        "text": (1, MAX_TOKENS),
        "tokens": (tokens, tokens),
        "frames": (1, chunk),
        "latent_height": (height, height),
        "latent_width": (width, width),
        "height": (shape.height, shape.height),
        "width": (shape.width, shape.width),
    }


class _Specs:
    """The tensors that several parts share."""

    def __init__(self, transformer: LatteTransformer3DModel, shape: Shape, dtype: Dtype) -> None:
        config = transformer.config
        channels, frames, height, width = shape.latents
        dim = config.num_attention_heads * config.attention_head_dim
        tokens = (height // config.patch_size) * (width // config.patch_size)
        self.latents = Input(float_spec("latents", "fp32", "batch", channels, frames, height, width))
        self.timestep = Input(float_spec("timestep", "fp32", "batch"), draw_timestep)
        self.hidden = Input(float_spec("hidden", dtype, "batch", frames, "tokens", dim))
        self.cached = Input(float_spec("cached_hidden", dtype, "batch", frames, "tokens", dim))
        self.new = float_spec("new_hidden", dtype, "batch", frames, "tokens", dim)
        self.tokens = tokens
        self.modulation = Input(float_spec("modulation", dtype, "batch", 6, dim))
        self.time = Input(float_spec("time", dtype, "batch", dim))
        self.text = Input(float_spec("text", dtype, "batch", "text", dim))
        self.text_bias = Input(float_spec("text_bias", dtype, "batch", 1, 1, "text"), draw_bias)
        self.distance = float_spec("distance", "fp32", "batch")
        self.model_output = float_spec("model_output", "fp32", "batch", channels, frames, height, width)
        self.shape = shape


def _condition(transformer: LatteTransformer3DModel, width: int, dtype: Dtype) -> PartPlan:
    module = Condition(transformer)
    dim = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    return PartPlan(
        name="condition",
        kind="condition",
        module=module,
        component="transformer",
        prefixes={"": ""},
        inputs=(
            Input(float_spec("text_states", dtype, "batch", "text", width)),
            Input(TensorSpec(name="text_mask", dtype="int64", shape=("batch", "text")), draw_mask),
        ),
        outputs=(
            float_spec("text", dtype, "batch", "text", dim),
            float_spec("text_bias", dtype, "batch", 1, 1, "text"),
        ),
        reference=module.forward,
        check_sizes=({"batch": 1, "text": 5}, {"batch": 2, "text": 17}),
    )


def _prologue(transformer: LatteTransformer3DModel, specs: _Specs) -> PartPlan:
    module = Prologue(transformer)
    return PartPlan(
        name="prologue",
        kind="prologue",
        module=module,
        component="transformer",
        prefixes={"": ""},
        inputs=(specs.latents, specs.timestep),
        outputs=(specs.hidden.spec, specs.modulation.spec, specs.time.spec),
        reference=module.forward,
        check_sizes=({"batch": 1, "tokens": specs.tokens}, {"batch": 2, "tokens": specs.tokens}),
    )


def _blocks(transformer: LatteTransformer3DModel, specs: _Specs) -> tuple[PartPlan, ...]:
    positions = transformer.temp_pos_embed[:, :, None] if specs.shape.frames > 1 else None  # (1, F, 1, D)
    modules = {
        "spatial": Block(transformer.transformer_blocks[0], temporal=False),
        "temporal_first": Block(transformer.temporal_transformer_blocks[0], temporal=True, positions=positions),
        "temporal": Block(copy.deepcopy(transformer.temporal_transformer_blocks[0]), temporal=True),
    }
    plans: list[PartPlan] = []
    for index in range(transformer.config.num_layers):
        for kind in ("spatial", "temporal" if index else "temporal_first"):
            spatial = kind == "spatial"
            prefix = "transformer_blocks" if spatial else "temporal_transformer_blocks"
            text = (specs.text, specs.text_bias) if spatial else ()
            plans.append(
                PartPlan(
                    name=f"block.{len(plans):03d}",
                    kind=kind,
                    module=modules[kind],
                    component="transformer",
                    prefixes={"block.": f"{prefix}.{index}."},
                    inputs=(specs.hidden, specs.modulation, specs.cached, *text),
                    outputs=(specs.new, specs.distance),
                    reference=modules[kind].reference,
                    check_sizes=({"batch": 1, "text": 5, "tokens": 12}, {"batch": 2, "text": 17, "tokens": 10}),
                )
            )
    return tuple(plans)


def _epilogue(transformer: LatteTransformer3DModel, specs: _Specs) -> PartPlan:
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
        check_sizes=({"batch": 1, "tokens": specs.tokens}, {"batch": 2, "tokens": specs.tokens}),
    )


def _vae_decoder(vae: AutoencoderKL, shape: Shape) -> PartPlan:
    module = VaeDecoder(vae)
    scale = shape.height // shape.latents[2]
    return PartPlan(
        name="vae_decoder",
        kind="vae_decoder",
        module=module,
        component="vae",
        prefixes={"": ""},
        inputs=(Input(float_spec("latents", "fp32", shape.latents[0], "frames", "latent_height", "latent_width")),),
        outputs=frame_specs("frames"),
        reference=module.forward,
        check_sizes=tuple(
            {"frames": n, "latent_height": h, "latent_width": w, "height": h * scale, "width": w * scale}
            for n, h, w in ((1, 8, 4), (2, 6, 10))
        ),
        aliases=(("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")),
    )


def _check_config(checkpoint: Checkpoint, transformer: LatteTransformer3DModel) -> None:
    config = transformer.config
    if config.norm_type != "ada_norm_single":
        raise CheckpointError(
            f"checkpoint {checkpoint.name}: transformer norm_type is {config.norm_type!r}, expected 'ada_norm_single', "
            "as every published Latte has"
        )


def _check_fit(
    checkpoint: Checkpoint, transformer: LatteTransformer3DModel, vae: AutoencoderKL, text_width: int
) -> None:
    config = transformer.config
    channels, dim = config.in_channels, config.num_attention_heads * config.attention_head_dim
    outputs = config.out_channels if config.out_channels in (channels, 2 * channels) else 2 * channels
    require_equal(
        checkpoint,
        ("transformer in_channels", channels, "vae latent_channels", vae.config.latent_channels),
        ("transformer out_channels", config.out_channels, "twice its in_channels", outputs),
        ("transformer caption_channels", config.caption_channels, "text_encoder d_model", text_width),
        ("transformer cross_attention_dim", config.cross_attention_dim, "its heads times head dim", dim),
    )


def _scale(vae: AutoencoderKL) -> int:
    """Pixels along the side of a latent."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def _shape(transformer: LatteTransformer3DModel, vae: AutoencoderKL, request: ExportRequest) -> Shape:
    config = transformer.config
    scale = _scale(vae)
    height, width = (side or config.sample_size * scale for side in (request.height, request.width))
    frames = request.frames or config.video_length
    unit = scale * config.patch_size
    for name, side in (("height", height), ("width", width)):
        if side % unit:
            raise InvalidRequest(f"{name}: got {side}, expected a multiple of {unit} pixels for this checkpoint")
    if frames not in (1, config.video_length):
        raise InvalidRequest(
            f"frames: got {frames}, expected {config.video_length} (or 1), as the checkpoint was trained"
        )
    return Shape(
        height=height,
        width=width,
        frames=frames,
        latents=(config.in_channels, frames, height // scale, width // scale),
        max_batch=request.max_batch,
    )
