"""Jobs survive what happens to workers, disks and the server itself."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from foresight.engines.errors import BundleError, InvalidRequest, OutputError, QueueFull
from foresight.runtime.pipeline import VideoPipeline
from foresight.serving.service import VideoService
from foresight.serving.settings import WorkerSettings
from foresight.serving.spec import Spec
from foresight.serving.store import Record, Store, new_id
from tests.serving import slow
from tests.serving.conftest import processes_of, settings_of, wait_for
from tests.support import copy_bundle

ME = "me"


def spec(**changes: Any) -> Spec:
    return Spec(**{"model": "tiny", "prompt": "a dog", "steps": 2, **changes})


def done(service: VideoService, record: Record) -> Record:
    def found() -> Record | None:
        now = service.get(ME, record.id)
        assert now is not None
        return now if now.status in ("completed", "failed") else None

    ended: Record = wait_for(found)
    return ended


@pytest.mark.parametrize("name", ["deadline", "retention", "drain"])
@pytest.mark.parametrize("seconds", [0.0, -1.0, float("inf"), float("nan")])
def test_times_that_are_none_are_refused(tmp_path: Path, name: str, seconds: float) -> None:
    with pytest.raises(InvalidRequest, match=rf"^{name}: got {seconds:g} seconds, expected more than 0$"):
        settings_of(tmp_path, tmp_path, **{name: seconds})


def test_what_is_turned_away_was_never_there(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = VideoService(settings_of(bundle, tmp_path, waiting=1), slow.main)
    running = service.create(ME, spec(steps=100, policy="none"))
    wait_for(lambda: (service.get(ME, running.id) or running).status == "in_progress")
    waiting = service.create(ME, spec())
    monkeypatch.setattr(service.store, "add", lambda record: pytest.fail("it was shown to others"))
    with pytest.raises(QueueFull, match="while 1 wait, expected fewer than 1") as caught:
        service.create(ME, spec(seed=1))
    assert caught.value.retry_after is None or caught.value.retry_after > 0
    assert {record.id for record in service.store.active(ME)} == {running.id, waiting.id}
    service.close(0)


def test_a_job_is_there_after_a_restart_one_that_waited_goes_on_and_one_that_ran_has_failed(
    bundle: Path, tmp_path: Path, pipeline: VideoPipeline
) -> None:
    service = VideoService(settings_of(bundle, tmp_path), slow.main)
    finished = done(service, service.create(ME, spec(seed=3)))
    running = service.create(ME, spec(steps=100, policy="none"))
    wait_for(lambda: (service.get(ME, running.id) or running).status == "in_progress")
    waiting = service.create(ME, spec(seed=5))
    (tmp_path / "results" / "left-by-a-killed-process").write_bytes(b"")
    shutil.copytree(tmp_path, tmp_path.parent / "as-it-is-now")  # as a power cut would leave it
    service.close(0)

    again = VideoService(settings_of(bundle, tmp_path.parent / "as-it-is-now"))
    assert again.get(ME, finished.id) == finished
    failed = again.get(ME, running.id)
    assert failed is not None and failed.status == "failed" and failed.failure is not None
    assert "was restarted while it made the video" in failed.failure.message
    assert done(again, waiting).status == "completed"
    same = pipeline("a dog", steps=2, seed=5).to_bytes("mp4")
    assert again.store.output(waiting.id).read_bytes() == same
    assert sorted(path.name for path in (again.store.folder / "results").iterdir()) == sorted(
        again.store.output(record.id).name for record in (finished, waiting)
    )
    again.close(0)


def test_after_an_orderly_end_jobs_that_waited_go_on(bundle: Path, tmp_path: Path) -> None:
    service = VideoService(settings_of(bundle, tmp_path), slow.main)
    running = service.create(ME, spec(steps=20))
    wait_for(lambda: (service.get(ME, running.id) or running).status == "in_progress")
    waiting = service.create(ME, spec())
    service.close(30)
    again = VideoService(settings_of(bundle, tmp_path))
    finished = again.get(ME, running.id)
    assert finished is not None and finished.status == "completed"
    assert done(again, waiting).status == "completed"
    again.close(0)


def test_a_worker_that_is_killed_fails_its_job_alone_and_comes_back(
    bundle: Path, tmp_path: Path, pipeline: VideoPipeline
) -> None:
    service = VideoService(settings_of(bundle, tmp_path), slow.main)
    wait_for(lambda: service.ready)
    running = service.create(ME, spec(steps=100, policy="none"))
    wait_for(lambda: (service.get(ME, running.id) or running).status == "in_progress")
    waiting = service.create(ME, spec(seed=6))
    (pid,) = processes_of(service).pids
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    failed = done(service, running)
    assert failed.failure is not None and "worker: ended while it made the video" in failed.failure.message
    assert not service.ready and time.monotonic() - killed < 20
    assert done(service, waiting).status == "completed" and processes_of(service).pids != [pid]
    assert service.store.output(waiting.id).read_bytes() == pipeline("a dog", steps=2, seed=6).to_bytes("mp4")
    service.close(0)


def test_a_disk_that_is_full_fails_a_job_and_loses_no_word_of_it(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = VideoService(settings_of(bundle, tmp_path))
    results = service.store.output("x").parent
    results.rmdir()
    results.write_text("no folder")  # what a worker writes to can be neither made nor written
    failed = done(service, service.create(ME, spec()))
    assert failed.status == "failed" and failed.failure is not None and failed.failure.code == "output_error"
    results.unlink()
    results.mkdir()

    def full(store: Store, record: Record) -> None:
        raise OutputError("data: database or disk is full")

    update = Store.update
    monkeypatch.setattr(Store, "update", full)
    record = done(service, service.create(ME, spec()))
    assert record.status == "completed" and service.store.page(ME, None, 1, True)[0] == record
    monkeypatch.setattr(Store, "update", update)
    service.store.tidy(time.time())
    assert Store.get(service.store, record.id) == record
    service.close(0)


def test_a_disk_that_cannot_even_be_read_while_a_job_ends_leaves_nobody_waiting(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = VideoService(settings_of(bundle, tmp_path), slow.main)
    wait_for(lambda: service.ready)
    record = service.create(ME, spec(steps=20))

    def broken(*_: object) -> None:
        raise OutputError("data: disk I/O error")

    with monkeypatch.context() as patch:
        for name in ("_select", "update"):
            patch.setattr(Store, name, broken)
        wait_for(lambda: service.live(record) is None)
    service.store.tidy(time.time())
    found = Store.get(service.store, record.id)
    assert found is not None and found.status == "completed"
    service.close(0)


def test_jobs_and_videos_go_when_their_time_is_over(bundle: Path, tmp_path: Path) -> None:
    service = VideoService(settings_of(bundle, tmp_path, retention=100))
    record = done(service, service.create(ME, spec()))
    assert record.expires_at is not None and record.completed_at is not None
    service.store.tidy(record.expires_at - 1)
    assert service.get(ME, record.id) == record
    service.store.tidy(record.expires_at + 1)
    assert service.get(ME, record.id) is None and not service.store.output(record.id).exists()
    service.close(0)


def test_a_deadline_ends_jobs_that_take_too_long(bundle: Path, tmp_path: Path) -> None:
    service = VideoService(settings_of(bundle, tmp_path, deadline=0.1), slow.main)
    wait_for(lambda: service.ready)
    record = done(service, service.create(ME, spec(steps=100, policy="none")))
    assert record.failure is not None and record.failure.code == "cancelled_deadline"
    service.close(0)


def test_a_bundle_that_cannot_be_served_is_said_at_once_or_as_not_ready(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError):
        VideoService(settings_of(tmp_path / "none", tmp_path / "data"))
    with pytest.raises(InvalidRequest, match="bundles: got none"):
        VideoService(settings_of(bundle, tmp_path / "data", worker=WorkerSettings({})))
    broken = shutil.copytree(bundle, tmp_path / "broken")
    (broken / "block.000.data").write_bytes(b"")
    service = VideoService(settings_of(broken, tmp_path / "data"))
    wait_for(lambda: service.pool.failure)
    assert "block.000.data" in service.pool.failure and not service.ready
    service.close(0)


def test_another_bundle_in_the_place_of_one_that_is_served_is_not_served(
    bundle: Path, single_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = copy_bundle(bundle, tmp_path / "bundle")
    service = VideoService(settings_of(folder, tmp_path / "data"))
    wait_for(lambda: service.ready)
    assert done(service, service.create(ME, spec())).status == "completed"
    folder.rename(tmp_path / "before")
    copy_bundle(single_bundle, folder)
    messages = []
    for kill in (False, True):
        if kill:
            (pid,) = processes_of(service).pids
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            wait_for(lambda: not service.ready)
            wait_for(lambda: service.ready)
        failed = done(service, service.create(ME, spec()))
        assert failed.failure is not None and failed.failure.code == "integrity_error"
        messages.append(failed.failure.message)
    service.close(0)
    assert "was changed or removed after it was verified" in messages[0]
    assert "is another one than when its requests were checked" in messages[1]
    logged = [json.loads(line) for line in capfd.readouterr().err.splitlines() if "a job failed" in line]
    assert [line["level"] for line in logged] == ["error"] * 2  # the operator is told too
    assert messages[0].partition("; ")[2] in logged[0]["reason"]


def test_jobs_of_models_that_are_served_no_longer_have_failed(bundle: Path, tmp_path: Path) -> None:
    store = Store(tmp_path)
    record = store.add(Record(id=new_id(), owner=ME, spec=spec(model="gone"), created_at=time.time()))
    store.close()
    service = VideoService(settings_of(bundle, tmp_path))
    failed = service.get(ME, record.id)
    assert failed is not None and failed.failure is not None and "is served no longer" in failed.failure.message
    service.close(0)


def test_a_store_of_another_version_is_left_alone(tmp_path: Path) -> None:
    import sqlite3

    Store(tmp_path).close()
    connection = sqlite3.connect(tmp_path / "jobs.sqlite")
    connection.execute("PRAGMA user_version=7")
    connection.close()
    with pytest.raises(OutputError, match="has jobs of schema 7, expected 1"):
        Store(tmp_path)


def test_ids_cannot_be_guessed_and_specs_survive_being_stored() -> None:
    assert len({new_id() for _ in range(1000)}) == 1000 and len(new_id()) == 38
    assert msgspec.json.decode(msgspec.json.encode(spec(seed=2**63 - 1)), type=Spec) == spec(seed=2**63 - 1)
