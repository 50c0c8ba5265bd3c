"""CogVideoX: blocks over two streams, the video's tokens (rows, tokens, dim) and the text's (rows, text, dim).

The modules compute what diffusers' CogVideoXTransformer3DModel computes, with three differences in how. The rotary
turn of queries and keys covers the text too, as a turn by nothing, so that no part of them is cut out or written back
into. The feed-forward layers see the two streams one after the other, where the original joins them and cuts them
apart again. And what depends on sizes alone, the rotary tables, is an output of `condition`, not part of every block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import get_3d_rotary_pos_embed, get_3d_sincos_pos_embed
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from torch import Tensor, nn

from ...engines.errors import CheckpointError, InvalidRequest
from ...engines.manifest import Dtype, Shape, Text
from ..checkpoint import Checkpoint
from ..sampler import scheduler_from_checkpoint
from .base import (
    TORCH_DTYPES,
    ExportRequest,
    Input,
    PartPlan,
    Split,
    draw_timestep,
    float_spec,
    mean_squared_change,
    require_equal,
    untrained,
)
from .cogvideox_vae import check_vae, count_latent_frames, decoder_stage
from .t5 import TOKENIZER, UNNEEDED, load_encoder, text_encoder_plan, tokenizer_json

TABLES = ("patch_embed.pos_embedding",)  # constants, which diffusers computes anew as well
ENCODER = ("encoder.*", "quant_conv.*")  # of the VAE


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


def check_config(checkpoint: Checkpoint, transformer: CogVideoXTransformer3DModel) -> None:
    """Refuse what the modules do not compute: CogVideoX 1.5 and image-to-video. Raises CheckpointError."""
    config = transformer.config
    for name, expected in (
        ("patch_size_t", None),
        ("ofs_embed_dim", None),
        ("use_learned_positional_embeddings", False),
    ):
        got = config[name]
        if got != expected:
            raise CheckpointError(
                f"checkpoint {checkpoint.name}: transformer {name} is {got!r}, expected {expected!r}; CogVideoX 1.5 "
                "and image-to-video models cannot be exported, choose a text-to-video model of CogVideoX 1.0"
            )


def split(checkpoint: Checkpoint, request: ExportRequest) -> Split:
    """Take a CogVideoXPipeline checkpoint apart. Raises CheckpointError, InvalidRequest."""
    components = {
        "transformer": "CogVideoXTransformer3DModel",
        "text_encoder": "T5EncoderModel",
        "vae": "AutoencoderKLCogVideoX",
    }
    checkpoint.require_pipeline("CogVideoXPipeline", components)
    request.refuse_presets("CogVideoX")
    with init_empty_weights(include_buffers=False):
        transformer = CogVideoXTransformer3DModel.from_config(checkpoint.config("transformer")).eval()
        vae = AutoencoderKLCogVideoX.from_config(checkpoint.config("vae")).eval()
    for module in (transformer, vae):
        nn.Module.to(module, TORCH_DTYPES[request.dtype])  # past diffusers' own to(), which advises on from_pretrained
    check_config(checkpoint, transformer)
    check_vae(checkpoint, vae)
    encoder = load_encoder(checkpoint, request.dtype)
    config = transformer.config
    require_equal(
        checkpoint,
        ("transformer in_channels", config.in_channels, "vae latent_channels", vae.config.latent_channels),
        ("transformer out_channels", config.out_channels, "its in_channels", config.in_channels),
        ("transformer text_embed_dim", config.text_embed_dim, "text_encoder d_model", encoder.config.d_model),
    )
    shape = _shape(transformer, vae, request)
    specs = _Specs(transformer, shape, request.dtype)
    return Split(
        shape=shape,
        ranges=_ranges(shape, specs),
        streams=("hidden", "text"),
        guidance_order="negative_first",
        text_encoder=text_encoder_plan(encoder, request.dtype, specs.text_tokens, masked=False),
        condition=_condition(transformer, encoder.config.d_model, specs),
        prologue=_prologue(transformer, specs),
        blocks=_blocks(transformer, specs),
        epilogue=_epilogue(transformer, specs),
        decoder=(decoder_stage(vae, shape, request.dtype),),
        text=Text(tokenizer=TOKENIZER, max_tokens=specs.text_tokens, pad_id=0, cleaning="none", padded=True),
        tokenizer=lambda: tokenizer_json(checkpoint),
        scheduler=lambda: scheduler_from_checkpoint(checkpoint),
        cautions=_cautions(transformer, vae, shape),
        unneeded={"text_encoder": UNNEEDED, "transformer": TABLES, "vae": ENCODER},
    )


def _shape(transformer: CogVideoXTransformer3DModel, vae: AutoencoderKLCogVideoX, request: ExportRequest) -> Shape:
    config = transformer.config
    scale = _scale(vae)
    height = request.height or config.sample_height * scale
    width = request.width or config.sample_width * scale
    frames = request.frames or config.sample_frames
    unit = scale * config.patch_size
    for name, side in (("height", height), ("width", width)):
        if side % unit:
            raise InvalidRequest(f"{name}: got {side}, expected a multiple of {unit} pixels for this checkpoint")
    latent_frames = count_latent_frames(frames, vae.config.temporal_compression_ratio)
    return Shape(
        height=height,
        width=width,
        frames=frames,
        latents=(latent_frames, config.in_channels, height // scale, width // scale),
        max_batch=request.max_batch,
    )


def _cautions(transformer: CogVideoXTransformer3DModel, vae: AutoencoderKLCogVideoX, shape: Shape) -> tuple[str, ...]:
    config, scale = transformer.config, _scale(vae)
    return (
        *untrained("height", shape.height, config.sample_height * scale),
        *untrained("width", shape.width, config.sample_width * scale),
        *untrained("frames", shape.frames, config.sample_frames),
    )


def _scale(vae: AutoencoderKLCogVideoX) -> int:
    """Pixels along the side of a latent."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


class _Specs:
    """The tensors that several parts share."""

    def __init__(self, transformer: CogVideoXTransformer3DModel, shape: Shape, dtype: Dtype) -> None:
        config = transformer.config
        dim = config.num_attention_heads * config.attention_head_dim
        frames, _, height, width = shape.latents
        self.shape = shape
        self.dtype: Dtype = dtype
        self.tokens = frames * (height // config.patch_size) * (width // config.patch_size)
        self.text_tokens = int(config.max_text_seq_length)
        self.latents = Input(float_spec("latents", "fp32", "batch", *shape.latents))
        self.timestep = Input(float_spec("timestep", "fp32", "batch"), draw_timestep)
        self.embedding = Input(float_spec("text_embedding", dtype, "batch", "text", dim))
        self.hidden, self.cached_hidden, self.new_hidden = (
            Input(float_spec(f"{state}hidden", dtype, "batch", "tokens", dim)) for state in ("", "cached_", "new_")
        )
        self.text, self.cached_text, self.new_text = (
            Input(float_spec(f"{state}text", dtype, "batch", "text", dim)) for state in ("", "cached_", "new_")
        )
        self.time = Input(float_spec("time", dtype, "batch", config.time_embed_dim))
        self.rotary = tuple(
            Input(float_spec(name, "fp32", "tokens", config.attention_head_dim))
            for name in ("rotary_cos", "rotary_sin")
            if config.use_rotary_positional_embeddings
        )
        self.distance = float_spec("distance", "fp32", "batch")
        self.model_output = float_spec("model_output", "fp32", "batch", *shape.latents)


def _ranges(shape: Shape, specs: _Specs) -> dict[str, tuple[int, int]]:
    fixed = {
        "text": specs.text_tokens,
        "tokens": specs.tokens,
        "latent_height": shape.latents[2],
        "latent_width": shape.latents[3],
        "height": shape.height,
        "width": shape.width,
    }
    return {"batch": (1, 2 * shape.max_batch)} | {name: (size, size) for name, size in fixed.items()}


def _condition(transformer: CogVideoXTransformer3DModel, width: int, specs: _Specs) -> PartPlan:
    module = Condition(transformer, specs.shape.latents)
    return PartPlan(
        name="condition",
        kind="condition",
        module=module,
        component="transformer",
        prefixes={"text_proj.": "patch_embed.text_proj."},
        inputs=(Input(float_spec("text_states", specs.dtype, "batch", "text", width)),),
        outputs=(specs.embedding.spec, *(table.spec for table in specs.rotary)),
        reference=module.forward,
        check_sizes=tuple({"batch": rows, "text": text, "tokens": specs.tokens} for rows, text in ((1, 5), (2, 7))),
    )


def _prologue(transformer: CogVideoXTransformer3DModel, specs: _Specs) -> PartPlan:
    module = Prologue(transformer, specs.shape.latents)
    return PartPlan(
        name="prologue",
        kind="prologue",
        module=module,
        component="transformer",
        prefixes={"proj.": "patch_embed.proj.", "time_embedding.": "time_embedding."},
        inputs=(specs.latents, specs.timestep, specs.embedding),
        outputs=(specs.hidden.spec, specs.text.spec, specs.time.spec),
        reference=module.forward,
        check_sizes=tuple({"batch": rows, "text": text, "tokens": specs.tokens} for rows, text in ((1, 5), (2, 7))),
    )


def _blocks(transformer: CogVideoXTransformer3DModel, specs: _Specs) -> tuple[PartPlan, ...]:
    module = Block(transformer.transformer_blocks[0])
    return tuple(
        PartPlan(
            name=f"block.{index:03d}",
            kind="block",
            module=module,
            component="transformer",
            prefixes={"block.": f"transformer_blocks.{index}."},
            inputs=(
                specs.hidden,
                specs.text,
                specs.time,
                specs.cached_hidden,
                specs.cached_text,
                *specs.rotary,
            ),
            outputs=(specs.new_hidden.spec, specs.new_text.spec, specs.distance),
            reference=module.reference,
            check_sizes=({"batch": 1, "text": 5, "tokens": 12}, {"batch": 2, "text": 7, "tokens": 10}),
        )
        for index in range(transformer.config.num_layers)
    )


def _epilogue(transformer: CogVideoXTransformer3DModel, specs: _Specs) -> PartPlan:
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
        check_sizes=tuple({"batch": rows, "tokens": specs.tokens} for rows in (1, 2)),
    )
