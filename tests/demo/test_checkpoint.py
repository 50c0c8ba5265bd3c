"""Every shipped checkpoint loads as the real model does, meets its bars, and still does what its scores say."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from diffusers import CogVideoXPipeline, LattePipeline, WanPipeline
from torch import nn
from transformers import UMT5EncoderModel

from demo import evaluate, shapes
from demo.model import ROOT, Model, Sampling
from demo.models import MODELS, open_sora, wan

MAXIMUM_BYTES = 25 * 10**6
BARS = {"colour": 0.95, "direction": 0.95, "shape": 0.90, "intact": 0.90}
WEIGHTS = {
    "latte": ("text_encoder", "vae", "transformer"),
    "cogvideox": ("text_encoder", "vae", "transformer"),
    "open_sora": ("text_encoder", "vae", "transformer"),
    "wan": ("text_encoder", "vae", "transformer"),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Model:
    return MODELS[request.param]


@pytest.fixture(scope="module")
def loaded(model: Model) -> Any:
    return model.load(model.checkpoint)


@pytest.fixture(scope="module")
def scores(model: Model) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((model.records / "scores.json").read_text())
    return read


def test_the_checkpoint_is_small(model: Model) -> None:
    assert sum(file.stat().st_size for file in model.checkpoint.rglob("*") if file.is_file()) <= MAXIMUM_BYTES


def test_the_latte_checkpoint_has_the_parts_of_latte() -> None:
    pipeline = LattePipeline.from_pretrained(ROOT / "latte")
    assert {name: type(part).__name__ for name, part in pipeline.components.items()} == {
        "tokenizer": "T5Tokenizer",
        "text_encoder": "T5EncoderModel",
        "vae": "AutoencoderKL",
        "transformer": "LatteTransformer3DModel",
        "scheduler": "DDIMScheduler",
    }


def test_the_cogvideox_checkpoint_has_the_parts_of_cogvideox() -> None:
    pipeline = CogVideoXPipeline.from_pretrained(ROOT / "cogvideox")
    assert {name: type(part).__name__ for name, part in pipeline.components.items()} == {
        "tokenizer": "T5Tokenizer",
        "text_encoder": "T5EncoderModel",
        "vae": "AutoencoderKLCogVideoX",
        "transformer": "CogVideoXTransformer3DModel",
        "scheduler": "CogVideoXDDIMScheduler",
    }


def test_the_wan_checkpoint_has_the_parts_of_wan_2_1() -> None:
    pipeline = WanPipeline.from_pretrained(ROOT / "wan")
    assert {name: type(part).__name__ for name, part in pipeline.components.items() if part is not None} == {
        "tokenizer": "T5Tokenizer",
        "text_encoder": "UMT5EncoderModel",
        "vae": "AutoencoderKLWan",
        "transformer": "WanTransformer3DModel",
        "scheduler": "UniPCMultistepScheduler",
    }


def test_the_wan_tokenizer_says_to_what_length_prompts_are_padded() -> None:
    assert WanPipeline.from_pretrained(ROOT / "wan").tokenizer.model_max_length == wan.TEXT_LENGTH


def test_the_open_sora_checkpoint_has_the_folders_of_open_sora() -> None:
    files = {str(file.relative_to(ROOT / "open_sora")) for file in (ROOT / "open_sora").rglob("*") if file.is_file()}
    assert {name for name in files if not name.startswith("tokenizer/")} == {
        f"{part}/{name}" for part in WEIGHTS["open_sora"] for name in ("config.json", "model.safetensors")
    }
    assert "tokenizer/tokenizer.json" in files


def test_all_weights_are_finite_float32(model: Model, loaded: Any) -> None:
    parts: list[nn.Module] = [getattr(loaded, name) for name in WEIGHTS[model.name]]
    for part in parts:
        for parameter in part.parameters():
            assert parameter.dtype == torch.float32
            assert parameter.isfinite().all()


def test_all_models_share_one_text_encoder(loaded: Any) -> None:
    encoder = MODELS["latte"].load(ROOT / "latte").text_encoder
    if isinstance(loaded.text_encoder, UMT5EncoderModel):
        encoder = wan.umt5_from_t5(encoder)
    first, weights = encoder.state_dict(), loaded.text_encoder.state_dict()
    assert weights.keys() == first.keys()
    assert all(torch.equal(weight, first[name]) for name, weight in weights.items())


@pytest.mark.parametrize("combination", shapes.combinations(), ids=lambda combination: combination.caption)
def test_the_tokenizer_knows_every_word(loaded: Any, combination: shapes.Combination) -> None:
    ids = loaded.tokenizer(combination.caption).input_ids
    assert len(ids) == 6
    assert loaded.tokenizer.unk_token_id not in ids


def test_open_sora_prompts_fit_the_longest_text_with_what_is_appended() -> None:
    loaded = open_sora.load_checkpoint(ROOT / "open_sora")
    longest = loaded.transformer.config.model_max_length
    for combination in shapes.combinations():
        assert len(loaded.tokenizer(combination.caption + open_sora.SUFFIX).input_ids) <= longest


@pytest.mark.parametrize("respect", BARS)
def test_the_scores_meet_the_bars(scores: dict[str, Any], respect: str) -> None:
    assert scores["totals"][respect] >= BARS[respect] * scores["totals"]["pairs"]


def test_the_scores_are_of_the_fixed_pairs(scores: dict[str, Any]) -> None:
    scored = [(row["prompt"], row["seed"]) for row in scores["rows"]]
    assert scored == [(pair.combination.caption, pair.seed) for pair in evaluate.evaluation_pairs()]


def test_the_scores_are_of_the_setting_that_the_model_asks_for(model: Model, scores: dict[str, Any]) -> None:
    assert Sampling(**scores["sampling"]) == model.sampling


def test_half_of_the_pairs_are_held_out(scores: dict[str, Any]) -> None:
    excluded = {combination.caption for combination in shapes.held_out()}
    marked = [row["held_out"] for row in scores["rows"]]
    assert marked == [row["prompt"] in excluded for row in scores["rows"]]
    assert sum(marked) == len(marked) / 2


@pytest.mark.parametrize("part", [None, False, True], ids=["all", "trained", "held-out"])
def test_the_totals_are_sums_of_the_rows(scores: dict[str, Any], part: bool | None) -> None:
    key = {None: "totals", False: "totals_trained", True: "totals_held_out"}[part]
    rows = [row for row in scores["rows"] if part is None or row["held_out"] == part]
    assert scores[key] == evaluate.totals(rows)


def test_the_readme_shows_the_scores(model: Model, scores: dict[str, Any]) -> None:
    training = json.loads((model.records / "training.json").read_text())
    assert evaluate.scores_table(scores, training) in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("index", [0, 1], ids=["trained", "held-out"])
def test_a_recorded_video_made_again_gets_the_recorded_verdict(
    model: Model, loaded: Any, scores: dict[str, Any], index: int
) -> None:
    pair = evaluate.evaluation_pairs()[index]
    video = model.generate(loaded, pair.combination.caption, pair.seed, Sampling(**scores["sampling"]))
    assert len(video) == model.frames
    assert evaluate.judged(pair, video)["right"] == scores["rows"][index]["right"]
