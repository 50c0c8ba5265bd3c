"""package --triton: a model repository, whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from foresight.engines.bundle import open_bundle
from tests.commands.support import Cli, assert_refused, document
from tests.support import copy_bundle, snapshot


def test_a_repository_has_a_configuration_a_model_and_the_bundle(
    foresight_cli: Cli, bundle: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "repository"
    told = document(foresight_cli("package", "--triton", folder, f"tiny={bundle}", f"other={bundle}", "--json"))
    assert [model["name"] for model in told["models"]] == ["tiny", "other"]
    for model in told["models"]:
        path = Path(model["path"])
        assert (path, model["instances"]) == (folder / model["name"], "KIND_CPU")
        assert {entry.name for entry in path.iterdir()} == {"1", "config.pbtxt"}
        assert {entry.name for entry in (path / "1").iterdir()} == {"bundle", "model.py"}
        assert snapshot(path / "1" / "bundle") == snapshot(bundle)
        assert model["bundle"] == open_bundle(bundle).id
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "instance_group { count: 1 kind: KIND_CPU }"),
        (["--device", "cpu"], "instance_group { count: 1 kind: KIND_CPU }"),
        (["--device", "cuda"], "instance_group { count: 1 kind: KIND_GPU }"),
        (["--device", "cuda:1"], "instance_group { count: 1 kind: KIND_GPU gpus: [ 1 ] }"),
        (["--backend", "tensorrt"], "instance_group { count: 1 kind: KIND_GPU }"),
        (["--backend", "openvino", "--device", "gpu"], 'parameters { key: "device" value { string_value: "gpu" } }'),
        (["--cache-memory", "2"], 'parameters { key: "cache_memory" value { string_value: "2097152" } }'),
        (["--low-memory"], 'parameters { key: "low_memory" value { string_value: "true" } }'),
    ],
)
def test_the_configuration_says_how_it_is_run(
    foresight_cli: Cli, bundle: Path, tmp_path: Path, options: list[str], expected: str
) -> None:
    foresight_cli("package", "--triton", tmp_path / "repository", f"tiny={bundle}", *options)
    assert expected in (tmp_path / "repository" / "tiny" / "config.pbtxt").read_text().splitlines()


def test_a_bundle_with_engines_for_a_gpu_is_for_gpus(foresight_cli: Cli, bundle: Path, tmp_path: Path) -> None:
    compiled = copy_bundle(bundle, tmp_path / "compiled") / "engines" / "tensorrt-0123"
    compiled.mkdir(parents=True)
    (compiled / "engines.json").write_text("{}")
    (compiled.parent / "tensorrt-4567.partial").mkdir()
    told = document(foresight_cli("package", "--triton", "repository", tmp_path / "compiled", "--json"))
    assert told["models"][0]["instances"] == "KIND_GPU"
    engines = tmp_path / "repository" / "compiled" / "1" / "bundle" / "engines"
    assert [entry.name for entry in engines.iterdir()] == ["tensorrt-0123"]


def test_a_folder_with_something_in_it_is_left_alone(foresight_cli: Cli, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository" / "notes").touch()
    assert_refused(foresight_cli("package", "--triton", "repository", bundle), 1, "is there and not empty")
    assert snapshot(tmp_path) == {"repository/notes": b""}
    (tmp_path / "repository" / "notes").unlink()
    assert foresight_cli("package", "--triton", "repository", bundle).code == 0


def test_of_a_bundle_that_is_damaged_nothing_is_written(foresight_cli: Cli, bundle: Path, tmp_path: Path) -> None:
    damaged = copy_bundle(bundle, tmp_path / "damaged")
    (damaged / "epilogue.data").write_bytes(b"")
    outcome = foresight_cli("package", "--triton", "repository", f"whole={bundle}", damaged)
    assert_refused(outcome, 4, r"epilogue\.data has 0 bytes")
    assert [entry.name for entry in tmp_path.iterdir()] == ["damaged"]


@pytest.mark.parametrize("name", ["", "..", "a/b", ".x", "a b"])
def test_a_name_that_is_no_folder_is_refused(foresight_cli: Cli, bundle: Path, name: str) -> None:
    assert_refused(foresight_cli("package", "--triton", "repository", f"{name}={bundle}"), 2, "bundles: got the name")


def test_keys_must_have_signed_it(foresight_cli: Cli, bundle: Path, tmp_path: Path) -> None:
    signed = copy_bundle(bundle, tmp_path / "signed")
    foresight_cli("sign", "--generate", "key.pem")
    arguments = ("package", "--triton", "repository", signed, "--signed-by", "key.pub.pem")
    assert_refused(foresight_cli(*arguments), 4, r"manifest\.sig is missing")
    foresight_cli("sign", signed, "--key", "key.pem")
    assert foresight_cli(*arguments).code == 0
    config = (tmp_path / "repository" / "signed" / "config.pbtxt").read_text()
    assert f'key: "signed_by" value {{ string_value: "{tmp_path}/key.pub.pem" }}' in config
