"""A server of signed bundles: it takes no others, in no process, and nothing is loaded over HTTP."""

from __future__ import annotations

from pathlib import Path

import pytest

from foresight.engines.bundle import open_bundle
from foresight.engines.errors import IntegrityError
from foresight.engines.signatures import generate_key, read_private_key, read_public_keys
from foresight.engines.signing import sign_bundle
from foresight.serving.service import VideoService
from foresight.serving.settings import ServerSettings, WorkerSettings
from foresight.serving.spec import open_models
from foresight.serving.worker import load_pipelines
from tests.serving.conftest import create, ended, served, settings_of
from tests.support import copy_bundle


@pytest.fixture
def signed(bundle: Path, tmp_path: Path) -> tuple[Path, WorkerSettings]:
    """A signed bundle, and the settings with which it is served."""
    folder = copy_bundle(bundle, tmp_path / "signed")
    keys = read_public_keys([generate_key(tmp_path / "key.pem")])
    sign_bundle(open_bundle(folder), read_private_key(tmp_path / "key.pem"))
    return folder, WorkerSettings({"tiny": folder}, threads=1, signed_by=keys)


def settings(signed: tuple[Path, WorkerSettings], data: Path) -> ServerSettings:
    return settings_of(signed[0], data, worker=signed[1])


def test_what_was_signed_is_served(signed: tuple[Path, WorkerSettings], tmp_path: Path) -> None:
    with served(settings(signed, tmp_path / "data")) as (client, _):
        assert ended(client, create(client)["id"])["status"] == "completed"


def test_no_process_opens_what_was_not_signed(signed: tuple[Path, WorkerSettings], tmp_path: Path) -> None:
    folder, worker = signed
    (folder / "manifest.sig").write_bytes(bytes(64))
    for attempt in (
        lambda: open_models(worker),
        lambda: dict(load_pipelines(worker)),
        lambda: VideoService(settings(signed, tmp_path / "data")),
    ):
        with pytest.raises(IntegrityError, match="is no signature of its manifest"):
            attempt()


def test_the_table_that_requests_are_checked_against_is_the_one_that_was_signed(
    signed: tuple[Path, WorkerSettings],
) -> None:
    folder, worker = signed
    content = bytearray((folder / "sampler.npz").read_bytes())
    content[-1] ^= 1
    (folder / "sampler.npz").write_bytes(content)
    with pytest.raises(IntegrityError, match=r"sampler\.npz was altered"):
        open_models(worker)


def test_nothing_is_loaded_over_http(signed: tuple[Path, WorkerSettings], tmp_path: Path) -> None:
    with served(settings(signed, tmp_path / "data"), ready=False) as (client, _):
        paths = client.get("/openapi.json").json()["paths"]
        writing = {(path, method) for path, methods in paths.items() for method in set(methods) - {"get"}}
        assert writing == {("/v1/videos", "post"), ("/v1/videos/{video_id}", "delete")}
        for path in ("/v1/models", "/v1/models/tiny", "/v1/load", "/load"):
            assert client.post(path, json={"path": "/tmp", "url": "https://example.com"}).status_code in (404, 405)
