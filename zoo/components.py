"""What the checkpoints of several families have in common: T5 and its tokenizer, the index, blocks of autoencoders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.base import Config, Original, Step

if TYPE_CHECKING:
    from foresight.engines.manifest import Manifest

T5_XXL: Config = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_heads": 64,
    "num_layers": 24,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
TINY_T5: Config = {
    "vocab_size": 128,
    "d_model": 32,
    "d_kv": 8,
    "num_heads": 4,
    "d_ff": 64,
    "num_layers": 2,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
WORDS = ["a", "red", "blue", "circle", "square", "moving", "right", "left", "dog", "in", "the", "snow"]
IMAGE_BLOCKS = ("DownEncoderBlock2D", "UpDecoderBlock2D")
# TensorRT-RTX has no fused attention in fp32 for narrower heads.
FUSED_HEAD_DIM = 16


def write_text(folder: Path, config: Config, encoder: str = "T5EncoderModel") -> None:
    """Write a random encoder of that configuration and class of transformers, and a tokenizer."""
    import transformers
    from transformers import T5Tokenizer

    made = getattr(transformers, encoder)
    made(made.config_class(**config)).save_pretrained(folder / "text_encoder")
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -10.0)]
    pieces += [(f"▁{word}", -1.0) for word in WORDS] + [(letter, -8.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    T5Tokenizer(vocab=pieces, extra_ids=0).save_pretrained(folder / "tokenizer")


def pipeline_index(pipeline: str, transformer: str, vae: str, text_encoder: str = "T5EncoderModel") -> Config:
    """The `model_index.json` of a diffusers pipeline, as far as an export reads it of a published one."""
    return {
        "_class_name": pipeline,
        "text_encoder": ["transformers", text_encoder],
        "transformer": ["diffusers", transformer],
        "vae": ["diffusers", vae],
    }


def write_index(folder: Path, index: Config, scheduler: str) -> None:
    """Write `model_index.json` with all components."""
    whole = index | {"tokenizer": ["transformers", "T5Tokenizer"], "scheduler": ["diffusers", scheduler]}
    (folder / "model_index.json").write_text(json.dumps(whole, indent=2))


def with_blocks(sizes: Config, down: str, up: str) -> Config:
    """An autoencoder's configuration with as many blocks each way as it has widths, unless it names them itself."""
    count = len(sizes["block_out_channels"])
    return {"down_block_types": [down] * count, "up_block_types": [up] * count} | sizes


def diffusers_module(index: Config, component: str, config: Config) -> Any:
    """What a component's config.json describes, by the class that the index names."""
    import diffusers

    return getattr(diffusers, index[component][1]).from_config(config)


def diffusers_transformer(index: Config, checkpoint: Path, manifest: Manifest) -> Any:
    """The transformer of a checkpoint, by the class that the index names, in the bundle's dtype."""
    import diffusers

    from foresight.exporter.models.base import TORCH_DTYPES

    made = getattr(diffusers, index["transformer"][1])
    return made.from_pretrained(checkpoint, subfolder="transformer", torch_dtype=TORCH_DTYPES[manifest.dtype])


def diffusers_original(index: Config, checkpoint: Path, manifest: Manifest, step: Step) -> Original:
    """A transformer that takes nothing but a step, with its weights."""
    return Original(step, diffusers_transformer(index, checkpoint, manifest), diffusers_arguments(step))


def diffusers_arguments(step: Step) -> dict[str, Any]:
    """A step as the transformers of diffusers take it."""
    return {
        "hidden_states": step.latents,
        "encoder_hidden_states": step.text,
        "timestep": step.timestep,
        "return_dict": False,
    }
