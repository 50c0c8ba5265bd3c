"""Prompts become tokens, as the checkpoint's own pipeline makes them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer as _Tokenizer

from ..engines.arrays import HostArray
from ..engines.errors import IntegrityError, one_line, quoted
from ..engines.manifest import Manifest, Text
from .admission import CancelToken, check_cancelled
from .caption import clean_caption, clean_whitespace
from .embeddings import PromptEmbeddings

MOST_ID = 2**31 - 1

log = logging.getLogger("foresight")


@contextmanager
def _as_ours(what: str) -> Iterator[None]:
    """The library raises bare Exception, and where its Rust code panics something that is not even that.

    Raises IntegrityError.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise IntegrityError(f"{what} ({one_line(error)[:200]}); export again") from error


@dataclass(frozen=True)
class Tokens:
    """ids and mask (texts, max_tokens) int64; `lengths` without padding; `truncated` where a text was cut."""

    ids: HostArray
    mask: HostArray
    lengths: tuple[int, ...]
    truncated: tuple[bool, ...]


@dataclass(frozen=True)
class Texts:
    """What the text encoder reads for a request. `tokens` are those of each text that differs.

    Without tokens there are `states`, what a text encoder has made of the texts already. `order` (rows,) int64 says
    which of them each row of the guided batch is, `lengths` (rows,) how much of it the model reads, `unconditional`
    (rows,) int64 is 1 in the negative half. `truncated` are the prompts that were cut.
    """

    tokens: Tokens | None
    order: HostArray
    lengths: HostArray
    unconditional: HostArray
    truncated: tuple[str, ...]
    states: HostArray | None = None


class Tokenizer:
    """A bundle's tokenizer. Thread-safe: encoding changes nothing in it."""

    def __init__(self, path: Path, settings: Text) -> None:
        with _as_ours(f"{path}: is not a tokenizer"):
            self._tokenizer = _Tokenizer.from_file(str(path))
            self._tokenizer.no_padding()
            self._tokenizer.no_truncation()
        self._settings = settings
        self._path = path

    def encode(self, texts: Sequence[str], cancel: CancelToken | None = None) -> Tokens:
        """Tokens of each text, cut to the model's length as its own tokenizer does: the end token stays.

        `cancel` is looked at before each text. Raises Cancelled; InvalidRequest where a text cannot be cleaned, see
        runtime/caption.py; IntegrityError where the tokenizer fails.
        """
        settings = self._settings
        ids = np.full((len(texts), settings.max_tokens), settings.pad_id, np.int64)
        mask = np.zeros_like(ids)
        lengths, truncated = [], []
        for row, text in enumerate(texts):
            check_cancelled(cancel, "while its text was prepared")
            found = self._ids(self._normalize(text, cancel))
            if len(found) > settings.max_tokens:
                log.warning(
                    "a prompt has %d tokens, the model reads %d; the rest is cut off", len(found), settings.max_tokens
                )
                log.debug("that prompt is %s", quoted(text))
            kept = found if len(found) <= settings.max_tokens else [*found[: settings.max_tokens - 1], found[-1]]
            ids[row, : len(kept)] = kept
            mask[row, : len(kept)] = 1
            lengths.append(len(kept))
            truncated.append(len(kept) < len(found))
        return Tokens(ids, mask, tuple(lengths), tuple(truncated))

    def _ids(self, text: str) -> list[int]:
        with _as_ours(f"{self._path}: cannot make tokens of a prompt"):
            found = self._tokenizer.encode(text).ids
        if not found or max(found) > MOST_ID:
            raise IntegrityError(f"{self._path}: makes no tokens that a model could read of a prompt; export again")
        return found

    def _normalize(self, text: str, cancel: CancelToken | None) -> str:
        settings = self._settings
        if settings.suffix and settings.suffix_unless not in text:
            text += settings.suffix
        if settings.cleaning == "caption":
            return clean_caption(text, cancel)
        if settings.cleaning == "whitespace":
            return clean_whitespace(text)
        return text.lower().strip() if settings.cleaning == "lower" else text


def read_texts(
    tokenizer: Tokenizer,
    manifest: Manifest,
    prompts: tuple[str, ...],
    negatives: tuple[str, ...],
    halves: int,
    cancel: CancelToken | None = None,
) -> Texts:
    """The texts of a batch of `halves` x prompts rows, each with a negative. Raises what `Tokenizer.encode` does."""
    if manifest.text.null_caption:
        negatives = prompts
    halved = [(prompts, 0), (negatives, 1)][:halves]
    if manifest.guidance_order == "negative_first":
        halved.reverse()
    rows = [text for half, _ in halved for text in half]
    place = {text: index for index, text in enumerate(dict.fromkeys(rows))}
    tokens = tokenizer.encode(list(place), cancel)
    lengths = [tokens.lengths[place[prompt]] for prompt in prompts]
    return Texts(
        tokens=tokens,
        order=np.array([place[text] for text in rows]),
        lengths=_read_lengths(lengths, manifest, halves),
        unconditional=np.repeat([which for _, which in halved], len(prompts)),
        truncated=tuple(prompt for prompt in prompts if tokens.truncated[place[prompt]]),
    )


def read_embeddings(
    manifest: Manifest,
    prompts: tuple[str, ...],
    positive: PromptEmbeddings,
    negative: PromptEmbeddings | None,
    halves: int,
) -> Texts:
    """The texts of a batch that its caller has encoded; `negative` may be missing where nothing is read of it."""
    count = len(prompts)
    halved = [(0, 0), (0 if negative is None else count, 1)][:halves]  # where their states begin
    if manifest.guidance_order == "negative_first":
        halved.reverse()
    return Texts(
        tokens=None,
        order=np.concatenate([np.arange(first, first + count) for first, _ in halved]),
        lengths=_read_lengths(positive.lengths, manifest, halves),
        unconditional=np.repeat([which for _, which in halved], count),
        truncated=tuple(prompt for prompt, cut in zip(prompts, positive.truncated, strict=True) if cut),
        states=np.concatenate([one.states for one in (positive, negative) if one is not None]),
    )


def _read_lengths(lengths: Sequence[int], manifest: Manifest, halves: int) -> HostArray:
    """How much the model reads of each row: in both halves as much as the prompt has, or all with its padding."""
    return np.array([manifest.text.max_tokens if manifest.text.padded else length for length in lengths] * halves)
