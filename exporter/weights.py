"""Which files the weights of a component are read from, and what the headers of these files say of them.

What a component's own library would read is read here, where several files lie side by side: diffusers looks for an
index of shards first, transformers for a whole file. No weight is read, only headers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open

from ..engines.errors import CheckpointError, one_line

NAMED = 3  # names that a message lists
POINTER = b"version https://git-lfs"
QUANTISED_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json", "quantization_config.json")
OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".msgpack")
ADAPTER = "adapter_config.json"
DOWNLOAD_AGAIN = "the download is incomplete: download it again"


@dataclass(frozen=True)
class Stored:
    """One weight as its file's header has it; `dtype` by safetensors' own names, such as F16."""

    file: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself: its weights, and remarks of whoever wrote it."""

    weights: Mapping[str, Stored]
    remarks: Mapping[str, str]


class Files(Protocol):
    """The files of one component, wherever they lie."""

    @property
    def label(self) -> str:
        """How every message begins."""

    @property
    def remedy(self) -> str:
        """What to do where a file is missing."""

    @property
    def names(self) -> Collection[str]:
        """Names of all files, also of those that cannot be opened."""

    def read_json(self, name: str) -> dict[str, Any]:
        """The content of a JSON file. Raises CheckpointError."""

    def header(self, name: str) -> Header:
        """The header of a safetensors file. Raises CheckpointError."""


@dataclass(frozen=True)
class LocalFiles:
    """The files of one component in a folder; `remedy` is what to do where one is missing or damaged."""

    label: str
    folder: Path
    remedy: str = DOWNLOAD_AGAIN

    @property
    def names(self) -> Collection[str]:
        """Names of all files, dangling links among them."""
        return [path.name for path in sorted(self.folder.glob("*")) if not path.is_dir()]

    def read_json(self, name: str) -> dict[str, Any]:
        """The content of a JSON file. Raises CheckpointError."""
        return read_json(self.folder / name, f"{self.label} {name}", self.remedy)

    def header(self, name: str) -> Header:
        """The header of a safetensors file. Raises CheckpointError."""
        path = self.folder / name
        check_file(path, f"{self.label} {name}", self.remedy)
        try:
            with safe_open(path, framework="pt") as file:
                slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - it is no mapping
                weights = {
                    key: Stored(name, str(part.get_dtype()), tuple(part.get_shape())) for key, part in slices.items()
                }
                return Header(weights, dict(file.metadata() or {}))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.label} cannot read {name} ({one_line(error)}); {self.remedy}") from error


def check_file(path: Path, what: str, remedy: str) -> None:
    """Refuse what stands where a file should be and is none of any use. Raises CheckpointError with the remedy."""
    try:
        with path.open("rb") as file:
            start = file.read(len(POINTER))
    except OSError as error:
        if path.is_symlink() and not path.exists():
            reason = f"is a link to {path.readlink()}, which is not there"
        else:
            reason = "is not there" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise CheckpointError(f"{what} {reason}; {remedy}") from error
    if not start:
        raise CheckpointError(f"{what} is empty; {remedy}")
    if start == POINTER:
        raise CheckpointError(
            f"{what} is a Git LFS pointer, not the file itself; run `git lfs install` and `git lfs pull` in the clone, "
            "or download it from the hub"
        )


def read_json(path: Path, what: str, remedy: str) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError."""
    check_file(path, what, remedy)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is not valid JSON ({one_line(error)}); download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{what} is not a JSON object, got {type(content).__name__}; download it again")
    return content


def has_weights(files: Files) -> bool:
    """Whether a component has any file that is, or is to be, one of weights, readable or not."""
    return any(name.endswith((".safetensors", ".safetensors.index.json", *OTHER_FORMATS)) for name in files.names)


@dataclass(frozen=True)
class Source:
    """The files that a component is read from, the first of them an index where there are several.

    `shards` is then the file of each weight. `variant` is the one that the files are of, if any.
    """

    files: tuple[str, ...]
    shards: Mapping[str, str]
    variant: str | None


def stems(library: str) -> tuple[str, str]:
    """How files of weights are named, by the library that a component belongs to; the other's name comes second."""
    own, other = "diffusion_pytorch_model", "model"
    return (other, own) if library == "transformers" else (own, other)


def find_source(files: Files, library: str, variant: str | None) -> Source:
    """The files that a component's library would read, whether or not they can be.

    A variant that the component does not have is passed over, as the libraries do. Raises CheckpointError.
    """
    names = set(files.names)
    if ADAPTER in names and library == "transformers":
        raise CheckpointError(
            f"{files.label} has an adapter beside its weights ({ADAPTER}), which would not be read; merge it "
            "(merge_and_unload of peft) and save, or remove it"
        )
    taken = variant if variant in variants(names, library) else None
    for stem in stems(library):
        for candidate in _candidates(stem, library, taken):
            if candidate in names:
                table = {} if candidate.endswith(".safetensors") else _shards(files, candidate)
                return Source((candidate, *sorted(set(table.values()))), table, taken)
    raise CheckpointError(_why_none(files, library, variant))


def _candidates(stem: str, library: str, variant: str | None) -> tuple[str, ...]:
    if variant is None:
        whole, indices = f"{stem}.safetensors", [f"{stem}.safetensors.index.json"]
    else:
        whole = f"{stem}.{variant}.safetensors"
        indices = [f"{stem}.safetensors.index.{variant}.json", f"{stem}.safetensors.{variant}.index.json"]
    return (whole, indices[0]) if library == "transformers" else (*indices, whole)


def variants(names: Collection[str], library: str) -> set[str]:
    """The variants that files of weights are there of, such as fp16."""
    stem, part, variant = f"(?:{'|'.join(stems(library))})", r"-\d+-of-\d+", r"([^.]+?)"
    patterns = (
        rf"{stem}\.{variant}(?:{part})?\.(?:safetensors|bin)",
        rf"{stem}{part}\.{variant}\.(?:safetensors|bin)",
        rf"pytorch_model\.{variant}(?:{part})?\.bin",
        rf"{stem}\.safetensors\.index\.{variant}\.json",
        rf"{stem}\.safetensors\.{variant}\.index\.json",
    )
    found = {match[1] for name in names for pattern in patterns if (match := re.fullmatch(pattern, name))}
    return found - {"safetensors", "index"}


def _why_none(files: Files, library: str, variant: str | None) -> str:
    label, names = files.label, files.names
    readable = {name for name in names if ".safetensors" in name}
    there = sorted(variants(readable, library))
    expected = f"{stems(library)[0]}.safetensors"
    shards = sorted(name for name in readable if re.search(r"-\d+-of-\d+", name))
    if variant is None and there:
        return f"{label} has no {expected}, only the variant {' and '.join(there)}; give variant {there[0]}"
    if shards:
        return f"{label} has shards of weights ({some(shards)}) and no index of them; {files.remedy}"
    if variant is not None and variant in variants(names, library):
        return (
            f"{label} has the variant {variant} only in files that are not read, expected "
            f"{stems(library)[0]}.{variant}.safetensors; load it and save it with safe_serialization=True"
        )
    if there:
        return (
            f"{label} has no variant {variant} and no {expected}, only {' and '.join(there)}; give variant {there[0]}"
        )
    others = sorted(name for name in names if name.endswith(OTHER_FORMATS))
    if others:
        return (
            f"{label} has no {expected}, got {some(others)}; only safetensors are read, so convert other formats with "
            "diffusers' save_pretrained(safe_serialization=True)"
        )
    return f"{label} has no weights, expected {expected}; {files.remedy}"


def _shards(files: Files, source: str) -> dict[str, str]:
    table = files.read_json(source).get("weight_map")
    if not isinstance(table, dict) or not table or not all(_is_plain(file) for file in table.values()):
        raise CheckpointError(f"{files.label} {source} has no table of weights and files; download it again")
    return table


def _is_plain(name: object) -> bool:
    return isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")


def read_headers(files: Files, source: Source) -> dict[str, Stored]:
    """All that a component stores, from the headers of its files.

    Raises CheckpointError where a file is missing or unreadable, or an index and its shards contradict each other.
    """
    index, *shards = source.files
    if not shards:
        return dict(_plain_header(files, index).weights)
    missing = [shard for shard in shards if shard not in files.names]
    if missing:
        raise CheckpointError(
            f"{files.label} has {len(shards) - len(missing)} of the {len(shards)} shards that {index} names, not "
            f"{some(missing)}; {files.remedy}"
        )
    found: dict[str, Stored] = {}
    for shard in shards:
        header = _plain_header(files, shard)
        wrong = sorted(name for name in header.weights if source.shards.get(name) != shard)
        if wrong:
            raise CheckpointError(
                f"{files.label} {shard} holds {len(wrong)} weights that {index} does not place there ({some(wrong)}); "
                "these files do not belong together: download them again"
            )
        found |= header.weights
    absent = sorted(source.shards.keys() - found.keys())
    if absent:
        raise CheckpointError(
            f"{files.label} {index} names {len(absent)} weights that its shards do not hold ({some(absent)}); these "
            "files do not belong together: download them again"
        )
    return found


def _plain_header(files: Files, file: str) -> Header:
    """The header of a file, unless its remarks say that its weights are quantised."""
    header = files.header(file)
    for key, value in header.remarks.items():
        if "quant" in key.lower() and value not in ("", "null", "None", "{}"):
            raise CheckpointError(quantised(files.label, f"{file} says so in its metadata, {key}"))
    return header


def quantised(label: str, sign: str) -> str:
    """The message for quantised weights: what shows it, and the remedy."""
    return (
        f"{label} is quantised ({sign}), expected plain weights; load it with its own library, dequantise() it, and "
        "save it in fp16 or bf16, or give the original checkpoint"
    )


def some(names: Collection[str]) -> str:
    """The first few names."""
    first = list(names)[:NAMED]
    return f"{', '.join(first)}{', …' if len(names) > len(first) else ''}"
