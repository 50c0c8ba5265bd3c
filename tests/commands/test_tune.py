"""tune: profiles in a bundle, and what is refused before anything is loaded."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from foresight.engines.bundle import open_bundle
from tests.commands.support import Cli, assert_refused, document
from tests.support import copy_bundle, read_manifest

pytest.importorskip("optuna")

PROMPTS = ["a dog", "a cat", "a fish", "a bird", "a cow", "a horse", "a fox", "a hen"]
QUICK = ("--steps", 4, "--trials", 2, "--policy", "static:warmup=2")


@pytest.fixture
def copied(bundle: Path, tmp_path: Path) -> Path:
    return copy_bundle(bundle, tmp_path / "copied")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS), encoding="utf-8")
    return file


def test_tune_writes_a_profile_that_run_takes(foresight_cli: Cli, copied: Path, prompts: Path, tmp_path: Path) -> None:
    before = open_bundle(copied).id
    flags = ["--prompts", prompts, "--psnr", 5, "--name", "draft", "--json"]
    told = document(foresight_cli("tune", copied, *QUICK, *flags))
    (profile,) = told["profiles"]
    assert (profile["name"], profile["written"], profile["held_out"]["pairs"]) == ("draft", True, 4)
    assert json.loads((tmp_path / "tunings" / "copied-4" / "tuning.json").read_text()) == told
    assert open_bundle(copied).id == before
    shown = foresight_cli("inspect", copied).out
    assert re.search(r"^profile draft, 4 steps: static:.*\(4 pairs held out\)$", shown, re.MULTILINE)
    made = document(foresight_cli("run", "--bundle", copied, "--profile", "draft", "--steps", 4, "--json"))
    assert made["policy"] == profile["policy"] and made["blocks_reused"]
    assert_refused(foresight_cli("run", "--bundle", copied, "--profile", "draft"), 2, "expected one of draft for 4;")
    assert foresight_cli("verify", copied).code == 0


def test_people_are_told_what_was_chosen(foresight_cli: Cli, copied: Path, prompts: Path) -> None:
    outcome = foresight_cli("tune", copied, *QUICK, "--prompts", prompts, "--psnr", 5)
    assert outcome.code == 0, outcome
    lines = outcome.out.splitlines()
    assert lines[0] == "2 settings of static:warmup=2 tried, 4 steps"
    assert lines[1].startswith("psnr-5: worst PSNR of 5 dB or more: static, reuse_steps ")
    assert "of other videos the worst is expected at " in lines[1]
    assert [line.split(",")[0].strip() for line in lines[2:5]] == ["tuning", "selection", "held out"]
    for line, pairs in zip(lines[2:5], (2, 2, 4), strict=True):
        assert f"{pairs} pairs: " in line and "skipped, PSNR" in line


def test_who_tunes_a_signed_bundle_is_told_to_sign_it_again(
    foresight_cli: Cli, copied: Path, prompts: Path, tmp_path: Path
) -> None:
    key = tmp_path / "maker.pem"
    assert foresight_cli("sign", "--generate", key).code == 0
    assert foresight_cli("sign", copied, "--key", key).code == 0
    outcome = foresight_cli("tune", copied, *QUICK, "--prompts", prompts, "--psnr", 5)
    assert outcome.code == 0, outcome
    note = "note: bundle: was signed, and is another one with its profiles; sign it again with: foresight sign"
    assert outcome.out.splitlines().count(note) == 1
    assert foresight_cli("verify", copied, "--key", tmp_path / "maker.pub.pem").code != 0
    assert foresight_cli("sign", copied, "--key", key).code == 0
    assert foresight_cli("verify", copied, "--key", tmp_path / "maker.pub.pem").code == 0


def test_several_policies_are_tried(foresight_cli: Cli, copied: Path, prompts: Path) -> None:
    policies = ("--policy", "static:warmup=2", "--policy", "foresight:warmup=2")
    told = document(foresight_cli("tune", copied, *QUICK[:4], *policies, "--prompts", prompts, "--psnr", 5, "--json"))
    assert told["policies"] == ["static:warmup=2", "foresight:warmup=2"]
    assert {tried["policy"].partition(":")[0] for tried in told["tried"]} == {"static", "foresight"}
    (profile,) = told["profiles"]
    assert [one["of"] for one in profile["candidates"]] == ["static", "foresight"]
    best = max(profile["candidates"], key=lambda one: one["selection"]["share_skipped"])
    assert best["of"] == profile["policy"]["name"]


def test_a_goal_that_nothing_keeps_is_not_written(foresight_cli: Cli, copied: Path, prompts: Path) -> None:
    manifest = read_manifest(copied)
    outcome = foresight_cli("tune", copied, *QUICK, "--prompts", prompts, "--psnr", 150)
    assert outcome.code == 1 and not outcome.err
    assert "psnr-150: worst PSNR of 150 dB or more: none found" in outcome.out
    assert "note: psnr-150: not written, as no setting that was tried kept the goal" in outcome.out
    assert read_manifest(copied) == manifest


def test_without_a_goal_there_are_three(foresight_cli: Cli, copied: Path, prompts: Path) -> None:
    told = foresight_cli("tune", copied, *QUICK, "--prompts", prompts).out.splitlines()
    goals = ["quality: worst PSNR of 45 dB", "balanced: worst PSNR of 40 dB", "fast: worst PSNR of 35 dB"]
    assert [goal for goal in goals if any(line.startswith(goal) for line in told)] == goals


def test_a_second_call_makes_no_video_again(foresight_cli: Cli, copied: Path, prompts: Path, tmp_path: Path) -> None:
    arguments = ["tune", copied, *QUICK, "--prompts", prompts, "--psnr", 5, "--output", "t", "--json"]
    first = document(foresight_cli(*arguments))
    rows = (tmp_path / "t" / "rows.jsonl").read_text()
    assert document(foresight_cli(*arguments)) == first
    assert (tmp_path / "t" / "rows.jsonl").read_text() == rows
    assert len(list((tmp_path / "t" / "videos").iterdir())) == len(PROMPTS)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "prompts: got 1 pairs of a prompt and a seed, expected 4 or more"),
        (("--seeds", 3), "prompts: got 3 pairs"),
        (("--seeds", 4, "--psnr", 40, "--speedup", 2), "psnr: got --psnr and --speedup, expected one of them"),
        (("--seeds", 4, "--psnr", 0), "psnr: got 0.0, expected a number of dB above 0"),
        (("--seeds", 4, "--speedup", 1), "speedup: got 1.0, expected a number above 1"),
        (("--seeds", 4, "--name", "x"), "name: got 'x' without a goal"),
        (("--seeds", 4, "--psnr", 40, "--name", "a/b"), "name: got 'a/b', expected letters"),
        (("--seeds", 4, "--policy", "none"), "policy: got none, which has nothing to tune"),
        (("--seeds", 4, "--policy", "magic"), "policy: got 'magic', expected one of"),
        (("--seeds", 4, "--trials", 0), "trials: got 0"),
        (("--seeds", 4, "--steps", 101), "steps: got 101"),
    ],
)
def test_what_makes_no_sense_is_refused(
    foresight_cli: Cli, bundle: Path, tmp_path: Path, flags: tuple[str | int, ...], message: str
) -> None:
    assert_refused(foresight_cli("tune", bundle, *flags), 2, re.escape(message))
    assert not list(tmp_path.iterdir())
