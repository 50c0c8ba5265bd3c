"""A compact forward pass of `CogVideoXTransformer3DModel` for training on CPUs.

It computes what the diffusers module computes, with that module's own weights; training checks the two against each
other before it starts. It is faster because it stays in patch space, keeps text and video in one sequence instead of
splitting and joining it at every block, computes the modulations of all blocks in one product and rotates queries and
keys as complex numbers. Float32 only, which for these sizes is faster on CPUs than bfloat16.

The sequence is kept as groups of as many tokens as the text has, (batch, groups, group, channels): the text is the
first group, so modulations are one row a group.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from torch import Tensor, nn


def patches_from_latents(latents: Tensor, patch: int) -> Tensor:
    """(batch, frames, channels, height, width) to (batch, tokens, channels * patch * patch), frames slowest."""
    batch, frames, channels, height, width = latents.shape
    grid = latents.reshape(batch, frames, channels, height // patch, patch, width // patch, patch)
    return grid.permute(0, 1, 3, 5, 2, 4, 6).reshape(batch, -1, channels * patch * patch)


def latents_from_patches(patches: Tensor, patch: int, frames: int) -> Tensor:
    """The inverse of `patches_from_latents` for square pictures."""
    batch, tokens, features = patches.shape
    side, channels = round((tokens // frames) ** 0.5), features // patch**2
    grid = patches.reshape(batch, frames, side, side, channels, patch, patch)
    return grid.permute(0, 1, 4, 2, 5, 3, 6).reshape(batch, frames, channels, side * patch, side * patch)


def rotary_embedding(transformer: CogVideoXTransformer3DModel, frames: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines that the pipeline passes to the transformer, float32 (tokens, head_dim) each."""
    config = transformer.config
    grid = config.sample_height // config.patch_size, config.sample_width // config.patch_size
    cosines, sines = get_3d_rotary_pos_embed(config.attention_head_dim, ((0, 0), grid), grid, frames)
    return cosines, sines


def rotations(transformer: CogVideoXTransformer3DModel, frames: int) -> Tensor:
    """The same as complex numbers, with rotations by 0 for the text, complex64 (text + tokens, head_dim / 2)."""
    cosines, sines = (table[:, ::2] for table in rotary_embedding(transformer, frames))
    still = torch.ones(transformer.config.max_text_seq_length, cosines.shape[1], dtype=torch.complex64)
    return torch.cat([still, torch.complex(cosines.contiguous(), sines.contiguous())])


def predict(
    transformer: CogVideoXTransformer3DModel, noisy: Tensor, timesteps: Tensor, text: Tensor, turns: Tensor
) -> Tensor:
    """The transformer's output in patch space.

    Args:
        transformer: the diffusers module; gradients flow to its parameters.
        noisy: (batch, tokens, in_channels * patch * patch), float32; a multiple of the text's length of tokens.
        timesteps: (batch,), integers in [0, 1000).
        text: (batch, max_text_seq_length, text_embed_dim), outputs of the text encoder.
        turns: `rotations` of the transformer.

    Returns:
        Same shape and dtype as `noisy`.
    """
    embed, (batch, tokens, _), length = transformer.patch_embed, noisy.shape, text.shape[1]
    time = F.silu(transformer.time_embedding(transformer.time_proj(timesteps)))
    video = F.linear(noisy, embed.proj.weight.flatten(1), embed.proj.bias)
    hidden = torch.cat([embed.text_proj(text), video], dim=1).view(batch, -1, length, video.shape[-1])
    norms = [norm for block in transformer.transformer_blocks for norm in (block.norm1, block.norm2)]
    modulations = _joined([norm.linear for norm in norms], time).view(batch, len(norms), 2, 3, -1).unbind(1)
    pairs = zip(transformer.transformer_blocks, modulations[::2], modulations[1::2], strict=True)
    for block, attention_modulation, mlp_modulation in pairs:
        shift, scale, gate = _by_group(attention_modulation, hidden.shape[1])
        normed = block.norm1.norm(hidden) * (1 + scale) + shift
        hidden = hidden + gate * _attention(block.attn1, normed, turns)
        shift, scale, gate = _by_group(mlp_modulation, hidden.shape[1])
        normed = block.norm2.norm(hidden) * (1 + scale) + shift
        hidden = hidden + gate * block.ff(normed)
    video = transformer.norm_final(hidden[:, 1:].reshape(batch, tokens, -1))
    shift, scale = transformer.norm_out.linear(time).unsqueeze(1).chunk(2, dim=-1)
    output: Tensor = transformer.proj_out(transformer.norm_out.norm(video) * (1 + scale) + shift)
    return output


def _by_group(modulation: Tensor, groups: int) -> tuple[Tensor, ...]:
    # (batch, 2, 3, channels), the video's first, to shift, scale and gate, each (batch, groups, 1, channels).
    video, text = modulation.chunk(2, dim=1)
    return torch.cat([text, video.expand(-1, groups - 1, -1, -1)], dim=1).unsqueeze(3).unbind(2)


def _joined(linears: list[nn.Linear], inputs: Tensor) -> Tensor:
    # Several projections of the same inputs in one product, their outputs side by side.
    weight = torch.cat([linear.weight for linear in linears])
    bias = torch.cat([linear.bias for linear in linears])
    return F.linear(inputs, weight, bias)


def _attention(attention: Attention, inputs: Tensor, turns: Tensor) -> Tensor:
    batch, groups, length, width = inputs.shape
    joined = _joined([attention.to_q, attention.to_k, attention.to_v], inputs)
    heads = joined.view(batch, groups * length, 3, attention.heads, width // attention.heads)
    query, key, value = heads.permute(2, 0, 3, 1, 4)
    query, key = _rotate(attention.norm_q(query), turns), _rotate(attention.norm_k(key), turns)
    scores = torch.matmul(query * query.shape[-1] ** -0.5, key.transpose(-1, -2))
    output = torch.matmul(scores.softmax(-1), value).transpose(1, 2).reshape(inputs.shape)
    projected: Tensor = attention.to_out[0](output)
    return projected


def _rotate(states: Tensor, turns: Tensor) -> Tensor:
    pairs = torch.view_as_complex(states.reshape(*states.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns).flatten(-2)
