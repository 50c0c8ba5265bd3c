"""A compact forward pass of `LatteTransformer3DModel` for training on CPUs.

It computes what the diffusers module computes, with that module's own weights; training checks the two against each
other before it starts. It is faster because it

- stays in patch space, where noise, loss and network meet without unfolding and folding pictures;
- keeps hidden states as (batch, frames, tokens, channels), so modulation is per sample and never repeated;
- computes the text's keys and values once per video, not once per frame;
- writes attention as matmul and softmax, which for these short sequences beats the fused kernel, above all in bfloat16;
- leaves out the four output channels that the pipeline throws away.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import LatteTransformer3DModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn


def patches_from_latents(latents: Tensor, patch: int) -> Tensor:
    """(batch, channels, frames, height, width) to (batch, frames, tokens, patch * patch * channels)."""
    batch, channels, frames, height, width = latents.shape
    grid = latents.reshape(batch, channels, frames, height // patch, patch, width // patch, patch)
    return grid.permute(0, 2, 3, 5, 4, 6, 1).reshape(batch, frames, -1, patch * patch * channels)


def latents_from_patches(patches: Tensor, patch: int) -> Tensor:
    """The inverse of `patches_from_latents` for square pictures."""
    batch, frames, tokens, features = patches.shape
    side, channels = round(tokens**0.5), features // patch**2
    grid = patches.reshape(batch, frames, side, side, patch, patch, channels)
    return grid.permute(0, 6, 1, 2, 4, 3, 5).reshape(batch, channels, frames, side * patch, side * patch)


def predict(transformer: LatteTransformer3DModel, noisy: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
    """The transformer's first `in_channels` output channels, in patch space.

    Args:
        transformer: the diffusers module; gradients flow to its parameters.
        noisy: (batch, frames, tokens, patch * patch * in_channels), in the transformer's dtype.
        timesteps: (batch,), integers in [0, 1000).
        text: (batch, length, caption_channels), outputs of the text encoder.

    Returns:
        Same shape and dtype as `noisy`.
    """
    hidden = _embed_patches(transformer, noisy)
    modulation, embedded = transformer.adaln_single(
        timesteps, {"resolution": None, "aspect_ratio": None}, batch_size=noisy.shape[0], hidden_dtype=noisy.dtype
    )
    modulation = modulation.view(noisy.shape[0], 1, 1, 6, -1)
    text = transformer.caption_projection(text)
    pairs = zip(transformer.transformer_blocks, transformer.temporal_transformer_blocks, strict=True)
    for i, (spatial, temporal) in enumerate(pairs):
        hidden = _block(spatial, hidden, modulation, text, over_frames=False)
        if i == 0:
            hidden = hidden + transformer.temp_pos_embed.to(hidden.dtype).unsqueeze(2)
        hidden = _block(temporal, hidden, modulation, None, over_frames=True)
    shift, scale = (transformer.scale_shift_table + embedded[:, None, None, None]).unbind(-2)
    hidden = transformer.norm_out(hidden) * (1 + scale) + shift
    return _project_out(transformer, hidden)


def _embed_patches(transformer: LatteTransformer3DModel, patches: Tensor) -> Tensor:
    embed = transformer.pos_embed
    weight = embed.proj.weight.permute(0, 2, 3, 1).flatten(1)
    positions: Tensor = embed.pos_embed.to(patches.dtype).unsqueeze(1)
    return F.linear(patches, weight, embed.proj.bias) + positions


def _project_out(transformer: LatteTransformer3DModel, hidden: Tensor) -> Tensor:
    kept, channels = transformer.config.in_channels, transformer.out_channels
    projection = transformer.proj_out
    weight = projection.weight.view(-1, channels, projection.in_features)[:, :kept].flatten(0, 1)
    bias = projection.bias.view(-1, channels)[:, :kept].flatten()
    return F.linear(hidden, weight, bias)


def _block(
    block: BasicTransformerBlock, hidden: Tensor, modulation: Tensor, text: Tensor | None, over_frames: bool
) -> Tensor:
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = (block.scale_shift_table + modulation).unbind(-2)
    normed = block.norm1(hidden) * (1 + scale_msa) + shift_msa
    hidden = hidden + gate_msa * _self_attention(block.attn1, normed, over_frames)
    if text is not None:
        hidden = hidden + _cross_attention(block.attn2, hidden, text)
    normed = block.norm2(hidden) * (1 + scale_mlp) + shift_mlp
    output: Tensor = hidden + gate_mlp * block.ff(normed)
    return output


def _joined(linears: list[nn.Linear], inputs: Tensor) -> Tensor:
    # Several projections of the same inputs in one product, their outputs side by side.
    weight = torch.cat([linear.weight for linear in linears])
    bias = torch.cat([linear.bias for linear in linears])
    return F.linear(inputs, weight, bias)


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = torch.matmul(query * query.shape[-1] ** -0.5, key.transpose(-1, -2))
    return torch.matmul(scores.softmax(-1), value)


def _self_attention(attention: Attention, inputs: Tensor, over_frames: bool) -> Tensor:
    batch, frames, tokens, width = inputs.shape
    joined = _joined([attention.to_q, attention.to_k, attention.to_v], inputs)
    heads = joined.view(batch, frames, tokens, 3, attention.heads, width // attention.heads)
    if over_frames:
        query, key, value = heads.permute(3, 0, 2, 4, 1, 5)
        output = _attend(query, key, value).permute(0, 3, 1, 2, 4)
    else:
        query, key, value = heads.permute(3, 0, 1, 4, 2, 5)
        output = _attend(query, key, value).transpose(2, 3)
    return _joined([attention.to_out[0]], output.reshape(inputs.shape))


def _cross_attention(attention: Attention, inputs: Tensor, text: Tensor) -> Tensor:
    batch, width = inputs.shape[0], inputs.shape[-1]
    shape = (batch, -1, attention.heads, width // attention.heads)
    query = attention.to_q(inputs).view(shape).transpose(1, 2)
    key, value = _joined([attention.to_k, attention.to_v], text).view(batch, -1, 2, *shape[2:]).permute(2, 0, 3, 1, 4)
    output = _attend(query, key, value).transpose(1, 2)
    return _joined([attention.to_out[0]], output.reshape(inputs.shape))
