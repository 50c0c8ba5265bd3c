"""evaluate: policies over prompts and seeds, and what is left of them in a folder."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from foresight.commands.options import alternatives
from foresight.evaluation.metrics import METRICS, Measure, Metric
from foresight.runtime.policies import POLICIES
from tests.commands.support import Cli, assert_refused, document
from tests.support import copy_bundle, edit_manifest, snapshot

ONE = ("--policy", "static:warmup=2", "--steps", 4)


def prompts(folder: Path, *texts: str) -> Path:
    file = folder / "prompts.txt"
    file.write_text("\n".join(texts), encoding="utf-8")
    return file


def test_evaluate_holds_policies_against_no_reuse(foresight_cli: Cli, bundle: Path, tmp_path: Path) -> None:
    flags = ["--prompts", prompts(tmp_path, "a dog", "a red circle"), "--seeds", 2, "--output", "e", "--json"]
    told = document(foresight_cli("evaluate", bundle, *ONE, "--policy", "foresight:warmup=2,gamma=2", *flags))
    assert [policy["candidate"] for policy in told["policies"]] == ["static:warmup=2", "foresight:warmup=2,gamma=2"]
    assert {(row["prompt"], row["seed"]) for row in told["rows"]} == {
        ("a dog", 0),
        ("a red circle", 1),
        ("a dog", 2),
        ("a red circle", 3),
    }
    assert len(told["rows"]) == 12
    static = told["policies"][0]
    assert static["share_steps_skipped"] == 0.25 and static["videos"] == 4
    assert static["metrics"]["psnr"]["worst"] <= static["psnr_db"]
    assert "e/evaluation.json" in told["files"]
    kept = json.loads((tmp_path / "e" / "evaluation.json").read_text())
    assert kept == {name: value for name, value in told.items() if name != "files"}


def test_without_anything_named_every_policy_is_tried_on_the_sample_prompt(
    foresight_cli: Cli, bundle: Path, tmp_path: Path
) -> None:
    outcome = foresight_cli("evaluate", bundle, "--steps", 6)
    assert outcome.code == 0, outcome
    lines = outcome.out.splitlines()
    assert {line.partition(" ")[0].partition(":")[0] for line in lines} >= {
        name for name, kind in POLICIES.items() if kind.ladder
    }
    assert (tmp_path / "evaluations" / bundle.name / "evaluation.json").is_file()
    assert "note: prompts: 1 video of a single prompt tells little of others; give a file of them" in lines


def test_a_second_call_makes_only_what_is_new(foresight_cli: Cli, bundle: Path, tmp_path: Path) -> None:
    arguments = ["evaluate", bundle, "--output", "e", "--json", *ONE]
    first = document(foresight_cli(*arguments))
    videos = snapshot(tmp_path / "e" / "videos")
    rows = (tmp_path / "e" / "rows.jsonl").read_text()
    assert document(foresight_cli(*arguments)) == first
    assert (tmp_path / "e" / "rows.jsonl").read_text() == rows
    document(foresight_cli(*arguments, "--policy", "foresight"))
    assert len(snapshot(tmp_path / "e" / "videos")) == len(videos) + 1


@pytest.mark.parametrize(
    ("flags", "what"),
    [(("--steps", 5), "steps 4, this one 5"), (("--guidance", 3), "guidance 7.5, this one 3"), ((), "bundle ")],
    ids=str,
)
def test_an_evaluation_of_something_else_is_refused(
    foresight_cli: Cli, bundle: Path, tmp_path: Path, flags: tuple[Any, ...], what: str
) -> None:
    assert foresight_cli("evaluate", bundle, "--output", "e", *ONE).code == 0
    other = copy_bundle(bundle, tmp_path / "other")
    edit_manifest(other, lambda manifest: manifest["defaults"].update(prompt="a dog in the snow"))
    before = snapshot(tmp_path / "e")
    outcome = foresight_cli("evaluate", bundle if flags else other, "--output", "e", *ONE, *flags)
    assert_refused(outcome, 2, f"output: the evaluation in e has {what}")
    assert snapshot(tmp_path / "e") == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--policy", "abacus"), "policy: got 'abacus', expected one of"),
        (("--policy", "none"), "policy: got none, which the others are compared with"),
        (("--policy", "static", "--policy", "static:warmup=2", "--policy", "static"), "policy: got static twice"),
        (("--seeds", 0), "seeds: got 0"),
        (("--steps", 1000), "steps: got 1000"),
        (("--metrics", "beauty"), "metrics: got 'beauty', expected some of psnr, ssim"),
        (("--prompts", "nowhere.txt"), "prompts nowhere.txt: cannot be read"),
        (("--policy", "static:reuse-steps=3"), "interval: got 2, expected more than"),
    ],
    ids=str,
)
def test_odd_flags_are_refused_and_leave_nothing(
    foresight_cli: Cli, bundle: Path, tmp_path: Path, flags: tuple[Any, ...], message: str
) -> None:
    assert_refused(foresight_cli("evaluate", bundle, "--output", "e", *flags), 2, message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "module", "code", "message"),
    [
        (("--metrics", "psnr,lpips"), "lpips", 2, r"metrics: lpips needs lpips, .*foresight-engines\[lpips\]"),
        (("--metrics", "fvd"), "cdfvd", 2, r"fvd needs cdfvd, .*foresight-engines\[fvd\]"),
        ((), "jinja2", 1, r"report: jinja2 or Pillow is not installed .*foresight-engines\[report\]"),
    ],
    ids=str,
)
def test_a_missing_library_is_told_before_the_bundle_is_looked_for(
    foresight_cli: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[str, ...],
    module: str,
    code: int,
    message: str,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert_refused(foresight_cli("evaluate", "nowhere", *flags), code, message)
    assert not list(tmp_path.iterdir())


def test_metrics_that_compare_nothing_have_a_line_for_no_reuse(
    foresight_cli: Cli, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load() -> Measure:
        return lambda videos: float(sum(video.frames.mean() for video in videos))

    monkeypatch.setitem(METRICS, "light", Metric("light", "Light", True, load, digits=2, compares=False))
    monkeypatch.setitem(METRICS, "total", Metric("total", "Total", True, load, digits=1, of_set=True))
    outcome = foresight_cli("evaluate", bundle, *ONE, "--seeds", 2, "--metrics", "light,total")
    assert outcome.code == 0, outcome
    head, static, plain = (line.split() for line in outcome.out.splitlines()[:3])
    assert head[-3:] == ["light", "total", "speed-up"]
    assert plain[:2] == ["without", "reuse"] and float(plain[-1]) > 0
    (light, total) = static[head.index("light") + 2 :][:2]
    assert float(total) == pytest.approx(2 * float(light), abs=0.1)


def test_help_names_every_metric(foresight_cli: Cli) -> None:
    told = " ".join(foresight_cli("evaluate", "--help").out.split())
    assert f"{alternatives(METRICS).replace(' or ', ' and ')}, with commas between them" in told


def test_ctrl_c_keeps_what_is_finished(bundle: Path, tmp_path: Path) -> None:
    """Two videos are made, then the process interrupts itself; the next call goes on."""
    program = """
import signal, sys
from foresight.evaluation.folder import EvaluationFolder
keep = EvaluationFolder.keep
def kept(folder, row):
    keep(folder, row)
    if row.candidate != "none":
        signal.raise_signal(signal.SIGINT)
EvaluationFolder.keep = kept
from foresight.cli import main
main(sys.argv[1:])
"""
    file = prompts(tmp_path, "a dog", "a red circle")
    arguments = [str(word) for word in ("evaluate", bundle, "--prompts", file, "--output", "e", *ONE)]
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGINT, "", "error: interrupted\n")
    assert len((tmp_path / "e" / "rows.jsonl").read_text().splitlines()) == 2
    done = subprocess.run(
        [*command[:2], "from foresight.cli import main; main()", *arguments],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "e" / "rows.jsonl").read_text().splitlines()) == 4
