"""The graphs of CogVideoX's transformer: modules of tensors alone, around the layers of diffusers.

They compute what diffusers' CogVideoXTransformer3DModel computes, with three differences in how. The rotary
turn of queries and keys covers the text too, as a turn by nothing, so that no part of them is cut out or written back
into. The feed-forward layers see the two streams one after the other, where the original joins them and cuts them
apart again. And what depends on sizes alone, the rotary tables, is an output of `condition`, not part of every block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import get_3d_rotary_pos_embed, get_3d_sincos_pos_embed
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from torch import Tensor, nn

from ..base import mean_squared_change


class Condition(nn.Module):
    """What no step changes: text_states (B, S, C) -> text_embedding (B, S, D).

    Models with rotary positions also get rotary_cos and rotary_sin, (N, head dim) fp32: they depend on the sizes
    alone. `latents` is one video's latent shape, (T, C, h, w).
    """

    def __init__(self, transformer: CogVideoXTransformer3DModel, latents: tuple[int, ...]) -> None:
        super().__init__()
        self.text_proj = transformer.patch_embed.text_proj
        self.rotary = bool(transformer.config.use_rotary_positional_embeddings)
        if self.rotary:
            cos, sin = rotary_tables(transformer, latents)
            self.cos: Tensor
            self.sin: Tensor
            self.register_buffer("cos", cos, persistent=False)  # torch.onnx wants no name that an output has as well
            self.register_buffer("sin", sin, persistent=False)

    def forward(self, text_states: Tensor) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        text = self.text_proj(text_states)
        return (text, self.cos.clone(), self.sin.clone()) if self.rotary else text


class Prologue(nn.Module):
    """latents (B, T, C, h, w) fp32, timestep (B,) fp32, text_embedding (B, S, D) -> the streams and time (B, E).

    The streams are hidden (B, N, D) and text (B, S, D). Models without rotary positions add sinusoidal ones here, to
    the video only, rounded to the model's dtype as CogVideoXPatchEmbed rounds them.
    """

    def __init__(self, transformer: CogVideoXTransformer3DModel, latents: tuple[int, ...]) -> None:
        super().__init__()
        self.proj = transformer.patch_embed.proj
        self.time_proj = transformer.time_proj
        self.time_embedding = transformer.time_embedding
        positions = None
        if not transformer.config.use_rotary_positional_embeddings:
            positions = sincos_table(transformer, latents).to(self.proj.weight.dtype)
        self.positions: Tensor | None
        self.register_buffer("positions", positions, persistent=False)

    def forward(self, latents: Tensor, timestep: Tensor, text_embedding: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dtype = self.proj.weight.dtype
        patches = self.proj(latents.to(dtype).flatten(0, 1))  # (B x T, D, high, wide)
        hidden = patches.flatten(2).transpose(1, 2).unflatten(0, latents.shape[:2]).flatten(1, 2)
        if self.positions is not None:
            hidden = hidden + self.positions
        # a copy, because torch.onnx renames an input that is also an output
        return hidden, text_embedding.clone(), self.time_embedding(self.time_proj(timestep).to(dtype))


class Block(nn.Module):
    """One CogVideoXBlock.

    hidden (B, N, D), text (B, S, D), time (B, E), cached_hidden and cached_text as hidden and text; rotary_cos and
    rotary_sin (N, head dim) fp32 for models with rotary positions only. Returns the new hidden and text, and the mean
    squared change of both from what was cached, (B,) fp32.
    """

    def __init__(self, block: CogVideoXBlock) -> None:
        super().__init__()
        self.block = block

    def forward(
        self,
        hidden: Tensor,
        text: Tensor,
        time: Tensor,
        cached_hidden: Tensor,
        cached_text: Tensor,
        rotary_cos: Tensor | None = None,
        rotary_sin: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        block, length = self.block, text.shape[1]
        rotary = None
        if rotary_cos is not None and rotary_sin is not None:
            # in front of the video's, the text's angles: 0 everywhere
            rotary = (F.pad(rotary_cos, (0, 0, length, 0), value=1.0), F.pad(rotary_sin, (0, 0, length, 0)))
        normed, normed_text, gate, text_gate = block.norm1(hidden, text, time)
        states = attend(block.attn1, torch.cat([normed_text, normed], 1), rotary)
        new_hidden = hidden + gate * states[:, length:]
        new_text = text + text_gate * states[:, :length]
        normed, normed_text, gate, text_gate = block.norm2(new_hidden, new_text, time)
        new_hidden = new_hidden + gate * block.ff(normed)
        new_text = new_text + text_gate * block.ff(normed_text)
        return new_hidden, new_text, change_of_both(new_hidden, cached_hidden, new_text, cached_text)

    def reference(
        self,
        hidden: Tensor,
        text: Tensor,
        time: Tensor,
        cached_hidden: Tensor,
        cached_text: Tensor,
        rotary_cos: Tensor | None = None,
        rotary_sin: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same by the original block's own forward."""
        rotary = None if rotary_cos is None else (rotary_cos, rotary_sin)
        new_hidden, new_text = self.block(hidden, text, time, rotary)
        change = torch.cat([new_text.double() - cached_text.double(), new_hidden.double() - cached_hidden.double()], 1)
        return new_hidden, new_text, change.square().mean((1, 2)).float()


class Epilogue(nn.Module):
    """hidden (B, N, D), time (B, E) -> model_output (B, T, C, h, w) fp32; the text is not needed any more."""

    def __init__(self, transformer: CogVideoXTransformer3DModel, latents: tuple[int, ...]) -> None:
        super().__init__()
        self.norm_final = transformer.norm_final
        self.norm_out = transformer.norm_out
        self.proj_out = transformer.proj_out
        self.patch = transformer.config.patch_size
        self.frames, _, self.height, self.width = latents

    def forward(self, hidden: Tensor, time: Tensor) -> Tensor:
        patches = self.proj_out(self.norm_out(self.norm_final(hidden), temb=time))
        high, wide = self.height // self.patch, self.width // self.patch
        patches = patches.view(hidden.shape[0], self.frames, high, wide, -1, self.patch, self.patch)
        latents = patches.permute(0, 1, 4, 2, 5, 3, 6)  # (B, T, C, high, patch, wide, patch)
        output: Tensor = latents.flatten(5, 6).flatten(3, 4).float()
        return output


def attend(attn: Attention, states: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
    """Self-attention over text and video at once, as CogVideoXAttnProcessor2_0; states (B, S + N, D), as returned."""
    query, key, value = (
        project(states).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for project in (attn.to_q, attn.to_k, attn.to_v)
    )
    if attn.norm_q is not None:
        query, key = attn.norm_q(query), attn.norm_k(key)
    if rotary is not None:
        query, key = rotate(query, *rotary), rotate(key, *rotary)
    attended = F.scaled_dot_product_attention(query, key, value)
    return attn.to_out[0](attended.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of neighbouring channels by its angle, in fp32.

    states (B, heads, N, head dim), and the tables (N, head dim) with each angle twice.
    """
    real, imaginary = states.float().unflatten(-1, (-1, 2)).unbind(-1)  # type: ignore[no-untyped-call]
    turned = torch.stack([-imaginary, real], -1).flatten(-2)
    return (states.float() * cos + turned * sin).to(states.dtype)


def change_of_both(hidden: Tensor, cached_hidden: Tensor, text: Tensor, cached_text: Tensor) -> Tensor:
    """Mean of the squared changes over the elements of both streams, (B,) fp32: each counts for its share of tokens."""
    tokens, length = hidden.shape[1], text.shape[1]
    changes = mean_squared_change(hidden, cached_hidden) * tokens + mean_squared_change(text, cached_text) * length
    return changes / (tokens + length)


def rotary_tables(transformer: CogVideoXTransformer3DModel, latents: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every token's angles, each (N, head dim) fp32, as CogVideoXPipeline makes them."""
    config = transformer.config
    frames, _, height, width = latents
    grid = (height // config.patch_size, width // config.patch_size)
    base = (config.sample_width // config.patch_size, config.sample_height // config.patch_size)
    cos, sin = get_3d_rotary_pos_embed(
        embed_dim=config.attention_head_dim,
        crops_coords=get_resize_crop_region_for_grid(grid, *base),
        grid_size=grid,
        temporal_size=frames,
    )
    return cos, sin


def sincos_table(transformer: CogVideoXTransformer3DModel, latents: tuple[int, ...]) -> Tensor:
    """Every token's position embedding, (N, D) fp64, as CogVideoXPatchEmbed makes it for any size."""
    config = transformer.config
    frames, _, height, width = latents
    table: Tensor = get_3d_sincos_pos_embed(
        config.num_attention_heads * config.attention_head_dim,
        (width // config.patch_size, height // config.patch_size),
        frames,
        config.spatial_interpolation_scale,
        config.temporal_interpolation_scale,
    )
    return table.flatten(0, 1)
