"""STDiT3, the transformer of Open-Sora 1.2: pairs of a spatial and a temporal block.

Names and shapes of the weights are the original's, so a published checkpoint loads strictly. Text rows of different
length share a batch: each attends to its own tokens by a mask, where the original packs them into one sequence.

Conditioning on given frames is left out. The original computes a second set of modulations at timestep 0 and chooses
between the two by frame; for text to video its mask chooses the ordinary one everywhere, so the result is the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base import bias_from_mask
from .config import STDiT3Config

NORM_EPS = 1e-6
FREQUENCIES = 256  # width of the sinusoids that timestep and fps are embedded by


class RMSNorm(nn.Module):
    """Over the last dimension, with fp32 statistics; the weight multiplies after the cast back."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, states: Tensor) -> Tensor:
        wide = states.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + NORM_EPS)
        return self.weight * normed.to(states.dtype)


class SelfAttention(nn.Module):
    """Within each frame, or with a rotation across frames at each position; hidden (B, T, S, D).

    Queries and keys are normalised, then rotated by (cosine, sine), (T, head dim) each.
    """

    def __init__(self, config: STDiT3Config) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.q_norm = RMSNorm(config.head_dim)
        self.k_norm = RMSNorm(config.head_dim)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor, rotation: tuple[Tensor, Tensor] | None = None) -> Tensor:
        rows, frames, tokens, _ = hidden.shape
        query, key, value = self.qkv(hidden).unflatten(-1, (3, self.heads, -1)).unbind(3)
        query, key = self.q_norm(query), self.k_norm(key)
        # to (rows x outer, heads, inner, head dim), attending over inner: tokens of a frame, or frames at a position
        order = (0, 1, 3, 2, 4) if rotation is None else (0, 2, 3, 1, 4)
        query, key, value = (states.permute(order).flatten(0, 1) for states in (query, key, value))
        if rotation is not None:
            query, key = rotate(query, *rotation), rotate(key, *rotation)
        mixed = F.scaled_dot_product_attention(query, key, value)
        inverse = (0, 1, 3, 2, 4) if rotation is None else (0, 3, 1, 2, 4)
        mixed = mixed.view(rows, -1, *mixed.shape[1:]).permute(inverse).reshape(rows, frames, tokens, -1)
        return self.proj(mixed)  # type: ignore[no-any-return]


class CrossAttention(nn.Module):
    """hidden (B, T, S, D) attends to text (B, L, D); text_bias (B, 1, 1, L) is added to the scores."""

    def __init__(self, config: STDiT3Config) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.q_linear = nn.Linear(config.hidden_size, config.hidden_size)
        self.kv_linear = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor, text: Tensor, text_bias: Tensor) -> Tensor:
        query = self.q_linear(hidden).flatten(1, 2).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = self.kv_linear(text).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        # ONNX's Attention does not broadcast the mask over queries in every runtime, so it is expanded here
        bias = text_bias.expand(-1, -1, query.shape[2], -1)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.proj(mixed.transpose(1, 2).reshape(hidden.shape))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    """Linear, GELU (tanh), Linear."""

    def __init__(self, width_in: int, width: int, width_out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width_in, width)
        self.fc2 = nn.Linear(width, width_out)

    def forward(self, states: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(states), approximate="tanh"))  # type: ignore[no-any-return]


class STDiT3Block(nn.Module):
    """Self-attention, cross-attention and MLP; the first and the last modulated and gated, the second neither.

    hidden (B, T, S, D); modulation (B, 6, D); text (B, L, D); text_bias (B, 1, 1, L). Spatial without, temporal with a
    rotation, as in SelfAttention. Returns the new hidden.
    """

    def __init__(self, config: STDiT3Config) -> None:
        super().__init__()
        dim = config.hidden_size
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / math.sqrt(dim))
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS, elementwise_affine=False)
        self.attn = SelfAttention(config)
        self.cross_attn = CrossAttention(config)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS, elementwise_affine=False)
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio), dim)

    def forward(
        self,
        hidden: Tensor,
        modulation: Tensor,
        text: Tensor,
        text_bias: Tensor,
        rotation: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        table = self.scale_shift_table + modulation
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = table[:, :, None, None].unbind(1)
        normed = self.norm1(hidden) * (1 + scale_msa) + shift_msa
        hidden = hidden + gate_msa * self.attn(normed, rotation)
        hidden = hidden + self.cross_attn(hidden, text, text_bias)
        normed = self.norm2(hidden) * (1 + scale_mlp) + shift_mlp
        return hidden + gate_mlp * self.mlp(normed)  # type: ignore[no-any-return]


class PatchEmbed(nn.Module):
    """latents (B, C, T, h, w), filled up with zeros to whole patches -> (B, T, S, D), columns fastest."""

    def __init__(self, config: STDiT3Config) -> None:
        super().__init__()
        self.proj = nn.Conv3d(config.in_channels, config.hidden_size, config.patch_size, config.patch_size)

    def forward(self, latents: Tensor) -> Tensor:
        _, patch_height, patch_width = self.proj.kernel_size
        below, right = -latents.shape[3] % patch_height, -latents.shape[4] % patch_width
        return self.proj(F.pad(latents, (0, right, 0, below))).flatten(3).permute(0, 2, 3, 1)  # type: ignore[no-any-return]


class ScalarEmbed(nn.Module):
    """numbers (B,) -> (B, D): a sinusoid, then an MLP."""

    def __init__(self, config: STDiT3Config) -> None:
        super().__init__()
        dim = config.hidden_size
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, numbers: Tensor) -> Tensor:
        return self.mlp(sinusoid(numbers).to(next(self.parameters()).dtype))  # type: ignore[no-any-return]


class CaptionEmbed(nn.Module):
    """text (B, L, C) -> (B, L, D); rows with unconditional (B,) != 0 get the trained empty prompt instead."""

    def __init__(self, config: STDiT3Config) -> None:
        super().__init__()
        null = torch.randn(config.model_max_length, config.caption_channels) / math.sqrt(config.caption_channels)
        self.y_embedding = nn.Parameter(null, requires_grad=False)  # a buffer in the original, drawn once
        self.y_proj = Mlp(config.caption_channels, config.hidden_size, config.hidden_size)

    def forward(self, text: Tensor, unconditional: Tensor | None = None) -> Tensor:
        if unconditional is not None:
            # rows by their numbers: a slice would tie the graph to its length
            rows = torch.arange(text.shape[1], device=text.device)
            null = self.y_embedding.index_select(0, rows).to(text.dtype)
            text = torch.where((unconditional != 0)[:, None, None], null, text)
        return self.y_proj(text)  # type: ignore[no-any-return]


class RotaryFrequencies(nn.Module):
    """The frequencies of the temporal blocks' rotary positions: constants, but stored among the weights."""

    def __init__(self, config: STDiT3Config) -> None:
        super().__init__()
        self.freqs = nn.Parameter(rotary_frequencies(config.head_dim), requires_grad=False)


class FinalLayer(nn.Module):
    """hidden (B, T, S, D), time (B, D) -> patches (B, T, S, rows · columns · channels), channels fastest."""

    def __init__(self, config: STDiT3Config) -> None:
        super().__init__()
        dim = config.hidden_size
        self.norm_final = nn.LayerNorm(dim, eps=NORM_EPS, elementwise_affine=False)
        self.linear = nn.Linear(dim, math.prod(config.patch_size) * config.out_channels)
        self.scale_shift_table = nn.Parameter(torch.randn(2, dim) / math.sqrt(dim))

    def forward(self, hidden: Tensor, time: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table + time[:, None])[:, :, None, None].unbind(1)
        return self.linear(self.norm_final(hidden) * (1 + scale) + shift)  # type: ignore[no-any-return]


class STDiT3(nn.Module):
    """Predicts a velocity, and a variance where pred_sigma is set. See `forward`."""

    def __init__(self, config: STDiT3Config) -> None:
        super().__init__()
        self.config = config
        dim = config.hidden_size
        self.rope = RotaryFrequencies(config)
        self.x_embedder = PatchEmbed(config)
        self.t_embedder = ScalarEmbed(config)
        self.fps_embedder = ScalarEmbed(config)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.y_embedder = CaptionEmbed(config)
        self.spatial_blocks = nn.ModuleList(STDiT3Block(config) for _ in range(config.depth))
        self.temporal_blocks = nn.ModuleList(STDiT3Block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)

    @property
    def pairs(self) -> Iterator[tuple[STDiT3Block, STDiT3Block]]:
        """The blocks in the order they run in: pairs of a spatial and a temporal one."""
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            assert isinstance(spatial, STDiT3Block) and isinstance(temporal, STDiT3Block)
            yield spatial, temporal

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: Tensor,
        text_mask: Tensor,
        *,
        fps: float,
        height: float,
        width: float,
        unconditional: Tensor | None = None,
    ) -> Tensor:
        """One evaluation.

        Args:
            latents: (B, C, T, h, w).
            timestep: (B,), from 1000 (noise) down to 0.
            text: (B, L, caption channels), the text encoder's states; L of at most model_max_length.
            text_mask: (B, L), 1 at tokens and 0 at padding.
            fps: Frames per second of the video; 120 for a single image.
            height: Of the video in pixels. The positions' scale depends on it, not on the latents' size alone.
            width: As height.
            unconditional: (B,), not 0 where a row's text is the trained empty prompt, as long as its mask says.

        Returns:
            (B, C, T, h, w) fp32, with 2 C channels where pred_sigma is set: velocity first, x0 - noise.
        """
        dtype = self.x_embedder.proj.weight.dtype
        rows, _, frames, latent_height, latent_width = latents.shape
        size = self.config.patches(latent_height, latent_width)
        scale = math.sqrt(height * width) / self.config.input_sq_size
        positions = position_embedding(self.config.hidden_size, size, scale, dtype)
        hidden = self.x_embedder(latents.to(dtype)) + positions.to(latents.device)
        # the timestep is rounded, as in the original: in bf16 985.96 becomes 984
        speed = torch.full((rows,), float(fps), device=latents.device)
        time = self.t_embedder(timestep.to(dtype)) + self.fps_embedder(speed)
        modulation = self.t_block(time).unflatten(1, (6, -1))
        text = self.y_embedder(text.to(dtype), unconditional)
        text_bias = bias_from_mask(text_mask.long(), dtype)
        rotation = rotation_table(self.rope.freqs, frames)
        for spatial, temporal in self.pairs:
            hidden = spatial(hidden, modulation, text, text_bias)
            hidden = temporal(hidden, modulation, text, text_bias, rotation)
        output = latents_from_patches(self.final_layer(hidden, time), size, self.config.patch_size[1:])
        return output[..., :latent_height, :latent_width].float()


def sinusoid(numbers: Tensor) -> Tensor:
    """Numbers (B,) -> (B, 256) fp32: the cosines of 128 frequencies from 1 down to 1/10000, then their sines."""
    half = FREQUENCIES // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=numbers.device) / half)
    angles = numbers.float()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=1)


def position_embedding(dim: int, size: tuple[int, int], scale: float, dtype: torch.dtype) -> Tensor:
    """Where each of rows x columns patches lies, (rows · columns, dim): half of it from the column, then the row.

    Coordinates are divided by `scale`, and stretched to as many steps a side as a square of as many patches has. The
    frequencies are rounded to `dtype` before use, as in a model converted to it.
    """
    rows, columns = size
    side = round(math.sqrt(rows * columns))
    exponents = torch.arange(0, dim // 2, 2, dtype=torch.float32) / (dim // 2)
    frequencies = (1 / 10000**exponents).to(dtype).float()
    row, column = (
        torch.outer(torch.arange(count, dtype=torch.float32) / scale * side / count, frequencies)
        for count in (rows, columns)
    )
    row, column = (torch.cat((angles.sin(), angles.cos()), dim=1) for angles in (row, column))
    grid = (column.expand(rows, -1, -1), row[:, None].expand(-1, columns, -1))
    return torch.cat(grid, dim=-1).flatten(0, 1).to(dtype)


def rotary_frequencies(head_dim: int) -> Tensor:
    """Radians a frame of each pair of channels, (head_dim / 2,) fp32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    return 1 / 10000**exponents


def rotation_table(frequencies: Tensor, frames: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every frame's angles, (frames, head dim) each, both channels of a pair the same."""
    positions = torch.arange(frames, dtype=frequencies.dtype, device=frequencies.device)
    angles = torch.outer(positions, frequencies).repeat_interleave(2, dim=1)
    return angles.cos(), angles.sin()


def rotate(states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate each pair of neighbouring channels: (a, b) -> (a cos - b sin, b cos + a sin)."""
    first, second = torch.unflatten(states, -1, (-1, 2)).unbind(-1)
    turned = torch.stack((-second, first), dim=-1).flatten(-2)
    return states * cosine + turned * sine


def latents_from_patches(patches: Tensor, size: tuple[int, int], patch: tuple[int, int]) -> Tensor:
    """Patches (B, T, rows · columns, patch rows · patch columns · C) -> (B, C, T, height, width), with its padding."""
    rows, frames = patches.shape[:2]
    grid = patches.reshape(rows, frames, *size, *patch, -1)
    return grid.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)
