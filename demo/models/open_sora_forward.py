"""A compact forward pass of `STDiT3` for training on CPUs.

It computes what the exporter's module computes for text to video, with that module's own weights; training checks the
two against each other before it starts. It is faster because it stays in patch space, keeps hidden states as (batch,
frames, tokens, channels), computes the text's keys and values of all blocks in one product, writes attention as matmul
and softmax, and leaves out the output channels that sampling throws away.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demo import shapes
from demo.models.latte_forward import latents_from_patches, patches_from_latents
from foresight.exporter.models.open_sora.stdit3 import (
    CrossAttention,
    RMSNorm,
    SelfAttention,
    STDiT3,
    STDiT3Block,
    position_embedding,
    rotation_table,
)

FPS = 24.0

__all__ = ["FPS", "latents_from_patches", "patches_from_latents", "predict", "rotations"]


def rotations(transformer: STDiT3, frames: int) -> Tensor:
    """The temporal blocks' rotations as complex numbers, complex64 (frames, head_dim / 2)."""
    cosines, sines = (table[:, ::2].contiguous() for table in rotation_table(transformer.rope.freqs, frames))
    return torch.complex(cosines, sines)


def predict(transformer: STDiT3, noisy: Tensor, timesteps: Tensor, text: Tensor, turns: Tensor) -> Tensor:
    """The transformer's velocity, x0 - noise, in patch space.

    Args:
        transformer: gradients flow to its parameters.
        noisy: (batch, frames, tokens, patch * patch * in_channels), float32.
        timesteps: (batch,), float32 from 0 (clean) to 1000 (noise).
        text: (batch, length, caption_channels), all of it to be attended to.
        turns: `rotations` of the transformer.

    Returns:
        Same shape and dtype as `noisy`.
    """
    config, batch = transformer.config, noisy.shape[0]
    hidden = _embed_patches(transformer, noisy)
    time = transformer.t_embedder(timesteps) + transformer.fps_embedder(torch.full((1,), FPS))
    modulation = transformer.t_block(time).view(batch, 1, 1, 6, -1)
    text = transformer.y_embedder.y_proj(text)
    pairs = zip(transformer.spatial_blocks, transformer.temporal_blocks, strict=True)
    blocks = cast("list[STDiT3Block]", [block for pair in pairs for block in pair])
    joined = _joined([block.cross_attn.kv_linear for block in blocks], text)
    keys_and_values = joined.view(batch, text.shape[1], len(blocks), 2, config.num_heads, -1).permute(2, 3, 0, 4, 1, 5)
    for i, (block, (key, value)) in enumerate(zip(blocks, keys_and_values, strict=True)):
        table = block.scale_shift_table + modulation
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = table.unbind(-2)
        normed = block.norm1(hidden) * (1 + scale_msa) + shift_msa
        hidden = hidden + gate_msa * _self_attention(block.attn, normed, turns if i % 2 else None)
        hidden = hidden + _cross_attention(block.cross_attn, hidden, key, value)
        normed = block.norm2(hidden) * (1 + scale_mlp) + shift_mlp
        hidden = hidden + gate_mlp * block.mlp(normed)
    final = transformer.final_layer
    shift, scale = (final.scale_shift_table + time[:, None, None, None]).unbind(-2)
    return _project_out(transformer, final.norm_final(hidden) * (1 + scale) + shift)


def _embed_patches(transformer: STDiT3, patches: Tensor) -> Tensor:
    config, projection = transformer.config, transformer.x_embedder.proj
    weight = projection.weight[:, :, 0].permute(0, 2, 3, 1).flatten(1)
    side = round(patches.shape[2] ** 0.5)
    scale = shapes.SIZE / config.input_sq_size
    positions = position_embedding(config.hidden_size, (side, side), scale, torch.float32)
    return F.linear(patches, weight, projection.bias) + positions


def _project_out(transformer: STDiT3, hidden: Tensor) -> Tensor:
    kept, channels = transformer.config.in_channels, transformer.config.out_channels
    linear = transformer.final_layer.linear
    weight = linear.weight.view(-1, channels, linear.in_features)[:, :kept].flatten(0, 1)
    bias = linear.bias.view(-1, channels)[:, :kept].flatten()
    return F.linear(hidden, weight, bias)


def _joined(linears: list[nn.Linear], inputs: Tensor) -> Tensor:
    # Several projections of the same inputs in one product, their outputs side by side.
    weight = torch.cat([linear.weight for linear in linears])
    bias = torch.cat([linear.bias for linear in linears])
    return F.linear(inputs, weight, bias)


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = torch.matmul(query * query.shape[-1] ** -0.5, key.transpose(-1, -2))
    return torch.matmul(scores.softmax(-1), value)


def _normed(norm: RMSNorm, states: Tensor) -> Tensor:
    return F.rms_norm(states, (states.shape[-1],), norm.weight, 1e-6)


def _self_attention(attention: SelfAttention, inputs: Tensor, turns: Tensor | None) -> Tensor:
    # Within each frame, or, where there are rotations, across frames.
    heads = attention.qkv(inputs).unflatten(-1, (3, attention.heads, -1))
    query, key, value = heads.permute(3, 0, 1, 4, 2, 5) if turns is None else heads.permute(3, 0, 2, 4, 1, 5)
    query, key = _normed(attention.q_norm, query), _normed(attention.k_norm, key)
    if turns is None:
        output = _attend(query, key, value).transpose(2, 3)
    else:
        output = _attend(_rotate(query, turns), _rotate(key, turns), value).permute(0, 3, 1, 2, 4)
    projected: Tensor = attention.proj(output.reshape(inputs.shape))
    return projected


def _cross_attention(attention: CrossAttention, inputs: Tensor, key: Tensor, value: Tensor) -> Tensor:
    query = attention.q_linear(inputs).flatten(1, 2).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
    output = _attend(query, key, value).transpose(1, 2)
    projected: Tensor = attention.proj(output.reshape(inputs.shape))
    return projected


def _rotate(states: Tensor, turns: Tensor) -> Tensor:
    pairs = torch.view_as_complex(states.reshape(*states.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns).flatten(-2)
