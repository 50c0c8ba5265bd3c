"""Lines of a batch are checked before anything runs; a row's key is all that its video depends on."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest

from foresight.engines.errors import Cancelled, IntegrityError, InvalidRequest, OutputError
from foresight.engines.manifest import PolicyProfile
from foresight.runtime.pipeline import VideoPipeline
from foresight.serving.batch import BatchFolder, Line, Row, rows_of
from foresight.serving.settings import WorkerSettings
from foresight.serving.spec import Model, Spec, open_models
from tests.support import copy_bundle, edit_manifest, fail_at, is_block, profile_of, snapshot, watched_pipeline


@pytest.fixture(scope="module")
def model(bundle: Path) -> Model:
    return open_model(bundle)


def open_model(bundle: Path) -> Model:
    return open_models(WorkerSettings({"tiny": bundle}))["tiny"]


def rows(model: Model, *lines: dict[str, Any] | str, **settings: Any) -> list[Row]:
    texts = [line if isinstance(line, str) else json.dumps({"prompt": "a dog", "steps": 2, **line}) for line in lines]
    return rows_of(enumerate(texts, 1), model, **settings)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "got no row (Input data was truncated), expected a JSON object with 'prompt'"),
        ("[1]", "got no row (Expected `object`, got `array`)"),
        ('{"seed": 1}', "missing required field `prompt`"),
        ({"sead": 1}, "unknown field `sead`"),
        ({"steps": "2"}, "Expected `int | null`, got `str` - at `$.steps`"),
        ({"steps": 101}, '"steps": got 101, expected 1 to 100'),
        ({"prompt": " "}, '"prompt": '),
        ({"seed": -1}, '"seed": '),
        ({"policy": "fast"}, "fast"),
        ({"policy": "none", "profile": "x"}, '"profile": got a profile and a policy'),
        ({"profile": "x"}, "\"profile\": got 'x' for 2 steps"),
        ({"name": "../x"}, "\"name\": got '../x', expected up to 100 of A-Z"),
        ({"name": ""}, "\"name\": got ''"),
        ({"name": ".x"}, "\"name\": got '.x'"),
        ({"name": "first"}, "\"name\": got 'first', which line 1 has, expected names that differ"),
    ],
    ids=str,
)
def test_a_wrong_line_is_told_with_its_number(model: Model, line: dict[str, Any] | str, message: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        rows(model, {"name": "first"}, line)
    told = str(raised.value)
    assert told.startswith("line 2: ") and told.endswith("; nothing was made yet") and message in told, told


def test_a_line_may_say_what_the_server_may_be_asked_but_the_model() -> None:
    assert {*Line.__struct_fields__} == {*Spec.__struct_fields__} - {"model"} | {"name"}


def test_identical_rows_are_one(model: Model) -> None:
    assert [
        row.line for row in rows(model, {}, {"seed": 0}, {"guidance": model.bundle.manifest.defaults.guidance})
    ] == [1]
    assert [row.stem for row in rows(model, {"name": "a"}, {"name": "b"})] == [
        f"{name}-{rows(model, {})[0].key}" for name in "ab"
    ]


def test_whatever_a_video_depends_on_is_in_its_key(model: Model, bundle: Path, tmp_path: Path) -> None:
    lines: list[dict[str, Any] | str] = [
        {},
        {"prompt": "a cat"},
        {"steps": 3},
        {"guidance": 2},
        {"seed": 1},
        {"negative_prompt": "x"},
    ]
    lines += [{"policy": "none"}, {"policy": "forecast"}, {"policy": "forecast:tolerance=0.5"}]
    keys = [row.key for row in rows(model, *lines)]
    assert len(set(keys)) == len(lines)
    assert rows(model, {}, cache_memory=1 << 20)[0].key not in keys
    other = edit_manifest(copy_bundle(bundle, tmp_path / "other"), lambda manifest: manifest["defaults"].update(fps=30))
    assert rows(open_model(other), {})[0].key not in keys


def test_a_profile_is_the_policy_that_it_was_then(bundle: Path, tmp_path: Path) -> None:
    def keys(profile: PolicyProfile) -> list[str]:
        folder = copy_bundle(bundle, tmp_path / str(len(list(tmp_path.iterdir()))))
        edit_manifest(folder, lambda manifest: manifest.update(profiles=[msgspec.to_builtins(profile)]))
        found = rows(
            open_model(folder), {"profile": "quick", "steps": 4}, {"policy": "forecast:tolerance=0.25", "steps": 4}
        )
        return [row.key for row in found]

    first, tuned = keys(profile_of("quick")), keys(profile_of("quick", settings={"tolerance": 0.5}))
    assert len(first) == 1  # said in two ways, it is the same
    assert len(tuned) == 2 and tuned[1] == first[0]


def test_a_row_that_fails_is_written_down_and_no_other_is_touched(bundle: Path, model: Model, tmp_path: Path) -> None:
    pipeline, backend = watched_pipeline(bundle)
    backend.before = fail_at(0, is_block)
    folder, (bad, good) = BatchFolder(tmp_path, "npy"), rows(model, {"name": "bad"}, {"seed": 1})
    with folder.opened():
        outcomes = [folder.make(pipeline, row) for row in (bad, good)]
    assert [outcome.status for outcome in outcomes] == ["failed", "made"]
    (record,) = tmp_path.glob("*.failed.json")
    told = json.loads(record.read_text())
    assert record.name == f"bad-{bad.key}.failed.json"
    assert (told["line"], told["prompt"], told["code"]) == (1, "a dog", "engine_error")
    assert "injected fault" in told["message"] and "Traceback" not in told["message"]
    assert folder.missing([bad, good]) == [bad]
    with folder.opened():
        assert folder.make(pipeline, bad).status == "made"
    assert {path.name for path in tmp_path.iterdir()} == {folder.file(bad).name, folder.file(good).name}


def test_a_row_is_made_by_the_bundle_that_it_was_checked_against(
    pipeline: VideoPipeline, model: Model, tmp_path: Path
) -> None:
    (row,) = rows(model, {})
    other = msgspec.structs.replace(row, bundle="0" * 64)
    with pytest.raises(IntegrityError, match="is another one than when its requests were checked"):
        BatchFolder(tmp_path, "npy").make(pipeline, other)
    assert snapshot(tmp_path) == {}


def test_what_had_no_effect_on_a_row_is_noted(pipeline: VideoPipeline, model: Model, tmp_path: Path) -> None:
    folder = BatchFolder(tmp_path, "npy")
    quiet, noted = rows(model, {"steps": 6}, {"steps": 6, "guidance": 1, "negative_prompt": "x"})
    assert folder.make(pipeline, quiet).notes == ()
    (note,) = folder.make(pipeline, noted).notes
    assert note.startswith("negative_prompt: not read")


def test_what_is_there_is_not_made_again(pipeline: VideoPipeline, model: Model, tmp_path: Path) -> None:
    folder, (row,) = BatchFolder(tmp_path, "npy"), rows(model, {})
    folder.file(row).write_bytes(b"as it was")
    assert folder.make(pipeline, row).status == "there"
    assert folder.file(row).read_bytes() == b"as it was"


def test_a_cancelled_row_leaves_nothing(pipeline: VideoPipeline, model: Model, tmp_path: Path) -> None:
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(Cancelled):
        BatchFolder(tmp_path, "npy").make(pipeline, rows(model, {})[0], cancel=cancel)
    assert snapshot(tmp_path) == {}


def test_one_process_at_a_time_has_the_folder_and_what_a_killed_one_left_is_removed(
    pipeline: VideoPipeline, model: Model, tmp_path: Path
) -> None:
    folder, (row,) = BatchFolder(tmp_path / "new", "npy"), rows(model, {})
    folder.path.mkdir()
    (folder.path / f".{row.stem}.npy.abc_1234").mkdir()
    (folder.path / f".{row.stem}.npy.abc_1234" / "half").write_bytes(b"")
    (folder.path / ".mine").mkdir()
    with folder.opened():
        assert [path.name for path in folder.path.iterdir()] == [".mine"]
        with pytest.raises(OutputError, match="another process is writing to it"), BatchFolder(folder.path).opened():
            pass
