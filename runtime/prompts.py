"""Prompts to embeddings, without a video: `VideoPipeline.encode`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..engines.errors import InvalidRequest
from ..engines.progress import Counter, OnProgress
from .admission import CancelToken, check_cancelled
from .callbacks import check_callbacks
from .embeddings import PromptEmbeddings, encoder_id
from .encode import encode_tokens
from .lifecycle import Calls
from .loaded import Loaded
from .policies import NoReuse
from .release import released
from .request import check_text
from .text import Tokens

if TYPE_CHECKING:
    from .pipeline import VideoPipeline


def encode_prompts(
    pipeline: VideoPipeline,
    prompts: str | Sequence[str],
    *,
    on_progress: OnProgress | None = None,
    cancel: CancelToken | None = None,
) -> PromptEmbeddings:
    """What the text encoder makes of a prompt, or of each of several: negative ones too, which may be empty.

    A request takes them as `prompt_embeddings`, on this bundle or on any other with the same text encoder, and needs no
    text encoder then. Texts are encoded one at a time. Raises InvalidRequest, and what `generate` raises.
    """
    pipeline._life.check()
    check_callbacks(None, cancel, on_progress)
    listed = [prompts] if isinstance(prompts, str) else list(prompts)
    texts = [check_text("prompt", text, may_be_empty=True) for text in listed]
    if not texts:
        raise InvalidRequest("prompt: got none, expected at least one")
    calls = Calls(pipeline._life, None, cancel, on_progress)
    return calls.run(lambda: _encode(pipeline._loaded, texts, calls))


def _encode(loaded: Loaded, texts: list[str], calls: Calls) -> PromptEmbeddings:
    manifest, arrays = loaded.manifest, loaded.backend.arrays
    tokens = loaded.tokenizer.encode(texts, calls)
    plan = loaded.limits.plan(manifest, NoReuse(), 1, False, loaded.backend.compiled(loaded.residency.bundle)).text
    states = []
    with loaded.residency.turn(calls), released():
        loaded.residency.files.check()
        with (
            loaded.reservations.reserve(plan.total if loaded.limits.low_memory else plan.arrays, 1),
            loaded.residency.phase((manifest.text_encoder,), calls, calls.on_progress) as engines,
        ):
            counter = Counter("encoding text", len(texts), "texts", calls.on_progress)
            for row in range(len(texts)):
                check_cancelled(calls, f"before text {row + 1} was encoded")
                one = Tokens(tokens.ids[row : row + 1], tokens.mask[row : row + 1], (), ())
                states.append(arrays.to_host(encode_tokens(manifest, engines[0], arrays, one, loaded.check)))
                counter.advance()
    return PromptEmbeddings(np.concatenate(states), tokens.lengths, tokens.truncated, encoder_id(manifest))
