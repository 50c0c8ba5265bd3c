"""What a text encoder made of prompts, kept by its caller: for many videos of a prompt, or to encode elsewhere."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from ..engines.arrays import HostArray, numpy_dtype
from ..engines.errors import InvalidRequest, quoted
from ..engines.manifest import Manifest, part_files


@dataclass(frozen=True, eq=False)
class PromptEmbeddings:
    """Of some prompts, on the host; they hold no text.

    `states` is (prompts, tokens, width) in the bundle's dtype, `lengths` how many of the tokens are a prompt's own,
    `truncated` whether it was cut. `encoder` is a hash of what made them: any bundle with the same text encoder takes
    them. Indexing gives those of one prompt, a slice those of several.
    """

    states: HostArray
    lengths: tuple[int, ...]
    truncated: tuple[bool, ...]
    encoder: str

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, place: int | slice) -> PromptEmbeddings:
        if not isinstance(place, slice):
            place = slice(range(len(self))[place], range(len(self))[place] + 1)
        return PromptEmbeddings(self.states[place], self.lengths[place], self.truncated[place], self.encoder)

    def __repr__(self) -> str:
        return f"<PromptEmbeddings of {len(self)}, {self.states.dtype} {self.states.shape}>"


def encoder_id(manifest: Manifest) -> str:
    """A hash of all that decides on the embeddings of a text."""
    names = (manifest.text.tokenizer, *part_files(manifest.text_encoder))
    hashed = hashlib.sha256(msgspec.json.encode(manifest.text))
    for name in names:
        hashed.update(manifest.files[name].sha256.encode())
    return hashed.hexdigest()


def check_embeddings(name: str, given: Any, manifest: Manifest, count: int) -> PromptEmbeddings:
    """Those that a bundle's own text encoder made of `count` prompts. Raises InvalidRequest."""
    if not isinstance(given, PromptEmbeddings):
        raise InvalidRequest(f"{name}: got {quoted(given)}, expected what pipeline.encode gave")
    if given.encoder != encoder_id(manifest):
        raise InvalidRequest(f"{name}: got those of another text encoder, expected this bundle's; encode the text anew")
    (spec,) = manifest.text_encoder.outputs
    shape = spec.resolve({"batch": count})
    if given.states.shape != shape or given.states.dtype != numpy_dtype(spec.dtype):
        raise InvalidRequest(
            f"{name}: got {given.states.dtype} {given.states.shape}, expected {numpy_dtype(spec.dtype)} {shape}"
        )
    if not len(given.lengths) == len(given.truncated) == count or not all(0 < n <= shape[1] for n in given.lengths):
        raise InvalidRequest(f"{name}: got lengths {quoted(given.lengths)}, expected {count} of 1 to {shape[1]}")
    if not bool(np.isfinite(given.states.astype(np.float32)).all()):
        raise InvalidRequest(f"{name}: got values that are not finite, expected what pipeline.encode gave")
    return given


def joined(embeddings: Sequence[PromptEmbeddings]) -> PromptEmbeddings:
    """All of them, one after the other; of one encoder."""
    return PromptEmbeddings(
        np.concatenate([one.states for one in embeddings]),
        tuple(length for one in embeddings for length in one.lengths),
        tuple(cut for one in embeddings for cut in one.truncated),
        embeddings[0].encoder,
    )
