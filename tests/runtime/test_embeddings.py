"""Prompts that are encoded once, and latents that are not decoded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foresight.engines.errors import Cancelled, InvalidRequest
from foresight.engines.progress import Progress
from foresight.runtime.embeddings import PromptEmbeddings
from foresight.runtime.pipeline import VideoPipeline
from foresight.runtime.policies import NoReuse
from foresight.runtime.request import VideoRequest
from foresight.runtime.video import Video
from tests.support import load_pipeline, watched_pipeline
from zoo import FAMILIES

PROMPTS = ["a dog", "a red circle moving right"]


def close(one: Video, other: Video) -> bool:
    return bool(np.abs(one.latents - other.latents).max() <= 1e-4 * np.ptp(other.latents))


def request(**settings: Any) -> VideoRequest:
    return VideoRequest(**{"prompt": PROMPTS, "steps": 3, "guidance": 4.0, "seed": 2, "policy": NoReuse(), **settings})


def with_embeddings(pipeline: VideoPipeline, negative: str = "blue", **settings: Any) -> VideoRequest:
    read_alone = settings.get("guidance") == 1 or pipeline.manifest.text.null_caption
    negatives = None if read_alone else pipeline.encode(negative)
    return request(
        prompt=["one", "two"],
        prompt_embeddings=pipeline.encode(PROMPTS),
        negative_prompt_embeddings=negatives,
        **settings,
    )


@pytest.mark.parametrize("guidance", [1, 4.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_request_with_embeddings_makes_the_same_video(
    example_bundles: Callable[[str], Path], family: str, guidance: float
) -> None:
    pipeline = load_pipeline(example_bundles(family))
    negative = None if pipeline.manifest.text.null_caption else "blue"
    read = pipeline.generate(request(negative_prompt=negative, guidance=guidance))
    given = pipeline.generate(with_embeddings(pipeline, guidance=guidance))
    assert all(map(close, given, read)) and not close(given[0], read[1])
    assert [video.prompt for video in given] == ["one", "two"]


def test_prompts_with_policies_of_their_own_have_their_own_embeddings(pipeline: VideoPipeline) -> None:
    together = pipeline.generate(with_embeddings(pipeline))
    apart = pipeline.generate(with_embeddings(pipeline, policy=[NoReuse(), NoReuse()]))
    assert all(map(close, apart, together))


def test_embeddings_are_taken_apart_and_hold_no_text(pipeline: VideoPipeline) -> None:
    both, one = pipeline.encode(PROMPTS), pipeline.encode(PROMPTS[1])
    assert (len(both), len(one), len(both[-1]), len(both[:0])) == (2, 1, 1, 0)
    assert both[1].states.tobytes() == one.states.tobytes() == both[-1].states.tobytes()
    assert both[1].lengths == one.lengths and "dog" not in repr(both)


def test_with_low_memory_the_text_encoder_is_not_even_loaded(single_bundle: Path) -> None:
    pipeline, backend = watched_pipeline(single_bundle, low_memory=True)
    encoded = pipeline.encode("a dog")
    loaded: list[str] = []
    load = backend.load
    backend.load = lambda bundle, part: loaded.append(part.name) or load(bundle, part)  # type: ignore[func-returns-value, method-assign]
    pipeline.generate(request(prompt="a dog", guidance=1, prompt_embeddings=encoded))
    assert "condition" in loaded and "text_encoder" not in loaded


def test_encoding_tells_how_far_it_is_and_can_be_cancelled(pipeline: VideoPipeline) -> None:
    told: list[Progress] = []
    pipeline.encode(["a", "b"], on_progress=told.append)
    assert [(progress.phase, progress.done, progress.total) for progress in told] == [
        ("encoding text", done, 2) for done in range(3)
    ]

    class Set:
        def is_set(self) -> bool:
            return len(told) > 3

    with pytest.raises(Cancelled):
        pipeline.encode(["a", "b", "c"], on_progress=told.append, cancel=Set())


@pytest.mark.parametrize("prompts", [[], [3], ["a" * 5000]], ids=str)
def test_texts_that_make_no_sense_are_refused(pipeline: VideoPipeline, prompts: Any) -> None:
    with pytest.raises(InvalidRequest, match="^prompt: got"):
        pipeline.encode(prompts)


def spoil(given: PromptEmbeddings, **changes: Any) -> PromptEmbeddings:
    return replace(given, **changes)


WRONG: dict[str, tuple[Any, str]] = {
    "text": (lambda _: "a dog", "got 'a dog', expected what pipeline.encode gave"),
    "one too few": (lambda given: given[:1], r"got float32 \(1, .*expected float32 \(2, "),
    "another dtype": (lambda given: spoil(given, states=given.states.astype(np.float64)), "got float64"),
    "another encoder": (lambda given: spoil(given, encoder="0"), "another text encoder"),
    "no lengths": (lambda given: spoil(given, lengths=(0, 0)), "got lengths"),
    "nan": (lambda given: spoil(given, states=given.states * np.float32(np.nan)), "not finite"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_embeddings_that_are_not_this_bundles_are_refused(pipeline: VideoPipeline, kind: str) -> None:
    make, message = WRONG[kind]
    encoded = pipeline.encode(PROMPTS)
    with pytest.raises(InvalidRequest, match=f"^prompt_embeddings: .*{message}"):
        pipeline.check(request(prompt_embeddings=make(encoded), negative_prompt_embeddings=encoded))


def test_the_negative_half_has_to_be_encoded_too(pipeline: VideoPipeline) -> None:
    encoded = pipeline.encode(PROMPTS)
    with pytest.raises(InvalidRequest, match="negative_prompt_embeddings: got none beside prompt_embeddings"):
        pipeline.check(request(prompt_embeddings=encoded))
    with pytest.raises(InvalidRequest, match="negative_prompt_embeddings: got some without prompt_embeddings"):
        pipeline.check(request(negative_prompt_embeddings=encoded))


def test_without_decoding_there_are_the_same_latents_and_no_frames(pipeline: VideoPipeline) -> None:
    decoded, latents = pipeline.generate(request()), pipeline.generate(request(decode=False))
    assert [video.latents.tobytes() for video in latents] == [video.latents.tobytes() for video in decoded]
    assert all(
        video.frames.shape == (0, *whole.frames.shape[1:]) for video, whole in zip(latents, decoded, strict=True)
    )
    assert latents[0].trace.decode_ms == 0 and "0 frames" in repr(latents[0])
    with pytest.raises(InvalidRequest, match="frames: got none, as the request was made with decode False"):
        latents[0].to_bytes()
