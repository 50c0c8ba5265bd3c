"""The text side of the demo models: one tokenizer and one small T5 encoder, which `demo.models.latte` trains.

The other models take both, frozen, from the finished Latte checkpoint, as the real models take a finished T5.
"""

from __future__ import annotations

from pathlib import Path

from transformers import T5Config, T5EncoderModel, T5Tokenizer

from demo import shapes

WIDTH = 64
TRAINED = Path(__file__).parent / "latte"
"""The checkpoint that holds the trained encoder."""


def make_tokenizer() -> T5Tokenizer:
    """T5 tokenizer whose pieces are the whole words of the captions; all else becomes `<unk>`."""
    words = sorted({word for combination in shapes.combinations() for word in combination.caption.split()})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return T5Tokenizer(vocab=pieces + [(f"▁{word}", -1.0) for word in words], extra_ids=0)


def make_text_encoder(vocab_size: int) -> T5EncoderModel:
    """T5 encoder of two layers, float32, untrained."""
    return T5EncoderModel(
        T5Config(
            vocab_size=vocab_size,
            d_model=WIDTH,
            d_kv=16,
            d_ff=4 * WIDTH,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
        )
    )


def load_tokenizer() -> T5Tokenizer:
    """The tokenizer of the finished Latte checkpoint."""
    return T5Tokenizer.from_pretrained(TRAINED / "tokenizer")


def load_text_encoder() -> T5EncoderModel:
    """The trained encoder, float32 and frozen."""
    encoder: T5EncoderModel = T5EncoderModel.from_pretrained(TRAINED / "text_encoder")
    return encoder.eval().requires_grad_(False)
