"""Prompts become the tokens that the checkpoint's own tokenizer makes of them."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from foresight.engines.bundle import open_bundle
from foresight.engines.errors import Cancelled, InvalidRequest
from foresight.runtime.request import MAX_CHARACTERS, check_prompts, check_text
from foresight.runtime.text import Tokenizer
from zoo.components import WORDS

TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=60),
    st.lists(st.sampled_from([*WORDS, "Circle", "  ", "x" * 40, "ça", "Ünï", "猫", "🐕", "\n", "\t"])).map(" ".join),
    st.lists(st.sampled_from(WORDS), min_size=100, max_size=140).map(" ".join),
)


@pytest.fixture(scope="module")
def ours(bundle: Path) -> Tokenizer:
    return Tokenizer(bundle / "tokenizer.json", open_bundle(bundle).manifest.text)


@pytest.fixture(scope="module")
def theirs(checkpoint: Path) -> AutoTokenizer:
    return AutoTokenizer.from_pretrained(checkpoint / "tokenizer")


@given(text=TEXTS)
@example("")
@example("A Red CIRCLE moving right")
@example("  a red circle \n")
@example(" ".join(["a"] * 118))
@example(" ".join(["a"] * 119))
@example(" ".join(["a"] * 120))
@example("İstanbul ẞ ﬁ")
@example("a </s> dog <pad> <unk>")
@example("\u200ba\u00a0dog\ufeff")
@settings(max_examples=150, deadline=None)
def test_tokens_are_those_of_the_checkpoints_tokenizer(ours: Tokenizer, theirs: AutoTokenizer, text: str) -> None:
    # LattePipeline.encode_prompt: lower case, no white space at the ends, padded and cut to 120
    expected = theirs(text.lower().strip(), padding="max_length", max_length=120, truncation=True, return_tensors="np")
    got = ours.encode([text])
    assert got.ids.tolist() == expected.input_ids.tolist()
    assert got.mask.tolist() == expected.attention_mask.tolist()


@given(texts=st.lists(TEXTS, min_size=1, max_size=4))
@settings(max_examples=40, deadline=None)
def test_a_list_of_texts_gives_each_what_it_gets_alone(ours: Tokenizer, texts: list[str]) -> None:
    together = ours.encode(texts)
    for row, text in enumerate(texts):
        alone = ours.encode([text])
        assert together.ids[row].tolist() == alone.ids[0].tolist()
        assert together.lengths[row] == alone.lengths[0] == together.mask[row].sum()
        assert together.truncated[row] == alone.truncated[0]


@pytest.mark.parametrize(("words", "truncated"), [(118, False), (119, False), (120, True), (500, True)])
def test_truncation_is_reported_and_keeps_the_end_token(ours: Tokenizer, words: int, truncated: bool) -> None:
    tokens = ours.encode([" ".join(["a"] * words)])
    assert tokens.truncated == (truncated,)
    assert tokens.lengths == (min(words + 1, 120),)
    assert tokens.ids[0, tokens.lengths[0] - 1] == 1


def test_truncation_is_logged_with_both_lengths(ours: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="foresight"):
        ours.encode([" ".join(["dog"] * 200)])
    assert "has 201 tokens, the model reads 120" in caplog.text
    assert "dog" not in caplog.text


def test_what_was_truncated_is_logged_for_debugging_only(ours: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="foresight"):
        ours.encode([" ".join(["dog"] * 200)])
    assert {record.levelname for record in caplog.records if "dog" in record.getMessage()} == {"DEBUG"}


def test_a_cancelled_request_encodes_no_further_text(ours: Tokenizer) -> None:
    token = threading.Event()
    token.set()
    with pytest.raises(Cancelled, match="cancelled while its text was prepared"):
        ours.encode(["a", "a red dog"], token)


def test_arrays_are_int64_of_the_models_length(ours: Tokenizer) -> None:
    tokens = ours.encode(["a", "a red dog"])
    assert tokens.ids.dtype == tokens.mask.dtype == np.int64
    assert tokens.ids.shape == tokens.mask.shape == (2, 120)


@pytest.mark.parametrize("prompts", [[""], ["  "], ["\n\t"], ["a dog", ""], []])
def test_a_prompt_has_to_say_something(prompts: list[str]) -> None:
    with pytest.raises(InvalidRequest, match="prompt"):
        check_prompts(prompts)


@pytest.mark.parametrize("prompt", ["a\ud800", "\udcff"])
def test_a_prompt_that_is_no_unicode_text_is_refused(prompt: str) -> None:
    with pytest.raises(InvalidRequest, match="prompt"):
        check_prompts([prompt])


def test_a_prompt_may_be_long_but_not_endless() -> None:
    longest = "a" * MAX_CHARACTERS
    assert check_prompts([longest]) == (longest,)
    assert check_text("negative_prompt", longest, may_be_empty=True) == longest
    with pytest.raises(InvalidRequest, match=rf"prompt: got {MAX_CHARACTERS + 1} characters, expected at most"):
        check_prompts([longest + "a"])


@pytest.mark.parametrize(
    "text",
    ["\ud800" * 100, " " * 100, "a" * 10**6, "a\ud800" * 10**6, [["a" * 10**6]]],
    ids=lambda text: repr(text[:3])[:9],
)
def test_a_message_quotes_the_beginning_of_a_prompt_only(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_prompts([text])
    assert len(str(caught.value)) < 160
    assert len(str(caught.value.__cause__ or "")) < 160
