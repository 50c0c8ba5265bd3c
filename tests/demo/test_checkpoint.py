"""The shipped checkpoint loads as Latte does, meets its bars, and still does what its scores say."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from diffusers import LattePipeline

from demo import evaluate, shapes

CHECKPOINT = evaluate.HERE / "latte"
MAXIMUM_BYTES = 25 * 10**6
BARS = {"colour": 0.95, "direction": 0.95, "shape": 0.90, "intact": 0.90}


@pytest.fixture(scope="module")
def pipeline() -> LattePipeline:
    return evaluate.load_pipeline(CHECKPOINT)


@pytest.fixture(scope="module")
def scores() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((evaluate.HERE / "scores.json").read_text())
    return loaded


def test_the_checkpoint_is_small() -> None:
    assert sum(file.stat().st_size for file in CHECKPOINT.rglob("*") if file.is_file()) <= MAXIMUM_BYTES


def test_the_checkpoint_has_the_parts_of_latte(pipeline: LattePipeline) -> None:
    parts = {name: type(part).__name__ for name, part in pipeline.components.items()}
    assert parts == {
        "tokenizer": "T5Tokenizer",
        "text_encoder": "T5EncoderModel",
        "vae": "AutoencoderKL",
        "transformer": "LatteTransformer3DModel",
        "scheduler": "DDIMScheduler",
    }


def test_all_weights_are_finite_float32(pipeline: LattePipeline) -> None:
    for part in (pipeline.text_encoder, pipeline.vae, pipeline.transformer):
        for parameter in part.parameters():
            assert parameter.dtype == torch.float32
            assert parameter.isfinite().all()


@pytest.mark.parametrize("combination", shapes.combinations(), ids=lambda combination: combination.caption)
def test_the_tokenizer_knows_every_word(pipeline: LattePipeline, combination: shapes.Combination) -> None:
    ids = pipeline.tokenizer(combination.caption).input_ids
    assert len(ids) == 6
    assert pipeline.tokenizer.unk_token_id not in ids


@pytest.mark.parametrize("respect", BARS)
def test_the_scores_meet_the_bars(scores: dict[str, Any], respect: str) -> None:
    assert scores["totals"][respect] >= BARS[respect] * scores["totals"]["pairs"]


def test_the_scores_are_of_the_fixed_pairs(scores: dict[str, Any]) -> None:
    scored = [(row["prompt"], row["seed"]) for row in scores["rows"]]
    assert scored == [(pair.combination.caption, pair.seed) for pair in evaluate.evaluation_pairs()]


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


def test_the_readme_shows_the_scores(scores: dict[str, Any]) -> None:
    training = json.loads((evaluate.HERE / "training.json").read_text())
    assert evaluate.scores_table(scores, training) in (evaluate.HERE / "README.md").read_text()


@pytest.mark.parametrize("index", [0, 1], ids=["trained", "held-out"])
def test_a_recorded_video_made_again_gets_the_recorded_verdict(
    pipeline: LattePipeline, scores: dict[str, Any], index: int
) -> None:
    pair = evaluate.evaluation_pairs()[index]
    video = evaluate.generate(pipeline, pair, evaluate.Sampling(**scores["sampling"]))
    assert evaluate.judged(pair, video)["right"] == scores["rows"][index]["right"]
