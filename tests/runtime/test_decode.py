"""A video is only handed over where everything that it was made from is finite."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from foresight.engines.arrays import Array
from foresight.engines.errors import EngineError
from foresight.runtime.policies import NoReuse
from tests.support import load_pipeline, watched_pipeline


def test_values_that_only_the_decoder_cannot_hold_are_an_error_not_a_black_video(open_sora_bundle: Path) -> None:
    pipeline = load_pipeline(open_sora_bundle)
    with pytest.raises(EngineError, match=r"(vae.*|latents): got values .*; lower the guidance"):
        pipeline("a red circle", steps=1, guidance=1e38, policy=NoReuse())


@pytest.mark.parametrize("guidance", [1e30, 1e38])
@pytest.mark.parametrize("family", ["latte", "cogvideox", "open_sora", "wan"])
def test_values_whose_squares_overflow_are_an_error_even_if_norms_make_them_finite_again(
    example_bundles: Callable[[str], Path], family: str, guidance: float
) -> None:
    pipeline = load_pipeline(example_bundles(family))
    with pytest.raises(EngineError, match="lower the guidance"):
        pipeline("a red circle", steps=4, guidance=guidance, policy=NoReuse())


BORDERS = {
    "condition": ("bundle", "text_states"),
    "vae_decoder": ("bundle", "latents"),
    "vae_temporal_decoder": ("open_sora_bundle", "latents"),
    "vae_decoder_next": ("cogvideox_bundle", "latents"),
}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("part", BORDERS)
def test_what_a_part_makes_of_a_value_that_is_not_finite_is_refused_where_it_appears(
    part: str, value: float, request: pytest.FixtureRequest
) -> None:
    fixture, name = BORDERS[part]
    pipeline, backend = watched_pipeline(request.getfixturevalue(fixture))
    reached = []

    def before(running: str, tensors: Mapping[str, Array]) -> None:
        reached.append(running)
        if running == part:
            tensors[name][..., 0] = value

    backend.before = before
    with pytest.raises(EngineError, match=f"{part}: got values that are not finite"):
        pipeline("a dog", steps=1)
    assert reached[-1] == part
    backend.before = lambda running, tensors: None
    pipeline("a dog", steps=1)  # and the next request is none the worse for it


def test_a_single_pixel_that_is_not_finite_is_found(bundle: Path) -> None:
    pipeline, backend = watched_pipeline(bundle)

    def before(running: str, tensors: Mapping[str, Array]) -> None:
        if running == "vae_decoder":
            tensors["latents"][0, -1, -1, -1] = np.nan

    backend.before = before
    with pytest.raises(EngineError, match="frame_means"):
        pipeline("a dog", steps=1)
