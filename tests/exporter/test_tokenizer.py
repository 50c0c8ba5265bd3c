"""The tokenizer of a checkpoint that holds a SentencePiece model alone, as published T5 checkpoints do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import sentencepiece

from foresight.engines.errors import CheckpointError
from foresight.exporter.checkpoint import Checkpoint
from foresight.exporter.models import split_checkpoint
from foresight.exporter.models.base import ExportRequest
from foresight.runtime.text import Tokenizer

CAPTIONS = [
    f"a {colour} {shape} moving {direction} in the snow"
    for colour in ("red", "green", "blue", "white")
    for shape in ("circle", "square", "triangle")
    for direction in ("left", "right", "up", "down")
]


@pytest.fixture
def sentencepiece_only(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of a checkpoint whose tokenizer folder holds `spiece.model` and its settings, and no tokenizer.json."""
    copied = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, copied)
    shutil.rmtree(copied / "tokenizer")
    (copied / "tokenizer").mkdir()
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(CAPTIONS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(tmp_path / "spiece"),
        vocab_size=32,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    shutil.copy(tmp_path / "spiece.model", copied / "tokenizer")
    settings = '{"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "pad_token": "<pad>", "eos_token": "</s>"}'
    (copied / "tokenizer" / "tokenizer_config.json").write_text(settings)
    return copied


def test_tokens_that_the_encoder_has_no_embedding_of_are_refused(sentencepiece_only: Path) -> None:
    path = sentencepiece_only / "text_encoder/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 30}))
    split = split_checkpoint("latte", Checkpoint("published", sentencepiece_only), ExportRequest())
    with pytest.raises(CheckpointError, match=r"tokenizer makes 2 tokens beyond the 30 of text_encoder"):
        split.tokenizer()


def test_its_tokens_are_those_of_sentencepiece(sentencepiece_only: Path, tmp_path: Path) -> None:
    split = split_checkpoint("latte", Checkpoint("published", sentencepiece_only), ExportRequest())
    written = tmp_path / "tokenizer.json"
    written.write_text(split.tokenizer(), encoding="utf-8")
    model = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_only / "tokenizer" / "spiece.model"))
    tokens = Tokenizer(written, split.text).encode(CAPTIONS)
    for ids, length, caption in zip(tokens.ids, tokens.lengths, CAPTIONS, strict=True):
        assert ids[:length].tolist() == [*model.encode(caption), model.eos_id()]
