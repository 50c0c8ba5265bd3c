"""A bundle is read as it was written, or refused: by the right error, in one line, with something to do about it."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest

from foresight.engines.bundle import MANIFEST, newest_bundle, open_bundle, verify_files
from foresight.engines.errors import BundleError, ForesightError, IntegrityError
from foresight.engines.manifest import Manifest
from foresight.runtime.pipeline import load
from tests.support import Json, copy_bundle, edit_manifest, vouch_for

BLOCKS = [f"block.{index:03d}" for index in range(4)]
PARTS = ["text_encoder", "condition", "prologue", *BLOCKS, "epilogue", "vae_decoder"]
FILES = [f"{part}.{suffix}" for part in PARTS for suffix in ("onnx", "data")] + ["tokenizer.json", "sampler.npz"]


@pytest.fixture
def copied(bundle: Path, tmp_path: Path) -> Path:
    """A bundle to damage."""
    return copy_bundle(bundle, tmp_path / "copied")


def check(folder: Path) -> None:
    verify_files(open_bundle(folder))


# What a bundle is


def test_an_exported_bundle_is_intact(bundle: Path) -> None:
    check(bundle)


def test_a_bundle_holds_the_files_that_these_tests_damage(bundle: Path) -> None:
    assert sorted(open_bundle(bundle).manifest.files) == sorted(FILES)
    assert sorted(path.name for path in bundle.iterdir()) == sorted([*FILES, MANIFEST])


def test_a_manifest_survives_being_written_and_read(bundle: Path) -> None:
    manifest = open_bundle(bundle).manifest
    assert msgspec.json.decode(msgspec.json.encode(manifest), type=Manifest) == manifest


def test_the_id_changes_with_the_manifest(copied: Path) -> None:
    before = open_bundle(copied).id
    edit_manifest(copied, lambda manifest: manifest["defaults"].update(fps=9))
    assert open_bundle(copied).id != before


def test_records_cannot_be_changed(bundle: Path) -> None:
    with pytest.raises(AttributeError):
        open_bundle(bundle).manifest.schema = 3  # type: ignore[misc]


def test_parts_come_in_the_order_in_which_a_request_runs_them(bundle: Path) -> None:
    assert [part.name for part in open_bundle(bundle).manifest.parts] == PARTS


def test_cache_bytes_are_the_stream_times_the_blocks(bundle: Path) -> None:
    frames, tokens, dim, fp32 = 3, 16, 40, 4
    assert open_bundle(bundle).manifest.cache_bytes(2) == 2 * len(BLOCKS) * frames * tokens * dim * fp32


# Where there is no bundle


def no_folder(folder: Path) -> Path:
    return folder / "nowhere"


def empty_folder(folder: Path) -> Path:
    return folder


def regular_file(folder: Path) -> Path:
    (folder / "file").write_text("")
    return folder / "file"


def half_written(folder: Path) -> Path:
    (folder / "bundle.partial").mkdir()
    (folder / "bundle.partial" / "state.json").write_text("{}")
    return folder / "bundle.partial"


@pytest.mark.parametrize("make", [no_folder, empty_folder, regular_file, half_written])
def test_what_is_no_bundle_is_a_bundle_error(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    with pytest.raises(BundleError, match=r"export --model") as caught:
        open_bundle(make(tmp_path))
    assert caught.value.exit_code == 3


def test_the_newest_bundle_is_the_one_written_last(bundle: Path, tmp_path: Path) -> None:
    for age, name in enumerate(("b", "a", "c")):
        copied = copy_bundle(bundle, tmp_path / name)
        for place in (copied / MANIFEST, copied):
            os.utime(place, (1000 - age, 1000 - age))
    assert newest_bundle(tmp_path) == tmp_path / "b"


def test_a_half_written_bundle_is_never_the_newest(bundle: Path, tmp_path: Path) -> None:
    os.utime(copy_bundle(bundle, tmp_path / "whole") / MANIFEST, (1000, 1000))
    copy_bundle(bundle, tmp_path / "other.partial")
    assert newest_bundle(tmp_path) == tmp_path / "whole"


@pytest.mark.parametrize("root", [".", "missing"])
def test_without_a_bundle_there_is_no_newest(tmp_path: Path, root: str) -> None:
    with pytest.raises(BundleError, match="no bundle under"):
        newest_bundle(tmp_path / root)


# Files that differ


@pytest.mark.parametrize("name", FILES)
def test_one_changed_byte_in_any_file_is_noticed(copied: Path, name: str) -> None:
    content = bytearray((copied / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copied / name).write_bytes(content)
    with pytest.raises(IntegrityError, match=rf"{name} was altered"):
        check(copied)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_noticed(copied: Path, name: str) -> None:
    (copied / name).unlink()
    with pytest.raises(IntegrityError, match=rf"{name} is missing"):
        check(copied)


def test_a_truncated_file_is_noticed_by_its_size(copied: Path) -> None:
    os.truncate(copied / "prologue.data", 100)
    with pytest.raises(IntegrityError, match=r"prologue.data has 100 bytes, expected \d+"):
        check(copied)


def test_a_file_that_became_a_folder_is_noticed(copied: Path) -> None:
    (copied / "sampler.npz").unlink()
    (copied / "sampler.npz").mkdir()
    with pytest.raises(IntegrityError, match="sampler.npz"):
        check(copied)


@pytest.mark.parametrize("name", ["extra.onnx", ".hidden", "state.json", "block.000.data.bak"])
def test_an_extra_file_is_refused(copied: Path, name: str) -> None:
    (copied / name).write_bytes(b"")
    with pytest.raises(IntegrityError, match="is not in its manifest"):
        check(copied)


@pytest.mark.parametrize("name", ["epilogue.onnx", "block.001.data", "sampler.npz"])
def test_a_link_is_refused_even_to_the_right_content(copied: Path, tmp_path: Path, name: str) -> None:
    (copied / name).rename(tmp_path / name)
    (copied / name).symlink_to(tmp_path / name)
    with pytest.raises(IntegrityError, match=f"{name} is a link"):
        check(copied)


def test_an_integrity_error_has_exit_code_4(copied: Path) -> None:
    (copied / "extra").write_bytes(b"")
    with pytest.raises(IntegrityError) as caught:
        check(copied)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("name", ["epilogue.onnx", "tokenizer.json", "sampler.npz"])
def test_loading_verifies_first(copied: Path, name: str) -> None:
    os.truncate(copied / name, 10)
    with pytest.raises(IntegrityError, match=name):
        load(copied)


# Files whose hash was made to match


def test_a_pickled_sampler_is_not_unpickled(copied: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "trapped",))

    with zipfile.ZipFile(copied / "sampler.npz", "w") as file:
        for name in ("timesteps", "input_scales", "sample_coefficients", "output_coefficients", "noise_scales"):
            with file.open(f"{name}.npy", "w") as member:
                header = {"descr": "|O", "fortran_order": False, "shape": (1,)}
                np.lib.format.write_array_header_1_0(member, header)
                pickle.dump(Trap(), member)
    with pytest.raises(IntegrityError, match=r"sampler.npz: is not a sampler table"):
        load(vouch_for(copied, "sampler.npz"))
    assert not (tmp_path / "trapped").exists()


def empty_file(path: Path) -> None:
    path.write_bytes(b"")


def broken_zip(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def no_zip(path: Path) -> None:
    path.write_bytes(b"nothing of the kind")


def one_array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


def one_column_lost(path: Path) -> None:
    with np.load(path) as columns:
        np.savez(path, **{name: columns[name] for name in columns.files if name != "timesteps"})


def short_noise_scales(path: Path) -> None:
    with np.load(path) as columns:
        np.savez(path, **(dict(columns) | {"noise_scales": columns["noise_scales"][:1]}))


def flat_coefficients(path: Path) -> None:
    with np.load(path) as columns:
        np.savez(path, **(dict(columns) | {"sample_coefficients": columns["sample_coefficients"][:, 0]}))


def single_precision(path: Path) -> None:
    with np.load(path) as columns:
        np.savez(path, **(dict(columns) | {"timesteps": columns["timesteps"].astype(np.float32)}))


def too_few_rows(path: Path) -> None:
    with np.load(path) as columns:
        np.savez(path, **{name: columns[name][:10] for name in columns.files})


@pytest.mark.parametrize(
    "damage",
    [
        empty_file,
        broken_zip,
        no_zip,
        one_array,
        one_column_lost,
        short_noise_scales,
        flat_coefficients,
        single_precision,
        too_few_rows,
    ],
)
def test_a_sampler_that_is_no_table_is_an_integrity_error(copied: Path, damage: Callable[[Path], None]) -> None:
    damage(copied / "sampler.npz")
    with pytest.raises(IntegrityError, match="sampler.npz"):
        load(vouch_for(copied, "sampler.npz"))


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff\xfe", b'{"version": "1.0"}'])
def test_a_tokenizer_that_is_none_is_an_integrity_error(copied: Path, content: bytes) -> None:
    (copied / "tokenizer.json").write_bytes(content)
    with pytest.raises(IntegrityError, match="tokenizer.json"):
        load(vouch_for(copied, "tokenizer.json"))


def add_native_code(path: Path) -> None:
    model = onnx.load(path, load_external_data=False)
    node = onnx.helper.make_node("EPContext", [], ["unused"], domain="com.microsoft", ep_cache_context="payload")
    model.graph.node.append(node)
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    path.write_bytes(model.SerializeToString())


def test_a_graph_with_native_code_is_refused(copied: Path) -> None:
    add_native_code(copied / "epilogue.onnx")
    with pytest.raises(IntegrityError, match="epilogue.onnx carries native code"):
        check(vouch_for(copied, "epilogue.onnx"))


def test_native_code_does_not_pass_under_another_file_name(copied: Path) -> None:
    add_native_code(copied / "epilogue.onnx")
    (copied / "epilogue.onnx").rename(copied / "epilogue.graph")

    def rename(manifest: Json) -> None:
        manifest["epilogue"]["graph"] = "epilogue.graph"
        manifest["files"]["epilogue.graph"] = manifest["files"].pop("epilogue.onnx")

    with pytest.raises(IntegrityError, match="epilogue.graph"):
        check(vouch_for(edit_manifest(copied, rename), "epilogue.graph"))


def point_weights_at(graph: Path, location: str) -> None:
    model = onnx.load(graph, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    graph.write_bytes(model.SerializeToString())


@pytest.mark.parametrize("absolute", [False, True], ids=["relative", "absolute"])
def test_weights_outside_the_bundle_are_refused(copied: Path, tmp_path: Path, absolute: bool) -> None:
    (tmp_path / "outside.data").write_bytes((copied / "epilogue.data").read_bytes())
    point_weights_at(copied / "epilogue.onnx", str(tmp_path / "outside.data") if absolute else "../outside.data")
    with pytest.raises(ForesightError, match="epilogue"):
        load(vouch_for(copied, "epilogue.onnx"))


@pytest.mark.parametrize("content", [b"no graph", b""])
def test_a_graph_that_is_none_is_one_of_our_errors(copied: Path, content: bytes) -> None:
    (copied / "epilogue.onnx").write_bytes(content)
    with pytest.raises(ForesightError, match="epilogue"):
        load(vouch_for(copied, "epilogue.onnx"))
