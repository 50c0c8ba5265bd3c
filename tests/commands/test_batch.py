"""`foresight batch`: every row once, whatever interrupts it, and each video as `run` makes it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.commands.support import Cli, assert_refused, document
from tests.support import snapshot

# Writes down what begins and what is there, a line each, and kills the process at the given one.
LOGGED = """
import os, signal, sys
from foresight.runtime.pipeline import VideoPipeline
from foresight.runtime.video import Video
log, last = sys.argv.pop(1), sys.argv.pop(1)
generate, save = VideoPipeline.generate, Video.save

def tell(line):
    with open(log, "a") as file:
        print(line, file=file)
    if line == last:
        os.kill(os.getpid(), signal.SIGKILL)

def told_generate(self, request, **options):
    tell(f"begun {request.seed}")
    return generate(self, request, **options)

def told_save(self, *arguments, **options):
    path = save(self, *arguments, **options)
    tell(f"made {self.seed}")
    return path

VideoPipeline.generate, Video.save = told_generate, told_save
from foresight.cli import main
main(sys.argv[1:])
"""


def write_rows(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(f"{json.dumps({'prompt': 'a dog', 'steps': 2, **row})}\n" for row in rows))
    return path


def killed_and_resumed(bundle: Path, folder: Path, count: int, *lasts: str) -> list[str]:
    """Make `count` rows in processes that are killed at these lines of the log, and in one that is not; the log."""
    prompts, log = write_rows(folder / "rows.jsonl", *({"seed": seed} for seed in range(count))), folder / "log"
    command = ["batch", prompts, "--bundle", bundle, "--output", folder / "videos", "--threads", 1, "--json"]
    for last in (*lasts, ""):
        arguments = [sys.executable, "-c", LOGGED, str(log), last, *map(str, command)]
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
        assert done.returncode == (-signal.SIGKILL if last else 0), done.stderr
    told = json.loads(done.stdout)
    assert (told["made"] + told["there"], told["failed"], len(told["rows"])) == (count, 0, count)
    return log.read_text().splitlines()


def assert_each_once(log: list[str], folder: Path, count: int, kills: int) -> None:
    """No row was made twice, and only what was at work when it was killed begun twice."""
    begun, made = (Counter(line.split()[1] for line in log if line.startswith(word)) for word in ("begun", "made"))
    assert len(list(folder.iterdir())) == len(list(folder.glob("*.mp4"))) == count
    assert set(made.values()) == {1} and len(made) == count
    assert sum(begun.values()) <= count + kills and max(begun.values()) <= 2


def test_fifty_rows_killed_twice_are_fifty_files(bundle: Path, foresight_cli: Cli, tmp_path: Path) -> None:
    log = killed_and_resumed(bundle, tmp_path, 50, "made 11", "begun 30")
    assert_each_once(log, tmp_path / "videos", 50, kills=2)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a dog\n" * 50)
    made = document(
        foresight_cli(
            "run", "--bundle", bundle, "--prompts", prompts, "--steps", 2, "--output", "all/v.mp4", "--threads", 1,
            "--json",
        )
    )  # fmt: skip
    assert len(made) == 50
    assert {*snapshot(tmp_path / "videos").values()} == {*snapshot(tmp_path / "all").values()}


def test_a_row_is_told_by_its_line_its_name_and_its_file(bundle: Path, foresight_cli: Cli, tmp_path: Path) -> None:
    prompts = tmp_path / "rows.jsonl"
    lines = '{"prompt": "a d\u2028og", "steps": 1, "name": "dog", "policy": "none"}\r\n\r\n{"prompt": "é", "steps": 1}'
    prompts.write_text(lines, encoding="utf-8-sig", newline="")
    command = ("batch", prompts, "--bundle", bundle, "--output", "videos", "--format", "npy", "--threads", 1)
    told = document(foresight_cli(*command, "--json"))
    assert (told["made"], told["there"], told["failed"]) == (2, 0, 0)
    assert [(row["line"], row["name"], row["status"]) for row in told["rows"]] == [
        (1, "dog", "made"),
        (3, None, "made"),
    ]
    assert all(Path(row["file"]).is_file() for row in told["rows"])
    assert Path(told["rows"][0]["file"]).name.startswith("dog-")
    again = foresight_cli(*command)
    assert again.code == 0 and again.out == f"0 made, 2 were there, 0 failed; {tmp_path / 'videos'}\n"


def test_rows_that_failed_are_told_and_tried_again(bundle: Path, foresight_cli: Cli, tmp_path: Path) -> None:
    prompts = write_rows(tmp_path / "rows.jsonl", {"name": "a"}, {"name": "b", "seed": 1})
    command = ("batch", prompts, "--bundle", bundle, "--output", "videos", "--threads", 1)
    from foresight.engines.errors import EngineError
    from foresight.runtime.pipeline import VideoPipeline

    def failing(self: VideoPipeline, request: Any, **options: Any) -> Any:
        if request.seed == 1:
            raise EngineError("block.001: injected fault")
        return generate(self, request, **options)

    generate = VideoPipeline.generate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VideoPipeline, "generate", failing)
        failed = foresight_cli(*command)
        assert failed.code == 1
        assert "line 2 failed: engine_error: block.001: injected fault" in failed.out
        assert failed.err == "error: batch: 1 of 2 rows failed; the same command tries them again\n"
        assert json.loads(foresight_cli(*command, "--json").out)["rows"][1]["error"]["code"] == "engine_error"
    told = document(foresight_cli(*command, "--json"))
    assert (told["made"], told["there"], told["failed"]) == (1, 1, 0)


def test_a_wrong_line_is_refused_before_anything_is_loaded(bundle: Path, foresight_cli: Cli, tmp_path: Path) -> None:
    prompts = write_rows(tmp_path / "rows.jsonl", {}, {"negative_prompt": "x" * 5000})
    refused = foresight_cli("batch", prompts, "--bundle", bundle, "--output", "videos")
    assert_refused(
        refused, 2, r'line 2: "negative_prompt": got 5000 characters, expected at most 4000.*nothing was made'
    )
    assert not (tmp_path / "videos").exists()
    (tmp_path / "empty.jsonl").write_text("\n")
    assert_refused(foresight_cli("batch", "empty.jsonl", "--bundle", bundle, "--output", "videos"), 2, "has no row")
    for option in ("workers", "worker-gpus"):
        refused = foresight_cli("batch", prompts, "--bundle", bundle, "--output", "videos", f"--{option}", 2)
        assert_refused(refused, 2, f"{option}: got one without --ray")


def test_an_interrupted_batch_ends_with_130_and_keeps_what_it_has(bundle: Path, tmp_path: Path) -> None:
    prompts = write_rows(tmp_path / "rows.jsonl", *({"seed": seed} for seed in range(3)))
    code = LOGGED.replace("signal.SIGKILL", "signal.SIGINT")
    arguments = ["batch", prompts, "--bundle", bundle, "--output", tmp_path / "videos", "--threads", 1]
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "log"), "begun 1", *map(str, arguments)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (130, "error: interrupted\n")
    assert [path.suffix for path in (tmp_path / "videos").iterdir()] == [".mp4"]
