"""CogVideoX: blocks over two streams, the video's tokens (rows, tokens, dim) and the text's (rows, text, dim)."""

from __future__ import annotations

from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel

from ....engines.errors import CheckpointError
from ....engines.manifest import Dtype, Shape, Text
from ...checkpoint import Checkpoint
from ...sampler import scheduler_from_checkpoint
from ..base import ExportRequest, Input, PartPlan, Split, float_spec, require_equal, untrained
from ..parts import (
    VAE_ENCODER,
    StepTensors,
    block_plans,
    epilogue_plan,
    pixels_per_latent,
    prologue_plan,
    ranges_of,
    require_multiples,
    sole_part,
    without_values,
)
from ..t5 import TOKENIZER, UNNEEDED, load_encoder, text_encoder_plan, tokenizer_json
from .modules import Block, Condition, Epilogue, Prologue
from .vae import check_vae, count_latent_frames, decoder_stage

TABLES = ("patch_embed.pos_embedding",)  # constants, which diffusers computes anew as well


def split(checkpoint: Checkpoint, request: ExportRequest) -> Split:
    """Take a CogVideoXPipeline checkpoint apart. Raises CheckpointError, InvalidRequest."""
    components = {
        "transformer": "CogVideoXTransformer3DModel",
        "text_encoder": "T5EncoderModel",
        "vae": "AutoencoderKLCogVideoX",
    }
    checkpoint.require_pipeline("CogVideoXPipeline", components)
    request.refuse_presets("CogVideoX")
    transformer = without_values(
        lambda: CogVideoXTransformer3DModel.from_config(checkpoint.config("transformer")), request.dtype
    )
    vae = without_values(lambda: AutoencoderKLCogVideoX.from_config(checkpoint.config("vae")), request.dtype_of("vae"))
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
    tensors = _Tensors(transformer, shape, request.dtype)
    max_tokens = int(config.max_text_seq_length)
    return Split(
        shape=shape,
        ranges=ranges_of(shape, text=max_tokens, tokens=tensors.tokens),
        streams=("hidden", "text"),
        guidance_order="negative_first",
        text_encoder=text_encoder_plan(encoder, request.dtype, max_tokens, masked=False),
        condition=_condition(Condition(transformer, shape.latents), tensors),
        prologue=prologue_plan(
            Prologue(transformer, shape.latents),
            tensors,
            (tensors.embedding,),
            tensors.rows_of_text,
            {"proj.": "patch_embed.proj.", "time_embedding.": "time_embedding."},
        ),
        blocks=_blocks(transformer, tensors),
        epilogue=epilogue_plan(Epilogue(transformer, shape.latents), tensors),
        decoder=(decoder_stage(vae, shape, request.dtype_of("vae")),),
        text=Text(tokenizer=TOKENIZER, max_tokens=max_tokens, pad_id=0, cleaning="none", padded=True),
        tokenizer=lambda: tokenizer_json(checkpoint),
        scheduler=lambda: scheduler_from_checkpoint(checkpoint),
        cautions=_cautions(transformer, vae, shape),
        unneeded={"text_encoder": UNNEEDED, "transformer": TABLES, "vae": VAE_ENCODER},
    )


def check_config(checkpoint: Checkpoint, transformer: CogVideoXTransformer3DModel) -> None:
    """Refuse what the modules do not compute: CogVideoX 1.5 and image-to-video. Raises CheckpointError."""
    for name, expected in (
        ("patch_size_t", None),
        ("ofs_embed_dim", None),
        ("use_learned_positional_embeddings", False),
    ):
        got = transformer.config[name]
        if got != expected:
            raise CheckpointError(
                f"checkpoint {checkpoint.name}: transformer {name} is {got!r}, expected {expected!r}; CogVideoX 1.5 "
                "and image-to-video models cannot be exported, choose a text-to-video model of CogVideoX 1.0"
            )


def _shape(transformer: CogVideoXTransformer3DModel, vae: AutoencoderKLCogVideoX, request: ExportRequest) -> Shape:
    config = transformer.config
    scale = pixels_per_latent(vae)
    height = request.height or config.sample_height * scale
    width = request.width or config.sample_width * scale
    frames = request.frames or config.sample_frames
    require_multiples(scale * config.patch_size, height=height, width=width)
    latent_frames = count_latent_frames(frames, vae.config.temporal_compression_ratio)
    return Shape(
        height=height,
        width=width,
        frames=frames,
        latents=(latent_frames, config.in_channels, height // scale, width // scale),
        max_batch=request.max_batch,
    )


def _cautions(transformer: CogVideoXTransformer3DModel, vae: AutoencoderKLCogVideoX, shape: Shape) -> tuple[str, ...]:
    config, scale = transformer.config, pixels_per_latent(vae)
    return (
        *untrained("height", shape.height, config.sample_height * scale),
        *untrained("width", shape.width, config.sample_width * scale),
        *untrained("frames", shape.frames, config.sample_frames),
    )


class _Tensors(StepTensors):
    """With two streams, and what the prologue and the blocks read that no step changes."""

    def __init__(self, transformer: CogVideoXTransformer3DModel, shape: Shape, dtype: Dtype) -> None:
        config = transformer.config
        dim = config.num_attention_heads * config.attention_head_dim
        frames, _, height, width = shape.latents
        tokens = frames * (height // config.patch_size) * (width // config.patch_size)
        streams = {"hidden": ("tokens", dim), "text": ("text", dim)}
        super().__init__(shape, dtype, tokens, config.time_embed_dim, streams)
        self.states = Input(float_spec("text_states", dtype, "batch", "text", config.text_embed_dim))
        self.embedding = Input(float_spec("text_embedding", dtype, "batch", "text", dim))
        self.rotary = tuple(
            Input(float_spec(name, "fp32", "tokens", config.attention_head_dim))
            for name in ("rotary_cos", "rotary_sin")
            if config.use_rotary_positional_embeddings
        )

    @property
    def rows_of_text(self) -> tuple[dict[str, int], ...]:
        """Sizes to check parts with that see a whole video, and a text of any length."""
        return tuple({"batch": rows, "text": text, "tokens": self.tokens} for rows, text in ((1, 5), (2, 7)))


def _condition(module: Condition, tensors: _Tensors) -> PartPlan:
    return sole_part(
        "condition",
        module,
        inputs=(tensors.states,),
        outputs=(tensors.embedding.spec, *(table.spec for table in tensors.rotary)),
        check_sizes=tensors.rows_of_text,
        prefixes={"text_proj.": "patch_embed.text_proj."},
    )


def _blocks(transformer: CogVideoXTransformer3DModel, tensors: _Tensors) -> tuple[PartPlan, ...]:
    module = Block(transformer.transformer_blocks[0])
    inputs = (*tensors.streams, tensors.time, *tensors.cached, *tensors.rotary)
    return block_plans(module, module.reference, tensors, inputs, "transformer_blocks", transformer.config.num_layers)
