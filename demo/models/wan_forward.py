"""A compact forward pass of `WanTransformer3DModel` for training on CPUs.

It computes what the diffusers module computes, with that module's own weights; training checks the two against each
other before it starts. It is faster because it stays in patch space, computes the text's keys and values of all blocks
in one product, writes attention as matmul and softmax and rotates queries and keys as complex numbers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention, WanTransformerBlock
from torch import Tensor, nn


def patches_from_latents(latents: Tensor, patch: int) -> Tensor:
    """(batch, channels, frames, height, width) to (batch, tokens, channels * patch * patch), frames slowest."""
    batch, channels, frames, height, width = latents.shape
    grid = latents.reshape(batch, channels, frames, height // patch, patch, width // patch, patch)
    return grid.permute(0, 2, 3, 5, 1, 4, 6).reshape(batch, -1, channels * patch * patch)


def latents_from_patches(patches: Tensor, patch: int, frames: int) -> Tensor:
    """The inverse of `patches_from_latents` for square pictures."""
    batch, tokens, features = patches.shape
    side, channels = round((tokens // frames) ** 0.5), features // patch**2
    grid = patches.reshape(batch, frames, side, side, channels, patch, patch)
    return grid.permute(0, 4, 1, 2, 5, 3, 6).reshape(batch, channels, frames, side * patch, side * patch)


def rotations(transformer: WanTransformer3DModel, latents: tuple[int, int, int]) -> Tensor:
    """The rotary positions of latents (frames, height, width) as complex numbers, complex64 (tokens, head_dim / 2)."""
    cosines, sines = transformer.rope(torch.empty(1, transformer.config.in_channels, *latents))
    return torch.complex(cosines[0, :, 0, ::2].contiguous(), sines[0, :, 0, ::2].contiguous())


def predict(
    transformer: WanTransformer3DModel, noisy: Tensor, timesteps: Tensor, text: Tensor, turns: Tensor
) -> Tensor:
    """The transformer's output in patch space.

    Args:
        transformer: the diffusers module; gradients flow to its parameters.
        noisy: (batch, tokens, in_channels * patch * patch), float32.
        timesteps: (batch,), numbers in [0, 1000).
        text: (batch, length, text_dim), outputs of the text encoder, all of them to be attended to.
        turns: `rotations` of the transformer.

    Returns:
        Same shape and dtype as `noisy`.
    """
    embedder, patches = transformer.condition_embedder, transformer.patch_embedding
    time = embedder.time_embedder(embedder.timesteps_proj(timesteps))
    modulation = embedder.time_proj(F.silu(time)).view(len(noisy), 6, -1)
    hidden = F.linear(noisy, patches.weight.flatten(1), patches.bias)
    across = [linear for block in transformer.blocks for linear in (block.attn2.to_k, block.attn2.to_v)]
    keys_and_values = _joined(across, embedder.text_embedder(text)).chunk(len(across), dim=-1)
    for block, key, value in zip(transformer.blocks, keys_and_values[::2], keys_and_values[1::2], strict=True):
        hidden = _block(block, hidden, modulation, (key, value), turns)
    shift, scale = (transformer.scale_shift_table + time.unsqueeze(1)).chunk(2, dim=1)
    weight, bias = _channels_first(transformer.proj_out, transformer.config.in_channels)
    return F.linear(transformer.norm_out(hidden) * (1 + scale) + shift, weight, bias)


def _channels_first(projection: nn.Linear, channels: int) -> tuple[Tensor, Tensor]:
    # The module's output has channels fastest within a patch, its input has them slowest.
    weight = projection.weight.view(-1, channels, projection.in_features)
    return weight.transpose(0, 1).flatten(0, 1), projection.bias.view(-1, channels).T.flatten()


def _block(
    block: WanTransformerBlock, hidden: Tensor, modulation: Tensor, text: tuple[Tensor, Tensor], turns: Tensor
) -> Tensor:
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (block.scale_shift_table + modulation).chunk(6, dim=1)
    own, across = block.attn1, block.attn2
    normed = block.norm1(hidden) * (1 + scale) + shift
    query, key, value = _joined([own.to_q, own.to_k, own.to_v], normed).chunk(3, dim=-1)
    hidden = hidden + gate * _attention(own, query, key, value, turns)
    hidden = hidden + _attention(across, across.to_q(block.norm2(hidden)), *text)
    normed = block.norm3(hidden) * (1 + ffn_scale) + ffn_shift
    output: Tensor = hidden + ffn_gate * block.ffn(normed)
    return output


def _joined(linears: list[nn.Linear], inputs: Tensor) -> Tensor:
    # Several projections of the same inputs in one product, their outputs side by side.
    weight = torch.cat([linear.weight for linear in linears])
    bias = torch.cat([linear.bias for linear in linears])
    return F.linear(inputs, weight, bias)


def _attention(
    attention: WanAttention, query: Tensor, key: Tensor, value: Tensor, turns: Tensor | None = None
) -> Tensor:
    parts = attention.norm_q(query), attention.norm_k(key), value
    query, key, value = (part.view(*part.shape[:2], attention.heads, -1).transpose(1, 2) for part in parts)
    if turns is not None:
        query, key = _rotate(query, turns), _rotate(key, turns)
    scores = torch.matmul(query * query.shape[-1] ** -0.5, key.transpose(-1, -2))
    output = torch.matmul(scores.softmax(-1), value).transpose(1, 2).flatten(2)
    projected: Tensor = attention.to_out[0](output)
    return projected


def _rotate(states: Tensor, turns: Tensor) -> Tensor:
    pairs = torch.view_as_complex(states.reshape(*states.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns).flatten(-2)
