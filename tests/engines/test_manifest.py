"""A manifest is read as it was written, or refused: in one line, with something to do about it."""

from __future__ import annotations

import copy
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from foresight.engines.bundle import MANIFEST, SCHEMA, open_bundle, verify_files
from foresight.engines.errors import BundleError, IntegrityError
from foresight.engines.manifest import Manifest
from foresight.runtime.pipeline import load
from tests.support import Json, copy_bundle, edit_manifest, json_paths, read_manifest

FILE = "text_encoder.onnx"


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
        b'{"schema": 4}',
        b'{"schema": 4, "model": "\xff"}',
        b'{"schema": 4, "mod\xffel": "latte"}',
        b'{"schema": 4, "model": "\\ud800"}',
        b'{"schema": 4, "model": ' + b"[" * 100_000,
        b'{"schema": 4, "nested": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
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
    "place",
    [
        (),
        ("shape",),
        ("text",),
        ("sampler",),
        ("blocks", 1),
        ("blocks", 0, "inputs", 0),
        ("files", FILE),
    ],
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
    ("bytes", lambda manifest: manifest["files"][FILE].update(bytes="all")),
    ("lowercase", lambda manifest: manifest["text"].update(lowercase=1)),
]


@pytest.mark.parametrize(("key", "change"), WRONG_TYPES, ids=[key for key, _ in WRONG_TYPES])
def test_a_value_of_the_wrong_type_is_named(copied: Path, key: str, change: Callable[[Json], Any]) -> None:
    edit_manifest(copied, change)
    with pytest.raises(IntegrityError, match=r"manifest.json is not valid.*at `"):
        open_bundle(copied)


@pytest.mark.parametrize("key", [field.name for field in msgspec.structs.fields(Manifest) if field.required])
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
