"""A bundle is read as it was written, or refused: by the right error, in one line, with something to do about it."""

from __future__ import annotations

import copy
import errno
import json
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
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from foresight.engines.bundle import (
    MANIFEST,
    SCHEMA,
    newest_bundle,
    open_bundle,
    verify_files,
)
from foresight.engines.errors import BundleError, ForesightError, IntegrityError
from foresight.engines.manifest import Manifest
from foresight.runtime.pipeline import load
from tests.support import Json, copy_bundle, edit_manifest, json_paths, read_manifest, vouch_for

BLOCKS = [f"block.{index:03d}" for index in range(4)]
PARTS = ["text_encoder", "condition", "prologue", *BLOCKS, "epilogue", "vae_decoder"]
FILES = [f"{part}.{suffix}" for part in PARTS for suffix in ("onnx", "data")] + ["tokenizer.json", "sampler.npz"]


@pytest.fixture
def copied(bundle: Path, tmp_path: Path) -> Path:
    """A bundle to damage."""
    return copy_bundle(bundle, tmp_path / "copied")


@pytest.fixture(scope="module")
def scratch(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose manifest the property tests overwrite again and again."""
    return copy_bundle(bundle, tmp_path_factory.mktemp("scratch") / "bundle")


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


# Manifests that are none


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"1",
        b"{}",
        b'{"schema": "1"}',
        b'{"schema": 1.5}',
        b'{"schema": true}',
        b'{"schema": 1e400}',
        b'{"schema": 1' + b"0" * 5000 + b"}",
        b'{"schema": 3}',
        b'{"schema": 3, "model": "\xff"}',
        b'{"schema": 3, "mod\xffel": "latte"}',
        b'{"schema": 3, "model": "\\ud800"}',
        b'{"schema": 3, "model": ' + b"[" * 100_000,
        b'{"schema": 3, "nested": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b"\x80\x04N.",
    ],
    ids=lambda raw: repr(raw[:30]),
)
def test_a_manifest_that_is_none_is_an_integrity_error(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / MANIFEST).write_bytes(raw)
    with pytest.raises(IntegrityError, match="manifest.json"):
        open_bundle(tmp_path)


def test_a_bundle_that_cannot_be_read_is_not_called_missing(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    opened = open_bundle(copied)
    attempts: list[tuple[Any, str, str, Callable[[], object]]] = [
        (os, "fdopen", "[a-z_.0-9]+", lambda: verify_files(opened)),
        (Path, "iterdir", "it", lambda: verify_files(opened)),
        (os, "fdopen", "manifest.json", lambda: open_bundle(copied)),
    ]
    for owner, function, name, attempt in attempts:
        with monkeypatch.context() as patch:
            patch.setattr(owner, function, refuse)
            message = rf"bundle .*: {name} cannot be read \(Permission denied\); check its owner and permissions"
            with pytest.raises(BundleError, match=message):
                attempt()


def test_an_older_schema_needs_another_export(copied: Path) -> None:
    edit_manifest(copied, lambda manifest: manifest.update(schema=1))
    with pytest.raises(BundleError, match="has schema 1, this version reads .*; export again"):
        open_bundle(copied)


def test_a_newer_schema_needs_a_newer_version(copied: Path) -> None:
    edit_manifest(copied, lambda manifest: manifest.update(schema=SCHEMA + 1, invention={"from": "the future"}))
    with pytest.raises(BundleError, match=rf"has schema {SCHEMA + 1}, this version reads {SCHEMA}; upgrade"):
        open_bundle(copied)


@pytest.mark.parametrize("schema", [0, -1])
def test_a_schema_that_never_was_is_refused(copied: Path, schema: int) -> None:
    edit_manifest(copied, lambda manifest: manifest.update(schema=schema))
    with pytest.raises((BundleError, IntegrityError), match="schema"):
        open_bundle(copied)


@pytest.mark.parametrize(
    "place", [(), ("shape",), ("text",), ("sampler",), ("blocks", 1), ("blocks", 0, "inputs", 0), ("files", FILES[0])]
)
def test_an_unknown_key_is_refused_wherever_it_is(copied: Path, place: tuple[Any, ...]) -> None:
    def change(manifest: Json) -> None:
        at: Any = manifest
        for key in place:
            at = at[key]
        at["surprise"] = 1

    edit_manifest(copied, change)
    with pytest.raises(IntegrityError, match="surprise"):
        open_bundle(copied)


WRONG_TYPES: list[tuple[str, Callable[[Json], Any]]] = [
    ("blocks", lambda manifest: manifest.update(blocks={})),
    ("dtype", lambda manifest: manifest.update(dtype="fp8")),
    ("opset", lambda manifest: manifest.update(opset="23")),
    ("frames", lambda manifest: manifest["shape"].update(frames=2.5)),
    ("latents", lambda manifest: manifest["shape"].update(latents=None)),
    ("max_difference", lambda manifest: manifest["prologue"].update(max_difference="small")),
    ("batch", lambda manifest: manifest["ranges"].update(batch=[1, 2, 3])),
    ("guidance_order", lambda manifest: manifest.update(guidance_order="random")),
    ("bytes", lambda manifest: manifest["files"][FILES[0]].update(bytes="all")),
    ("lowercase", lambda manifest: manifest["text"].update(lowercase=1)),
]


@pytest.mark.parametrize(("key", "change"), WRONG_TYPES, ids=[key for key, _ in WRONG_TYPES])
def test_a_value_of_the_wrong_type_is_named(copied: Path, key: str, change: Callable[[Json], Any]) -> None:
    edit_manifest(copied, change)
    with pytest.raises(IntegrityError, match=r"manifest.json is not valid.*at `"):
        open_bundle(copied)


@pytest.mark.parametrize("key", Manifest.__struct_fields__)
def test_a_missing_key_is_refused(copied: Path, key: str) -> None:
    edit_manifest(copied, lambda manifest: manifest.pop(key))
    with pytest.raises(IntegrityError, match=key):
        open_bundle(copied)


@pytest.mark.parametrize(
    "name", ["../outside.onnx", "/etc/passwd", "a/b.onnx", "..", ".", "", ".hidden", "a\\b", "a b", "a\n", "é.onnx"]
)
def test_a_file_name_that_is_not_plain_is_refused(copied: Path, name: str) -> None:
    def change(manifest: Json) -> None:
        manifest["files"][name] = manifest["files"].pop("epilogue.onnx")
        manifest["epilogue"]["graph"] = name

    edit_manifest(copied, change)
    with pytest.raises(IntegrityError, match="leaves the bundle or is not plain"):
        open_bundle(copied)


def move(key: str, source: str, target: str) -> Callable[[Json], Any]:
    """A change that renames a key."""
    return lambda manifest: manifest[key].update({target: manifest[key].pop(source)})


def retype(part: str, direction: str, **change: Any) -> Callable[[Json], Any]:
    """A change of a part's first input or output."""
    return lambda manifest: manifest[part][direction][0].update(change)


CONTRADICTIONS: dict[str, Callable[[Json], Any]] = {
    "a graph without a hash": lambda manifest: manifest["files"].pop("block.002.onnx"),
    "a tokenizer without a hash": lambda manifest: manifest["files"].pop("tokenizer.json"),
    "a sampler without a hash": lambda manifest: manifest["files"].pop("sampler.npz"),
    "no blocks": lambda manifest: manifest.update(blocks=[], cache_bytes_per_row={}),
    "two blocks of one name": lambda manifest: manifest["blocks"][1].update(name="block.000"),
    "a block without cache bytes": lambda manifest: manifest["cache_bytes_per_row"].pop("block.000"),
    "cache bytes of no block": lambda manifest: manifest["cache_bytes_per_row"].update({"block.999": 1}),
    "wrong cache bytes": lambda manifest: manifest["cache_bytes_per_row"].update({"block.000": 1}),
    "a dimension without a range": lambda manifest: manifest["ranges"].pop("tokens"),
    "no range for the batch": lambda manifest: manifest["ranges"].pop("batch"),
    "an empty range": lambda manifest: manifest["ranges"].update(tokens=[5, 4]),
    "a range of nothing": lambda manifest: manifest["ranges"].update(tokens=[0, 0]),
    "a batch too small for guidance": lambda manifest: manifest["ranges"].update(batch=[1, 1]),
    "a stream that no block has": lambda manifest: manifest.update(streams=["hidden", "audio"]),
    "no stream": lambda manifest: manifest.update(streams=[]),
    "a block without its stream": lambda manifest: manifest["blocks"][1]["inputs"][0].update(name="other"),
    "a block without a distance": lambda manifest: manifest["blocks"][1]["outputs"].pop(),
    "blocks of two stream widths": lambda manifest: manifest["blocks"][1]["outputs"][0].update(
        shape=["batch", 3, "tokens", 41]
    ),
    "an input that nothing provides": retype("epilogue", "inputs", name="mystery"),
    "latents of two shapes": lambda manifest: manifest["shape"].update(latents=[4, 3, 8, 9]),
    "latents of no shape": lambda manifest: manifest["shape"].update(latents=[]),
    "frames of another height": lambda manifest: manifest["shape"].update(height=99),
    "no decoder": lambda manifest: manifest.update(decoder=[]),
    "no frames to decode at a time": lambda manifest: manifest["decoder"][0].update(chunks=[0, 3]),
    "more frames at a time than the decoder takes": lambda manifest: manifest["ranges"].update(frames=[1, 2]),
    "fewer frames than a video has": lambda manifest: manifest["decoder"][0].update(chunks=[2]),
    "frames along no axis": lambda manifest: manifest["decoder"][0].update(axis=4),
    "a decoder after the last": lambda manifest: manifest["decoder"].append(manifest["decoder"][0]),
    "a later chunk of another kind": lambda manifest: manifest["decoder"][0].update(next=manifest["epilogue"]),
    "a stage of the decoder named as a part before it": lambda manifest: manifest["decoder"][0]["first"].update(
        name="epilogue"
    ),
    "a negative prompt beside a null caption": lambda manifest: (
        manifest["text"].update(null_caption=True),
        manifest["defaults"].update(negative_prompt="ugly"),
    ),
    "no prompts in a batch": lambda manifest: manifest["shape"].update(max_batch=0),
    "a batch larger than its range": lambda manifest: manifest["shape"].update(max_batch=99),
    "no tokens": lambda manifest: manifest["text"].update(max_tokens=0),
    "more tokens than the text encoder takes": lambda manifest: manifest["text"].update(max_tokens=121),
    "more steps than the table has": lambda manifest: manifest["sampler"].update(max_steps=101),
    "no steps": lambda manifest: manifest["sampler"].update(max_steps=0),
    "another dtype than its parts": retype("prologue", "outputs", dtype="fp16"),
    "a negative size": retype("prologue", "outputs", shape=["batch", 3, -4, 40]),
    "defaults that no request may have": lambda manifest: manifest["defaults"].update(steps=1000),
    "a sample prompt that is empty": lambda manifest: manifest["defaults"].update(prompt=" "),
}


@pytest.mark.parametrize("contradiction", CONTRADICTIONS)
def test_a_manifest_that_contradicts_itself_is_refused_before_anything_runs(copied: Path, contradiction: str) -> None:
    edit_manifest(copied, CONTRADICTIONS[contradiction])
    with pytest.raises(IntegrityError):
        load(copied)


# Any manifest at all

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 300) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


@given(data=st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_mutated_manifest_is_refused_or_means_what_it_says(bundle: Path, scratch: Path, data: st.DataObject) -> None:
    manifest = mutate(read_manifest(bundle), data)
    (scratch / MANIFEST).write_text(json.dumps(manifest))
    try:
        opened = open_bundle(scratch)
        verify_files(opened)
    except (BundleError, IntegrityError) as error:
        assert "\n" not in str(error)
    else:
        assert msgspec.json.decode(msgspec.json.encode(opened.manifest), type=Manifest) == opened.manifest


def mutate(manifest: Json, data: st.DataObject) -> Json:
    """Replace, remove, duplicate or add one to three values anywhere in the manifest."""
    manifest = copy.deepcopy(manifest)
    for _ in range(data.draw(st.integers(1, 3))):
        *place, key = data.draw(st.sampled_from([path for path in json_paths(manifest) if path]))
        parent: Any = manifest
        for step in place:
            parent = parent[step]
        kind = data.draw(st.sampled_from(["replace", "remove", "swap"]))
        if kind == "replace":
            parent[key] = data.draw(VALUES)
        elif kind == "remove":
            del parent[key]
        else:
            other = data.draw(st.sampled_from(list(parent) if isinstance(parent, dict) else range(len(parent))))
            parent[key], parent[other] = parent[other], parent[key]
    return manifest


@given(position=st.floats(0, 1, exclude_max=True), replacement=st.binary(max_size=4), cut=st.integers(0, 4))
@example(position=0.2, replacement=b"\xff", cut=1)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_manifest_bytes_never_raise_anything_but_our_errors(
    bundle: Path, scratch: Path, position: float, replacement: bytes, cut: int
) -> None:
    raw = (bundle / MANIFEST).read_bytes()
    at = int(position * len(raw))
    (scratch / MANIFEST).write_bytes(raw[:at] + replacement + raw[at + cut :])
    try:
        verify_files(open_bundle(scratch))
    except (BundleError, IntegrityError) as error:
        assert "\n" not in str(error)
