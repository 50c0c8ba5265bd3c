"""The folder of an evaluation: whatever happens, what was finished is there, and nothing else counts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from foresight.engines.errors import InvalidRequest, OutputError
from foresight.evaluation.evaluate import Evaluation, Pair, Row, VideoKey, candidates_of, settings_of
from foresight.evaluation.folder import ROWS, SETTINGS, VIDEOS, EvaluationFolder, opened
from foresight.evaluation.metrics import PSNR, load_metrics
from foresight.runtime.budget import Profile
from foresight.runtime.pipeline import VideoPipeline
from foresight.runtime.policies import Static
from foresight.runtime.request import VideoRequest
from tests.support import copy_bundle, snapshot

SETTINGS_HERE = {"bundle": "0123", "steps": 4, "guidance": 7.5, "backend": {"device": "cpu"}}
PAIRS = [Pair("a dog", 0), Pair("a red circle", 1)]


def row(candidate: str = "static", prompt: str = "a dog", psnr: float | None = 40.0) -> Row:
    return Row(candidate, prompt, 0, 10, 20, 4, 1, 50.0, 100.0, metrics={"psnr": psnr})


def test_rows_are_read_as_they_were_kept(tmp_path: Path) -> None:
    rows = [row(), row("foresight", "caf\udce9 \u2028 ☃", None)]
    with opened(tmp_path / "e", SETTINGS_HERE) as folder:
        for kept in rows:
            folder.keep(kept)
    with opened(tmp_path / "e", SETTINGS_HERE) as folder:
        assert folder.rows() == rows


def test_of_one_video_the_newest_row_counts(tmp_path: Path) -> None:
    with opened(tmp_path, SETTINGS_HERE) as folder:
        folder.keep(row(psnr=30.0))
        folder.keep(row(psnr=31.0))
        assert folder.rows() == [row(psnr=31.0)]


def test_half_a_line_of_a_killed_process_is_dropped(tmp_path: Path) -> None:
    with opened(tmp_path, SETTINGS_HERE) as folder:
        folder.keep(row())
    with (tmp_path / ROWS).open("ab") as file:
        file.write(b'{"candidate": "fore')
    with opened(tmp_path, SETTINGS_HERE) as folder:
        folder.keep(row("other"))
        assert folder.rows() == [row(), row("other")]


@pytest.mark.parametrize("name", SETTINGS_HERE)
def test_other_settings_are_refused(tmp_path: Path, name: str) -> None:
    with opened(tmp_path, SETTINGS_HERE):
        pass
    others = {**SETTINGS_HERE, name: "another"}
    expected = f"output: the evaluation in .* has {name} .*, this one 'another'; name another folder"
    with pytest.raises(InvalidRequest, match=expected), opened(tmp_path, others):
        pass


def test_a_folder_of_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(InvalidRequest, match="holds other things than an evaluation"), opened(tmp_path, {}):
        pass
    assert snapshot(tmp_path) == {"letter.txt": b"dear"}


def test_a_bundle_is_refused(bundle: Path, tmp_path: Path) -> None:
    copy = copy_bundle(bundle, tmp_path / "bundle")
    with pytest.raises(InvalidRequest, match="lies in the bundle"), opened(copy, {}):
        pass


def test_two_processes_do_not_write_to_one(tmp_path: Path) -> None:
    with opened(tmp_path, {}), pytest.raises(OutputError, match="another process"), opened(tmp_path, {}):
        pass


def test_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    with opened(tmp_path, {}) as folder:
        (tmp_path / ROWS).write_text('{"candidate": 1}\n')
        with pytest.raises(OutputError, match=r"rows\.jsonl: cannot be read"):
            folder.rows()
        key = VideoKey("static", PAIRS[0])
        folder.videos[key] = np.zeros((1, 2, 2, 3), np.uint8)
        (file,) = (tmp_path / VIDEOS).iterdir()
        file.write_bytes(b"no array")
        with pytest.raises(OutputError, match="cannot be read .* it is made anew"):
            folder.videos[key]
    (tmp_path / SETTINGS).write_text("{")
    with pytest.raises(InvalidRequest, match=r"settings\.json cannot be read"), opened(tmp_path, {}):
        pass


def test_videos_are_told_apart_whatever_their_prompts(tmp_path: Path) -> None:
    with opened(tmp_path, {}) as folder:
        keys = [VideoKey("a", Pair("x / y", 0)), VideoKey("a", Pair("x  y", 0)), VideoKey("a", Pair("x" * 4000, 1))]
        for number, key in enumerate(keys):
            assert key not in folder.videos
            folder.videos[key] = np.full((1, 2, 2, 3), number, np.uint8)
        assert [int(folder.videos[key][0, 0, 0, 0]) for key in keys] == [0, 1, 2]
        assert "elsewhere" not in folder.videos


def test_too_little_room_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**20))
    folder = EvaluationFolder(tmp_path)
    folder.check_space(1, 2**20)
    with pytest.raises(OutputError, match=r"3 videos take 3.0 MiB, 1.0 MiB are free"):
        folder.check_space(3, 2**20)


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="check the path"), opened(tmp_path / "file" / "e", {}):
        pass


@contextmanager
def job_in(path: Path, pipeline: VideoPipeline, pairs: list[Pair]) -> Iterator[tuple[EvaluationFolder, Evaluation]]:
    request = VideoRequest("", steps=4)
    with opened(path, settings_of(pipeline, request)) as folder:
        candidates = candidates_of([Static(warmup=2)])
        yield folder, Evaluation(pipeline, request, candidates, pairs, load_metrics([PSNR]), folder.videos)


def test_an_interrupted_job_goes_on(pipeline: VideoPipeline, tmp_path: Path) -> None:
    def interrupt(progress: Any) -> None:
        if progress.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), job_in(tmp_path, pipeline, PAIRS) as (folder, job):
        folder.run(job, interrupt)
    finished = (tmp_path / ROWS).read_bytes()
    told: list[Any] = []
    with job_in(tmp_path, pipeline, PAIRS) as (folder, job):
        rows = folder.run(job, told.append)
    assert [row.key.pair for row in rows] == PAIRS * 2
    assert told[0].total == 2  # the interrupted pair, from its reference on
    assert (tmp_path / ROWS).read_bytes().startswith(finished)
    assert len(list((tmp_path / VIDEOS).iterdir())) == 4


def test_only_the_rows_that_a_job_asks_for_are_its(pipeline: VideoPipeline, tmp_path: Path) -> None:
    with job_in(tmp_path, pipeline, PAIRS) as (folder, job):
        folder.run(job)
    with job_in(tmp_path, pipeline, PAIRS[1:]) as (folder, job):
        rows = folder.run(job)
    assert [row.key.pair for row in rows] == [PAIRS[1]] * 2
    assert len(folder.rows()) == 4


def test_settings_are_plain_json_and_the_requests_defaults_are_the_bundles(pipeline: VideoPipeline) -> None:
    settings = settings_of(pipeline, VideoRequest(""))
    assert json.loads(json.dumps(settings)) == settings
    defaults = pipeline.manifest.defaults
    assert settings == settings_of(
        pipeline, VideoRequest("", defaults.negative_prompt, defaults.steps, defaults.guidance)
    )
    assert settings != settings_of(pipeline, VideoRequest("", steps=defaults.steps - 1))


def test_settings_tell_of_what_is_cached(pipeline: VideoPipeline) -> None:
    trace = pipeline("a dog", steps=4).trace
    other = pipeline("a dog", steps=4, policy=Static(warmup=2)).trace
    digests = {Profile.from_trace(made.to_dict()).digest for made in (trace, trace, other)}
    assert len(digests) == len({repr(Profile.from_trace(made.to_dict()).wanted) for made in (trace, other)})
