"""The bundle: what an export writes and a runtime reads, and the only thing the two share.

A bundle is a folder with `manifest.json`, one ONNX graph per part with its weights beside it, `tokenizer.json` and
`sampler.npz`. The manifest is typed and versioned and holds the SHA-256 of every other file; `open_bundle` reads it,
and `verify_files` refuses whatever it does not vouch for. Hashes prove that nothing was damaged or swapped; where a
bundle came from is for the reader to know.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from .errors import BundleError, IntegrityError, InvalidRequest

SCHEMA = 1
MANIFEST = "manifest.json"
COMPILED = "engines"
DTYPE_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int64": 8, "uint8": 1, "bool": 1}
_FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")

Dtype = Literal["fp32", "fp16", "bf16", "int64", "uint8", "bool"]


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A part of the manifest: immutable, and an unknown key is an error."""


class TensorSpec(_Record, frozen=True, kw_only=True):
    """A graph's input or output; a dimension is a size, or the name of a range in `Manifest.ranges`."""

    name: str
    dtype: Dtype
    shape: tuple[int | str, ...]

    def resolve(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape with every named dimension replaced by its size."""
        return tuple(dim if isinstance(dim, int) else sizes[dim] for dim in self.shape)


class Part(_Record, frozen=True, kw_only=True):
    """One graph. Parts of one `kind` have the same graph and differ in their weights.

    `max_difference` is the largest absolute difference from the eager module that the export measured on random
    inputs; for uint8 frames it counts grey levels.
    """

    name: str
    kind: str
    graph: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_difference: float

    def input(self, name: str) -> TensorSpec:
        """The input of that name."""
        return next(spec for spec in self.inputs if spec.name == name)

    def output(self, name: str) -> TensorSpec:
        """The output of that name."""
        return next(spec for spec in self.outputs if spec.name == name)


class Source(_Record, frozen=True, kw_only=True):
    """Where the weights came from: the checkpoint as it was named, and a hash over its files."""

    checkpoint: str
    sha256: str


class Shape(_Record, frozen=True, kw_only=True):
    """What one request may ask for. Height and width are in pixels, `latents` is one video's latent shape.

    `max_batch` counts prompts. `decode_frames` is how many frames the VAE decodes at a time.
    """

    height: int
    width: int
    frames: int
    latents: tuple[int, ...]
    max_batch: int
    decode_frames: int


class Text(_Record, frozen=True, kw_only=True):
    """How prompts become tokens: `max_tokens` includes the end token, which survives truncation."""

    tokenizer: str
    max_tokens: int
    pad_id: int
    lowercase: bool
    strip: bool


class Sampler(_Record, frozen=True, kw_only=True):
    """The table of coefficients for 1 … `max_steps` steps, and the diffusers scheduler it was read off."""

    table: str
    scheduler: str
    max_steps: int


class Defaults(_Record, frozen=True, kw_only=True):
    """What a request gets where it says nothing."""

    prompt: str
    negative_prompt: str
    steps: int
    guidance: float
    fps: int


class FileRecord(_Record, frozen=True, kw_only=True):
    """Size and hash of one file."""

    bytes: int
    sha256: str


class Manifest(_Record, frozen=True, kw_only=True):
    """Everything a runtime has to know about a bundle.

    `ranges` gives the smallest and largest size of every named dimension; `batch` counts rows, and a prompt takes two
    with guidance. `streams` are the tensors that run through the blocks: a block reads `x` and `cached_x` and writes
    `new_x` for every stream `x`, and `distance`, the mean squared change per row. `blocks` are in execution order.
    `guidance_order` says which half of a guided batch comes first.
    """

    schema: int
    model: str
    family: str
    source: Source
    generator: dict[str, str]
    dtype: Literal["fp32", "fp16", "bf16"]
    opset: int
    shape: Shape
    ranges: dict[str, tuple[int, int]]
    streams: tuple[str, ...]
    guidance_order: Literal["negative_first", "positive_first"]
    text_encoder: Part
    condition: Part
    prologue: Part
    blocks: tuple[Part, ...]
    epilogue: Part
    vae_decoder: Part
    text: Text
    sampler: Sampler
    defaults: Defaults
    cache_bytes_per_row: dict[str, int]
    files: dict[str, FileRecord]

    @property
    def parts(self) -> tuple[Part, ...]:
        """All parts in the order in which a request runs them."""
        return (
            self.text_encoder,
            self.condition,
            self.prologue,
            *self.blocks,
            self.epilogue,
            self.vae_decoder,
        )

    def cache_bytes(self, rows: int) -> int:
        """Bytes of all cached block outputs of a request with that many rows."""
        return rows * sum(self.cache_bytes_per_row.values())


def part_files(part: Part) -> tuple[str, str]:
    """The names of a part's files: the graph, and the weights it refers to."""
    return part.graph, f"{part.graph.removesuffix('.onnx')}.data"


def stream_bytes_per_row(block: Part, streams: Iterable[str], ranges: Mapping[str, tuple[int, int]]) -> int:
    """Bytes that one row of a block's stream outputs takes in the cache."""
    sizes = {name: largest for name, (_, largest) in ranges.items()} | {"batch": 1}
    specs = [block.output(f"new_{stream}") for stream in streams]
    return sum(DTYPE_BYTES[spec.dtype] * math.prod(spec.resolve(sizes)) for spec in specs)


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. `id` is the SHA-256 of its manifest, and so of its whole content."""

    path: Path
    manifest: Manifest
    id: str

    def file(self, name: str) -> Path:
        """The path of one of the bundle's files."""
        return self.path / name


def open_bundle(path: str | os.PathLike[str]) -> Bundle:
    """Read a bundle's manifest; the files themselves are checked by `verify_files`.

    Raises BundleError where there is no bundle or it needs a newer version, IntegrityError where the manifest is not
    a valid one.
    """
    folder = Path(path)
    try:
        raw = (folder / MANIFEST).read_bytes()
    except OSError as error:
        what = "has no manifest.json, so it is no bundle or a half-written one" if folder.is_dir() else "not found"
        raise BundleError(f"bundle {folder}: {what}; make it with: python cli.py export --model NAME") from error
    try:
        schema = msgspec.json.decode(raw, type=_SchemaOnly).schema
        if schema > SCHEMA:
            raise BundleError(
                f"bundle {folder}: has schema {schema}, this version reads up to {SCHEMA}; upgrade foresight-engines, "
                "or export again"
            )
        manifest = msgspec.json.decode(raw, type=Manifest)
    except msgspec.DecodeError as error:
        raise IntegrityError(f"bundle {folder}: manifest.json is not valid ({error}); export again") from error
    _check_names(folder, manifest)
    return Bundle(path=folder, manifest=manifest, id=hashlib.sha256(raw).hexdigest())


def newest_bundle(root: str | os.PathLike[str] = "bundles") -> Path:
    """The most recently written bundle under `root`. Raises BundleError."""
    found = sorted(Path(root).glob(f"*/{MANIFEST}"), key=lambda file: file.stat().st_mtime)
    found = [file for file in found if not file.parent.name.endswith(".partial")]
    if not found:
        raise BundleError(f"no bundle under {root}/: make one with: python cli.py export --model latte-demo")
    return found[-1].parent


def verify_files(bundle: Bundle) -> None:
    """Compare every file with the manifest. Raises IntegrityError naming the first that differs.

    Refused: missing, truncated, altered, added and linked files, and graphs that carry native code (`EPContext`).
    """
    expected = bundle.manifest.files
    for entry in sorted(bundle.path.iterdir()):
        if entry.name not in expected and entry.name not in (MANIFEST, COMPILED):
            raise IntegrityError(f"bundle {bundle.path}: {entry.name} is not in its manifest; remove it")
    with ThreadPoolExecutor(max_workers=4) as pool:
        list(pool.map(lambda item: _verify_file(bundle.path, *item), expected.items()))


def file_record(path: Path) -> FileRecord:
    """Size and hash of a file as they are now."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else _digest(file.fileno())
    return FileRecord(bytes=path.stat().st_size, sha256=digest.hexdigest())


def check_request_shape(manifest: Manifest, height: int | None, width: int | None, frames: int | None) -> None:
    """Refuse sizes the bundle was not exported for. Raises InvalidRequest."""
    for name, got in (("height", height), ("width", width), ("frames", frames)):
        expected = getattr(manifest.shape, name)
        if got is not None and got != expected:
            raise InvalidRequest(
                f"{name}: got {got}, but this bundle was exported for {expected}; export again with --{name} {got}"
            )


class _SchemaOnly(msgspec.Struct):
    schema: int


def _digest(descriptor: int) -> hashlib._Hash:
    digest = hashlib.sha256()
    with open(descriptor, "rb", closefd=False) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest


def _check_names(folder: Path, manifest: Manifest) -> None:
    named = {part.graph for part in manifest.parts} | {manifest.text.tokenizer, manifest.sampler.table}
    for name in sorted(named | set(manifest.files)):
        if not _FILE_NAME.fullmatch(name):
            raise IntegrityError(f"bundle {folder}: file name {name!r} leaves the bundle or is not plain; export again")
        if name not in manifest.files:
            raise IntegrityError(f"bundle {folder}: {name} is used but has no hash in the manifest; export again")
    names = [block.name for block in manifest.blocks]
    if not names or len(set(names)) != len(names) or set(names) != set(manifest.cache_bytes_per_row):
        raise IntegrityError(f"bundle {folder}: the manifest's list of blocks contradicts itself; export again")


def _verify_file(folder: Path, name: str, record: FileRecord) -> None:
    path = folder / name
    if path.is_symlink():
        raise IntegrityError(f"bundle {folder}: {name} is a link; a bundle holds plain files only")
    if not path.is_file():
        raise IntegrityError(f"bundle {folder}: {name} is missing; export again")
    size = path.stat().st_size
    if size != record.bytes:
        raise IntegrityError(f"bundle {folder}: {name} has {size} bytes, expected {record.bytes}; export again")
    got = file_record(path).sha256
    if got != record.sha256:
        raise IntegrityError(
            f"bundle {folder}: {name} was altered (SHA-256 {got[:12]}…, expected {record.sha256[:12]}…); export again"
        )
    if path.suffix == ".onnx" and b"EPContext" in path.read_bytes():
        raise IntegrityError(f"bundle {folder}: {name} carries native code (an EPContext node), which is never run")
