"""Latte: pairs of a spatial and a temporal block over one stream (rows, frames, tokens, dim).

The blocks compute what diffusers' LatteTransformer3DModel computes, with two differences in how. The stream keeps one
layout; attention alone looks at it frame by frame or position by position. And the text's keys and values are
computed once per row, where the original repeats the text for every frame first. Each row also masks its own padding,
so that prompts of different length share a batch without attending to it.
"""

from __future__ import annotations

import copy

import torch.nn.functional as F
from diffusers import AutoencoderKL, LatteTransformer3DModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from ...engines.errors import CheckpointError, InvalidRequest
from ...engines.manifest import Shape, Text
from ..checkpoint import Checkpoint
from ..sampler import scheduler_from_checkpoint
from .base import (
    ExportRequest,
    PartPlan,
    Split,
    StagePlan,
    bias_from_mask,
    chunks_of,
    mean_squared_change,
    require_equal,
    untrained,
)
from .parts import (
    VAE_ENCODER,
    SpatioTemporalTensors,
    epilogue_plan,
    frames_at_a_time,
    frames_from_pixels,
    image_decoder_plan,
    masked_text_plan,
    pixels_per_latent,
    prologue_plan,
    ranges_of,
    require_multiples,
    without_values,
)
from .t5 import TOKENIZER, UNNEEDED, load_encoder, text_encoder_plan, tokenizer_json

MAX_TOKENS = 120  # LattePipeline.encode_prompt pads every prompt to this
TABLES = ("pos_embed.pos_embed", "temp_pos_embed")  # constants, which diffusers computes anew as well


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
        return text, bias_from_mask(text_mask, text.dtype)


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
        return frames_from_pixels(self.decoder(self.post_quant_conv(scaled)).float().permute(0, 2, 3, 1))


def split(checkpoint: Checkpoint, request: ExportRequest) -> Split:
    """Take a LattePipeline checkpoint apart. Raises CheckpointError, InvalidRequest."""
    components = {
        "transformer": "LatteTransformer3DModel",
        "text_encoder": "T5EncoderModel",
        "vae": "AutoencoderKL",
    }
    checkpoint.require_pipeline("LattePipeline", components)
    request.refuse_presets("Latte")
    transformer = without_values(
        lambda: LatteTransformer3DModel.from_config(checkpoint.config("transformer")), request.dtype
    )
    vae = without_values(lambda: AutoencoderKL.from_config(checkpoint.config("vae")), request.dtype_of("vae"))
    encoder = load_encoder(checkpoint, request.dtype)
    _check_config(checkpoint, transformer)
    _check_fit(checkpoint, transformer, vae, encoder.config.d_model)
    shape = _shape(transformer, vae, request)
    config, scale, chunk = transformer.config, pixels_per_latent(vae), frames_at_a_time(shape)
    channels, _, height, width = shape.latents
    tensors = SpatioTemporalTensors(
        shape,
        request.dtype,
        tokens=(height // config.patch_size) * (width // config.patch_size),
        dim=config.num_attention_heads * config.attention_head_dim,
        text_width=encoder.config.d_model,
    )
    frames = image_decoder_plan(VaeDecoder(vae), (channels, "frames", "latent_height", "latent_width"), scale)
    side = config.sample_size * scale
    return Split(
        shape=shape,
        ranges=ranges_of(shape, text=(1, MAX_TOKENS), tokens=tensors.tokens, frames=(1, chunk)),
        streams=("hidden",),
        guidance_order="negative_first",
        text_encoder=text_encoder_plan(encoder, request.dtype, MAX_TOKENS),
        condition=masked_text_plan(Condition(transformer), tensors, MAX_TOKENS),
        prologue=prologue_plan(Prologue(transformer), tensors),
        blocks=_blocks(transformer, shape, tensors),
        epilogue=epilogue_plan(Epilogue(transformer, shape.latents), tensors),
        decoder=(StagePlan(frames, None, axis=1, chunks=chunks_of(shape.frames, chunk)),),
        text=Text(tokenizer=TOKENIZER, max_tokens=MAX_TOKENS, pad_id=0, cleaning="lower"),
        tokenizer=lambda: tokenizer_json(checkpoint),
        scheduler=lambda: scheduler_from_checkpoint(checkpoint),
        cautions=(*untrained("height", shape.height, side), *untrained("width", shape.width, side)),
        unneeded={"text_encoder": UNNEEDED, "transformer": TABLES, "vae": VAE_ENCODER},
    )


def _blocks(transformer: LatteTransformer3DModel, shape: Shape, tensors: SpatioTemporalTensors) -> tuple[PartPlan, ...]:
    positions = transformer.temp_pos_embed[:, :, None] if shape.frames > 1 else None  # (1, F, 1, D)
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
            text = (tensors.text, tensors.text_bias) if spatial else ()
            plans.append(
                PartPlan(
                    name=f"block.{len(plans):03d}",
                    kind=kind,
                    module=modules[kind],
                    component="transformer",
                    prefixes={"block.": f"{prefix}.{index}."},
                    inputs=(*tensors.streams, tensors.modulation, *tensors.cached, *text),
                    outputs=tensors.block_outputs,
                    reference=modules[kind].reference,
                    check_sizes=({"batch": 1, "text": 5, "tokens": 12}, {"batch": 2, "text": 17, "tokens": 10}),
                )
            )
    return tuple(plans)


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


def _shape(transformer: LatteTransformer3DModel, vae: AutoencoderKL, request: ExportRequest) -> Shape:
    config = transformer.config
    scale = pixels_per_latent(vae)
    height, width = (side or config.sample_size * scale for side in (request.height, request.width))
    frames = request.frames or config.video_length
    require_multiples(scale * config.patch_size, height=height, width=width)
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
