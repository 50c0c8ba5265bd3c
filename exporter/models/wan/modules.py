"""The graphs of Wan's transformer: modules of tensors alone, around the layers of diffusers.

They compute what diffusers' WanTransformer3DModel computes for text-to-video, rounding where it rounds: norms, their
modulation and the gates are in fp32 whatever the weights are in. It differs in how: the rotary tables, which depend on
sizes alone, are an output of `condition` and hold each angle once, where the original holds it twice.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention, WanRotaryPosEmbed, WanTransformerBlock
from torch import Tensor, nn

from ..base import mean_squared_change


class Condition(nn.Module):
    """What no step changes: text_states (B, S, C) -> text (B, S, D), rotary_cos and rotary_sin (N, head dim / 2) fp32.

    `latents` is one video's latent shape, (C, T, h, w).
    """

    def __init__(self, transformer: WanTransformer3DModel, latents: tuple[int, ...]) -> None:
        super().__init__()
        self.text_embedder = transformer.condition_embedder.text_embedder
        cos, sin = rotary_tables(transformer, latents)
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", cos, persistent=False)  # torch.onnx wants no name that an output has as well
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, text_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.text_embedder(text_states), self.cos.clone(), self.sin.clone()


class Prologue(nn.Module):
    """latents (B, C, T, h, w) fp32, timestep (B,) fp32 -> hidden (B, N, D), modulation (B, 6, D), time (B, D)."""

    def __init__(self, transformer: WanTransformer3DModel) -> None:
        super().__init__()
        embedder = transformer.condition_embedder
        self.patch_embedding = transformer.patch_embedding
        self.timesteps_proj = embedder.timesteps_proj
        self.time_embedder = embedder.time_embedder
        self.act_fn = embedder.act_fn
        self.time_proj = embedder.time_proj

    def forward(self, latents: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dtype = self.time_proj.weight.dtype
        hidden = self.patch_embedding(latents.to(dtype)).flatten(2).transpose(1, 2)
        time = self.time_embedder(self.timesteps_proj(timestep)).to(dtype)
        return hidden, self.time_proj(self.act_fn(time)).unflatten(1, (6, -1)), time


class Block(nn.Module):
    """One WanTransformerBlock.

    hidden (B, N, D), modulation (B, 6, D), cached_hidden (B, N, D), text (B, S, D), rotary_cos and rotary_sin
    (N, head dim / 2) fp32. Returns the new hidden and the mean squared change from cached_hidden, (B,) fp32.
    """

    def __init__(self, block: WanTransformerBlock) -> None:
        super().__init__()
        self.block = block

    def forward(
        self,
        hidden: Tensor,
        modulation: Tensor,
        cached_hidden: Tensor,
        text: Tensor,
        rotary_cos: Tensor,
        rotary_sin: Tensor,
    ) -> tuple[Tensor, Tensor]:
        block, dtype = self.block, hidden.dtype
        table = block.scale_shift_table + modulation.float()
        shift, scale, gate, ff_shift, ff_scale, ff_gate = table[:, :, None].unbind(1)
        normed = (block.norm1(hidden.float()) * (1 + scale) + shift).to(dtype)
        attended = attend(block.attn1, normed, normed, (rotary_cos, rotary_sin))
        new_hidden = (hidden.float() + attended * gate).to(dtype)
        normed = block.norm2(new_hidden.float()).to(dtype)
        new_hidden = new_hidden + attend(block.attn2, normed, text)
        normed = (block.norm3(new_hidden.float()) * (1 + ff_scale) + ff_shift).to(dtype)
        new_hidden = (new_hidden.float() + block.ffn(normed).float() * ff_gate).to(dtype)
        return new_hidden, mean_squared_change(new_hidden, cached_hidden)

    def reference(
        self,
        hidden: Tensor,
        modulation: Tensor,
        cached_hidden: Tensor,
        text: Tensor,
        rotary_cos: Tensor,
        rotary_sin: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The same by the original block's own forward."""
        rotary = tuple(table.repeat_interleave(2, -1)[None, :, None] for table in (rotary_cos, rotary_sin))
        new = self.block(hidden, text, modulation, rotary)
        return new, (new.double() - cached_hidden.double()).square().mean((1, 2)).float()


class Epilogue(nn.Module):
    """hidden (B, N, D), time (B, D) -> model_output (B, C, T, h, w) fp32."""

    def __init__(self, transformer: WanTransformer3DModel, latents: tuple[int, ...]) -> None:
        super().__init__()
        self.norm_out = transformer.norm_out
        self.scale_shift_table = transformer.scale_shift_table
        self.proj_out = transformer.proj_out
        _, high, wide = transformer.config.patch_size
        _, self.frames, height, width = latents
        self.grid = (height // high, width // wide)
        self.patch = (high, wide)

    def forward(self, hidden: Tensor, time: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table + time[:, None])[:, :, None].unbind(1)
        normed = (self.norm_out(hidden.float()) * (1 + scale) + shift).to(hidden.dtype)
        patches = self.proj_out(normed).view(hidden.shape[0], self.frames, *self.grid, *self.patch, -1)
        latents = patches.permute(0, 6, 1, 2, 4, 3, 5)  # (B, C, T, high, patch, wide, patch)
        output: Tensor = latents.flatten(5, 6).flatten(3, 4).float()
        return output


def attend(attn: WanAttention, states: Tensor, context: Tensor, rotary: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Attention of states (B, N, D) over context (B, S, D); queries and keys are normed over all heads at once."""
    query, key, value = attn.norm_q(attn.to_q(states)), attn.norm_k(attn.to_k(context)), attn.to_v(context)
    query, key, value = (part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in (query, key, value))
    if rotary is not None:
        query, key = rotate(query, *rotary), rotate(key, *rotary)
    attended = F.scaled_dot_product_attention(query, key, value)
    return attn.to_out[0](attended.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of neighbouring channels of states (B, heads, N, head dim) by its angle, in fp32.

    The tables are (N, head dim / 2), an angle a pair.
    """
    real, imaginary = states.float().unflatten(-1, (-1, 2)).unbind(-1)  # type: ignore[no-untyped-call]
    turned = torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], -1)
    return turned.flatten(-2).to(states.dtype)


def rotary_tables(transformer: WanTransformer3DModel, latents: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every token's angles, each (N, head dim / 2) fp32.

    Made anew: the transformer's own tables have been rounded to the dtype of its weights.
    """
    config = transformer.config
    rope = WanRotaryPosEmbed(config.attention_head_dim, config.patch_size, config.rope_max_seq_len)
    cos, sin = rope(torch.empty(1, *latents))
    return cos[0, :, 0, 0::2].contiguous(), sin[0, :, 0, 1::2].contiguous()


def keep_in_fp32(transformer: WanTransformer3DModel) -> None:
    """Keep the parameters in fp32 that diffusers keeps there, whatever the dtype of the others."""
    kept = transformer._keep_in_fp32_modules
    for name, parameter in transformer.named_parameters():
        if any(part in name for part in kept):
            parameter.data = parameter.data.float()
