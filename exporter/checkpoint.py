"""A checkpoint on disk, read one tensor at a time.

A checkpoint is a folder with a sub-folder per component: `config.json` and safetensors, whole or in shards; those of
diffusers also have `model_index.json`. On the hub its components may be published apart. Nothing is unpickled:
checkpoints with `.bin` weights only are refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..engines.bundle import file_record
from ..engines.errors import CheckpointError

COMPONENTS = ("model_index.json", "scheduler", "text_encoder", "tokenizer", "transformer", "vae")
READ_SUFFIXES = (".json", ".safetensors", ".model")
WEIGHT_STEMS = ("diffusion_pytorch_model", "model")


class Checkpoint:
    """The components of one checkpoint. `name` is how the user called it, `folder` where it lies.

    `elsewhere` has the folders of components that do not lie in it.
    """

    def __init__(self, name: str, folder: Path, elsewhere: Mapping[str, Path] | None = None) -> None:
        self.name = name
        self.folder = folder
        self._elsewhere = dict(elsewhere or {})
        self._weight_files: dict[str, dict[str, Path]] = {}

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

    def config(self, component: str, file: str = "config.json") -> dict[str, Any]:
        """A component's configuration."""
        return self._read_json(self.component_folder(component) / file, f"{component}/{file}")

    def tensor(self, component: str, name: str) -> torch.Tensor:
        """One weight, in the dtype it is stored in; memory-mapped, and unmapped when the tensor goes."""
        file = self._files(component).get(name)
        if file is None:
            raise CheckpointError(f"checkpoint {self.name}: {component} has no weight {name}; download it again")
        try:
            with safe_open(file, framework="pt") as weights:
                return weights.get_tensor(name)  # type: ignore[no-any-return]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"checkpoint {self.name}: cannot read {name} from {file.name}: {error}") from error

    def tensor_names(self, component: str) -> Iterable[str]:
        """The names of all weights that a component stores."""
        return self._files(component).keys()

    def has_tensor(self, component: str, name: str) -> bool:
        """Whether a component stores a weight under that name."""
        return name in self._files(component)

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

    def _files(self, component: str) -> dict[str, Path]:
        """The file that stores each of a component's weights."""
        if component not in self._weight_files:
            self._weight_files[component] = self._find_weights(component)
        return self._weight_files[component]

    def _find_weights(self, component: str) -> dict[str, Path]:
        folder = self.component_folder(component)
        for stem in WEIGHT_STEMS:
            index = folder / f"{stem}.safetensors.index.json"
            if index.is_file():
                table = self._read_json(index, f"{component}/{index.name}").get("weight_map")
                if not isinstance(table, dict) or any(Path(str(file)).name != file for file in table.values()):
                    raise CheckpointError(
                        f"checkpoint {self.name}: {index.name} has no table of weights and files; download it again"
                    )
                return {name: folder / file for name, file in table.items()}
        named = [folder / f"{stem}.safetensors" for stem in WEIGHT_STEMS]
        whole = next((file for file in named if file.is_file()), named[0])
        try:
            with safe_open(whole, framework="pt") as weights:
                return dict.fromkeys(weights.keys(), whole)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"checkpoint {self.name}: {component} has no readable {whole.name} ({error}); only safetensors are "
                "read, so convert other formats with diffusers' save_pretrained(safe_serialization=True)"
            ) from error

    def _read_json(self, path: Path, name: str) -> dict[str, Any]:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise CheckpointError(
                f"checkpoint {self.name}: no {name}; expected the model's published folders"
            ) from error
        except ValueError as error:
            raise CheckpointError(f"checkpoint {self.name}: {name} is not valid JSON ({error})") from error
        if not isinstance(content, dict):
            raise CheckpointError(f"checkpoint {self.name}: {name} is not a JSON object")
        return content


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
