"""From texts to what no step changes: the text encoder and the condition part."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..engines.arrays import Array, Arrays
from ..engines.backend import Engine
from ..engines.manifest import Manifest
from .parts import Check, run_part
from .text import Texts, Tokens


def encode_tokens(manifest: Manifest, engine: Engine, arrays: Arrays, tokens: Tokens, check: Check) -> Array:
    """What the text encoder makes of each text, (texts, max_tokens, width) on the device. Raises EngineError."""
    encoded = run_part(
        engine,
        manifest.text_encoder,
        arrays,
        {"input_ids": arrays.from_host(tokens.ids), "attention_mask": arrays.from_host(tokens.mask)},
        {"batch": len(tokens.ids)},
    )
    check(manifest.text_encoder, encoded)
    return encoded["text_states"]


def encode(
    manifest: Manifest, engines: Sequence[Engine], arrays: Arrays, texts: Texts, check: Check
) -> list[dict[str, Array]]:
    """The outputs of each transformer's condition part, in the order of the guided batch.

    `engines` are the text encoder's, which texts that are encoded already do without, and the condition parts'.

    Unless the model reads padding too, a prompt and its negative are both cut to the prompt's length, as their
    pipelines do for one prompt; in a batch each is masked to its own length, so that no prompt sees another's
    padding. The part is told which rows are the negative half, as a model may put its null caption there. `check` is
    told what each part made. Raises EngineError.
    """
    conditions = [expert.condition for expert in manifest.experts]
    text_encoder, engines = engines[: -len(conditions)], engines[-len(conditions) :]
    longest = int(texts.lengths.max())
    if texts.states is not None:
        encoded = arrays.from_host(texts.states)
    else:
        assert texts.tokens is not None
        encoded = encode_tokens(manifest, text_encoder[0], arrays, texts.tokens, check)
    states = encoded[arrays.from_host(texts.order), :longest]
    mask = (np.arange(longest)[None] < texts.lengths[:, None]).astype(np.int64)
    given = {
        "text_states": arrays.xp.ascontiguousarray(states),
        "text_mask": arrays.from_host(mask),
        "unconditional": arrays.from_host(texts.unconditional),
    }
    sizes = manifest.largest(batch=len(texts.order), text=longest)
    made = []
    for part, engine in zip(conditions, engines, strict=True):
        made.append(run_part(engine, part, arrays, given, sizes))
        check(part, made[-1])
    return made
