"""The text side that the families share: an encoder of T5's kind and its tokenizer."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, T5Config, T5EncoderModel, UMT5EncoderModel
from transformers.activations import NewGELUActivation

from ...engines.errors import CheckpointError
from ...engines.manifest import Dtype, TensorSpec
from ..checkpoint import Checkpoint
from ..weights import some
from .base import Input, PartPlan, draw_mask, float_spec
from .parts import sole_part, without_values

TOKENIZER = "tokenizer.json"
Encoder: TypeAlias = T5EncoderModel | UMT5EncoderModel
UNNEEDED = ("shared.weight", "decoder.*", "lm_head.weight")  # of a whole T5, of which the encoder is read


class TextEncoder(nn.Module):
    """T5: input_ids and attention_mask (B, S) int64 -> text_states (B, S, C).

    Without a mask every token attends to the padding as well, as in pipelines that pass none. With `zero_padding` the
    states of the padding are zeros, as in pipelines whose transformer reads it.
    """

    def __init__(self, encoder: Encoder, zero_padding: bool = False) -> None:
        super().__init__()
        self.encoder = encoder
        self.zero_padding = zero_padding

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        states: Tensor = self.encoder(input_ids, attention_mask).last_hidden_state
        if self.zero_padding:
            assert attention_mask is not None
            states = states * attention_mask[..., None].to(states.dtype)
        return states


def load_encoder(checkpoint: Checkpoint, dtype: Dtype, kind: type[Encoder] = T5EncoderModel) -> Encoder:
    """The checkpoint's text encoder, its parameters on the meta device and without values."""
    config = kind.config_class.from_dict(checkpoint.config("text_encoder"))
    encoder = without_values(lambda: kind(config), dtype)
    encoder.set_input_embeddings(encoder.shared)  # one tensor under two names
    keep_in_fp32(encoder)
    name_activation(encoder)
    return encoder


def name_activation(encoder: Encoder) -> None:
    """Have GELU by its name instead of by its formula, whose numbers a graph in 16 bits would round."""
    for module in encoder.modules():
        if isinstance(getattr(module, "act", None), NewGELUActivation):
            module.act = nn.GELU(approximate="tanh")


def keep_in_fp32(encoder: Encoder) -> None:
    """Keep the layers in fp32 that transformers keeps there: T5's second feed-forward matrix overflows fp16."""
    if encoder.dtype == torch.float16:
        for name, module in encoder.named_modules():
            if name.rpartition(".")[2] in (encoder._keep_in_fp32_modules or ()):
                module.float()


def text_encoder_plan(
    encoder: Encoder, dtype: Dtype, max_tokens: int, masked: bool = True, zero_padding: bool = False
) -> PartPlan:
    """The part `text_encoder` for prompts of `max_tokens`; unless `masked`, padding is attended to."""
    vocabulary = int(encoder.config.vocab_size)
    ids = Input(
        TensorSpec(name="input_ids", dtype="int64", shape=("batch", max_tokens)),
        lambda shape, generator: torch.randint(vocabulary, shape, generator=generator),
    )
    mask = Input(TensorSpec(name="attention_mask", dtype="int64", shape=("batch", max_tokens)), draw_mask)
    return sole_part(
        "text_encoder",
        TextEncoder(encoder, zero_padding),
        inputs=(ids, mask) if masked else (ids,),
        outputs=(float_spec("text_states", dtype, "batch", max_tokens, encoder.config.d_model),),
        check_sizes=({"batch": 1}, {"batch": 2}),
        component="text_encoder",
        # where both names of the one embedding are stored, and differ, transformers takes this one
        prefixes={"encoder.": "", "encoder.shared.": "encoder.embed_tokens."},
        aliases=(("encoder.embed_tokens.weight", "shared.weight"),),
    )


def tokenizer_json(checkpoint: Checkpoint) -> str:
    """The checkpoint's tokenizer in the one format that `tokenizers` reads. Raises CheckpointError."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.component_folder("tokenizer"), local_files_only=True)
        text, ids = tokenizer.backend_tokenizer.to_str(), tokenizer.get_vocab()
    except Exception as error:  # the libraries raise bare Exception, among much else
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"checkpoint {checkpoint.name}: its tokenizer cannot be read ({reason}); download it again"
        ) from error
    _check_ids(checkpoint, ids)
    return str(text)


def _check_ids(checkpoint: Checkpoint, ids: dict[str, int]) -> None:
    """Refuse tokens that the encoder has no embedding of, for which some libraries would read beyond its table."""
    size = int(checkpoint.config("text_encoder").get("vocab_size", T5Config().vocab_size))
    beyond = sorted((token for token, index in ids.items() if index >= size), key=lambda token: ids[token])
    if beyond:
        raise CheckpointError(
            f"checkpoint {checkpoint.name}: tokenizer makes {len(beyond)} tokens beyond the {size} of text_encoder "
            f"({some(beyond)}); its components do not belong together, download them again"
        )
