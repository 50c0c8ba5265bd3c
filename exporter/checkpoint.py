"""A checkpoint on disk, read one tensor at a time.

A checkpoint is a folder with a sub-folder per component: `config.json` and safetensors, whole or in shards; those of
diffusers also have `model_index.json`. On the hub its components may be published apart. Nothing is unpickled:
checkpoints with `.bin` weights only are refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..engines.bundle import file_record
from ..engines.errors import CheckpointError, one_line
from .weights import Files, LocalFiles, Stored, Weights, find_weights, read_json

COMPONENTS = ("model_index.json", "scheduler", "text_encoder", "tokenizer", "transformer", "vae")
READ_SUFFIXES = (".json", ".safetensors", ".model")


class Checkpoint:
    """The components of one checkpoint. `name` is how the user called it, `folder` where it lies.

    `elsewhere` has the folders of components that do not lie in it.
    """

    def __init__(
        self, name: str, folder: Path, elsewhere: Mapping[str, Path] | None = None, variant: str | None = None
    ) -> None:
        self.name = name
        self.folder = folder
        self._elsewhere = dict(elsewhere or {})
        self.variant = variant
        self._found: dict[str, Weights] = {}

    def require_pipeline(self, expected: str, components: dict[str, str]) -> None:
        """Refuse a checkpoint of another pipeline, or one with components of another class."""
        got = self._index.get("_class_name")
        if got != expected:
            raise CheckpointError(
                f"checkpoint {self.name}: is a {got}, expected a {expected}; choose the --model it belongs to"
            )
        for component, class_name in components.items():
            entry = self._index.get(component) or [None, None]
            if entry[1] != class_name:
                raise CheckpointError(
                    f"checkpoint {self.name}: {component} is a {entry[1]}, expected {class_name}; this kind of "
                    f"{component} cannot be exported"
                )

    def component_folder(self, component: str) -> Path:
        """Where a component's files lie."""
        return self._elsewhere.get(component, self.folder / component)

    def component_class(self, component: str) -> str:
        """The class name that `model_index.json` gives for a component."""
        return str((self._index.get(component) or [None, None])[1])

    def component_library(self, component: str) -> str:
        """The library that `model_index.json` gives for a component; transformers, as Open-Sora uses, without one."""
        if not (self.folder / "model_index.json").is_file():
            return "transformers"
        return str((self._index.get(component) or ["diffusers"])[0])

    def label(self, component: str) -> str:
        """How messages about a component begin."""
        return f"checkpoint {self.name}: {component}"

    def files(self, component: str) -> Files:
        """The files of a component."""
        return LocalFiles(self.label(component), self.component_folder(component))

    def config(self, component: str, file: str = "config.json") -> dict[str, Any]:
        """A component's configuration."""
        return self._read_json(self.component_folder(component) / file, f"{component}/{file}")

    def tensor(self, component: str, name: str) -> torch.Tensor:
        """One weight, in the dtype it is stored in; memory-mapped, and unmapped when the tensor goes."""
        stored = self.stored(component).get(name)
        if stored is None:
            raise CheckpointError(f"{self.label(component)} has no weight {name}; download it again")
        try:
            with safe_open(self.component_folder(component) / stored.file, framework="pt") as weights:
                return weights.get_tensor(name)  # type: ignore[no-any-return]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{self.label(component)} cannot read {name} from {stored.file} ({one_line(error)}); download it again"
            ) from error

    def stored(self, component: str) -> Mapping[str, Stored]:
        """All weights that a component stores, as the headers of its files have them. Raises CheckpointError."""
        return self._weights(component).stored

    def has_tensor(self, component: str, name: str) -> bool:
        """Whether a component stores a weight under that name."""
        return name in self.stored(component)

    @cached_property
    def sha256(self) -> str:
        """A hash over the content of all files that an export reads."""
        digest = hashlib.sha256()
        for name, path in sorted(self._read_files()):
            digest.update(f"{name} {file_record(path).sha256}\n".encode())
        return digest.hexdigest()

    @property
    def weight_bytes(self) -> int:
        """Size of all weight files on disk."""
        return sum(path.stat().st_size for _, path in self._read_files() if path.suffix == ".safetensors")

    @cached_property
    def _index(self) -> dict[str, Any]:
        return self._read_json(self.folder / "model_index.json", "model_index.json")

    def _read_files(self) -> Iterable[tuple[str, Path]]:
        """All files that an export reads, each with its name inside the checkpoint."""
        for component in COMPONENTS:
            top = self.component_folder(component)
            for path in (top, *top.rglob("*")):
                if path.is_file() and path.suffix in READ_SUFFIXES:
                    yield (Path(component) / path.relative_to(top)).as_posix(), path

    def _weights(self, component: str) -> Weights:
        if component not in self._found:
            self._found[component] = find_weights(
                self.files(component), self.component_library(component), self.variant
            )
        return self._found[component]

    def _read_json(self, path: Path, name: str) -> dict[str, Any]:
        if not path.exists() and not path.is_symlink():
            raise CheckpointError(f"checkpoint {self.name}: no {name}; expected the model's published folders")
        return read_json(path, f"checkpoint {self.name}: {name}")


def find_checkpoint(source: str | Mapping[str, str]) -> Checkpoint:
    """A local folder, or a model id on the Hugging Face hub, which is then downloaded into its usual cache.

    A mapping says for every component where it is published: a model id, or one and a folder in it, owner/name/folder.
    """
    if not isinstance(source, str):
        places = {component: _published(place) for component, place in source.items()}
        name = next(iter(source.values()))
        return Checkpoint(name, places[next(iter(source))].parent, places)
    folder = Path(source)
    if source and folder.is_dir():
        return Checkpoint(source, folder)
    if source.count("/") != 1 or source.startswith((".", "/")):
        raise CheckpointError(f"checkpoint {source}: no such folder, and not a hub id of the form owner/name")
    return Checkpoint(source, _download(source, _hub_patterns()))


def _published(place: str) -> Path:
    owner, name, *inner = place.split("/", 2)
    prefix = f"{inner[0]}/" if inner else ""
    return _download(f"{owner}/{name}", [f"{prefix}*{suffix}" for suffix in READ_SUFFIXES]) / prefix


def _download(model_id: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model_id, allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"checkpoint {model_id}: neither a folder nor to be had from the hub ({reason}); check the name and the "
            "network, or give a folder with --checkpoint"
        ) from error


def _hub_patterns() -> list[str]:
    folders = [component for component in COMPONENTS if not component.endswith(".json")]
    return ["model_index.json", *(f"{folder}/*{suffix}" for folder in folders for suffix in READ_SUFFIXES)]
