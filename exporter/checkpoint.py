"""A checkpoint, read one tensor at a time.

A checkpoint is a folder with a sub-folder per component: `config.json` and safetensors, whole or in shards; those of
diffusers also have `model_index.json`. On the hub its components may be published apart. Nothing is unpickled:
checkpoints with `.bin` weights only are refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..engines.errors import CheckpointError, InvalidRequest, one_line
from ..engines.files import file_record
from ..engines.progress import Counter, OnProgress
from .hub import HubFiles, Place, Repository, place_from_url
from .lora import LoraFile, merged
from .weights import DOWNLOAD_AGAIN, Files, LocalFiles, Source, Stored, find_source, read_headers, read_json

COMPONENTS = ("model_index.json", "scheduler", "text_encoder", "tokenizer", "transformer", "transformer_2", "vae")
WITH_WEIGHTS = ("text_encoder", "transformer", "vae")
OPTIONAL = ("transformer_2",)  # with weights, too
READ_SUFFIXES = (".json", ".safetensors", ".model")


class Checkpoint:
    """The components of one checkpoint. `name` is how the user called it, `folder` where it lies.

    `elsewhere` has the folders of components that do not lie in it, `hub` the files of those that are on the hub, of
    which only configurations are downloaded before `fetch`. `variant` is the one to be read where there are several.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        elsewhere: Mapping[str, Path] | None = None,
        variant: str | None = None,
        hub: Mapping[str, HubFiles] | None = None,
    ) -> None:
        self.name = name
        self.folder = folder
        self.variant = variant
        self._elsewhere = dict(elsewhere or {})
        self._hub = dict(hub or {})
        self._sources: dict[str, Source] = {}
        self._stored: dict[str, Mapping[str, Stored]] = {}
        self._sha256: str | None = None
        self.loras: tuple[LoraFile, ...] = ()

    def require_pipeline(self, expected: str, components: dict[str, str]) -> None:
        """Refuse a checkpoint of another pipeline, or one with components of another class."""
        got = self.index.get("_class_name")
        if got != expected:
            raise CheckpointError(
                f"checkpoint {self.name}: is a {got}, expected a {expected}; choose the model it belongs to"
            )
        for component, class_name in components.items():
            entry = self.index.get(component) or [None, None]
            if entry[1] != class_name:
                raise CheckpointError(
                    f"checkpoint {self.name}: {component} is a {entry[1]}, expected {class_name}; this kind of "
                    f"{component} cannot be exported"
                )

    @property
    def with_weights(self) -> tuple[str, ...]:
        """The components that have weights."""
        return (*WITH_WEIGHTS, *filter(self.has, OPTIONAL))

    def has(self, component: str) -> bool:
        """Whether it is one of those that `model_index.json` names."""
        return (self.folder / "model_index.json").is_file() and bool((self.index.get(component) or [None])[0])

    def component_folder(self, component: str) -> Path:
        """Where a component's files lie."""
        return self._elsewhere.get(component, self.folder / component)

    def component_class(self, component: str) -> str:
        """The class name that `model_index.json` gives for a component."""
        return str((self.index.get(component) or [None, None])[1])

    def component_library(self, component: str) -> str:
        """The library that `model_index.json` gives for a component; without one it is transformers."""
        if not (self.folder / "model_index.json").is_file():
            return "transformers"
        return str((self.index.get(component) or ["diffusers"])[0])

    def label(self, component: str) -> str:
        """How messages about a component begin."""
        return f"checkpoint {self.name}: {component}"

    def files(self, component: str) -> Files:
        """The files of a component."""
        if component in self._hub:
            return replace(self._hub[component], label=self.label(component))
        return LocalFiles(self.label(component), self.component_folder(component))

    def config(self, component: str, file: str = "config.json") -> dict[str, Any]:
        """A component's configuration."""
        path = self.component_folder(component) / file
        return self._read_json(path, f"{component}/{file}", self.remedy(component))

    def tensor(self, component: str, name: str) -> torch.Tensor:
        """One weight, in the dtype it is stored in; memory-mapped, and unmapped when the tensor goes.

        Where a LoRA changes it, it is fp32 and in memory.
        """
        stored = self.stored(component).get(name)
        if stored is None:
            raise CheckpointError(f"{self.label(component)} has no weight {name}; download it again")
        try:
            with safe_open(self.component_folder(component) / stored.file, framework="pt") as weights:
                tensor: torch.Tensor = weights.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{self.label(component)} cannot read {name} from {stored.file} ({one_line(error)}); download it again"
            ) from error
        return merged(tensor, self.loras, component, name)

    def stored(self, component: str) -> Mapping[str, Stored]:
        """All weights that a component stores, as the headers of its files have them. Raises CheckpointError."""
        if component not in self._stored:
            self._stored[component] = read_headers(self.files(component), self._source(component))
        return self._stored[component]

    def has_tensor(self, component: str, name: str) -> bool:
        """Whether a component stores a weight under that name."""
        return name in self.stored(component)

    @property
    def is_local(self) -> bool:
        """Whether it is a folder, and not on the hub."""
        return not self._hub

    @property
    def revision(self) -> str | None:
        """The commit that it is of, after the name that was given for it; None for a folder."""
        revisions = {component: files.repository.revision for component, files in self._hub.items()}
        if len(set(revisions.values())) > 1:
            return ", ".join(f"{component} {revision}" for component, revision in revisions.items())
        return next(iter(revisions.values()), None)

    @property
    def read_variant(self) -> str | None:
        """The variant, where any component has it."""
        return self.variant if any(self._source(name).variant for name in self.with_weights) else None

    def require_variant(self) -> None:
        """Refuse a variant that no component has. Raises CheckpointError."""
        if self.variant is not None and self.read_variant is None:
            raise CheckpointError(
                f"checkpoint {self.name}: no component has the variant {self.variant}, expected files like "
                f"model.{self.variant}.safetensors; leave variant out"
            )

    @property
    def download_bytes(self) -> int:
        """How much `fetch` has to download."""
        return sum(repository.bytes_missing(names) for repository, names in self._wanted())

    def fetch(self) -> None:
        """Download all that an export reads, and is not in the hub's cache yet. Raises CheckpointError."""
        for repository, names in self._wanted():
            repository.fetch(names)
        self._stored = {}  # from now on by what is on disk

    def _wanted(self) -> Iterable[tuple[Repository, list[str]]]:
        """The files to be had of every repository."""
        wanted: dict[int, tuple[Repository, list[str]]] = {}
        for component, files in self._hub.items():
            read = [name for name in files.names if name.endswith(READ_SUFFIXES) and self._is_read(component, name)]
            _, names = wanted.setdefault(id(files.repository), (files.repository, []))
            names += [files.path(name) for name in read]
        return wanted.values()

    def remedy(self, component: str) -> str:
        """What to do where a file of a component is missing."""
        return self._hub[component].remedy if component in self._hub else DOWNLOAD_AGAIN

    @property
    def sha256(self) -> str:
        """A hash over the content of all files that an export reads."""
        return self.hash()

    def hash(self, on_progress: OnProgress | None = None) -> str:
        """`sha256`, which is computed once; `on_progress` is told of the phase "hashing the checkpoint", in bytes."""
        if self._sha256 is None:
            digest, files = hashlib.sha256(), sorted(self._read_files())
            total = sum(path.stat().st_size for _, path in files)
            counter = Counter("hashing the checkpoint", total, "bytes", on_progress)
            for name, path in files:
                digest.update(f"{name} {file_record(path, counter.advance).sha256}\n".encode())
            self._sha256 = digest.hexdigest()
        return self._sha256

    @cached_property
    def index(self) -> dict[str, Any]:
        """What `model_index.json` says: the components, and settings of the pipeline."""
        return self._read_json(self.folder / "model_index.json", "model_index.json")

    def _read_files(self) -> Iterable[tuple[str, Path]]:
        """All files that an export reads, each with its name inside the checkpoint."""
        for component in COMPONENTS:
            top = self.component_folder(component)
            for path in (top, *top.rglob("*")):
                if path.is_file() and path.suffix in READ_SUFFIXES and self._is_read(component, path.name):
                    yield (Path(component) / path.relative_to(top)).as_posix(), path

    def _is_read(self, component: str, name: str) -> bool:
        """Whether a file of a component is one of those that are read: of weights, not every file is."""
        is_of_weights = component in (*WITH_WEIGHTS, *OPTIONAL) and ".safetensors" in name
        return not is_of_weights or name in self._source(component).files

    def _source(self, component: str) -> Source:
        if component not in self._sources:
            library = self.component_library(component)
            self._sources[component] = find_source(self.files(component), library, self.variant)
        return self._sources[component]

    def _read_json(self, path: Path, name: str, remedy: str = DOWNLOAD_AGAIN) -> dict[str, Any]:
        if not path.exists() and not path.is_symlink():
            hint = f"; {remedy}" if self._hub else ""
            raise CheckpointError(f"checkpoint {self.name}: no {name}; expected the model's published folders{hint}")
        return read_json(path, f"checkpoint {self.name}: {name}", remedy)


def find_checkpoint(
    source: str | Mapping[str, str], revision: str | None = None, variant: str | None = None
) -> Checkpoint:
    """A local folder, or a model on the Hugging Face hub by its id or its page's address.

    A mapping says for every component where it is published: a model id, or one and a folder in it, owner/name/folder.
    `revision` is a branch, tag or commit of all repositories, or COMPONENT=REVISION,… of some. Of what is on the hub,
    configurations alone are downloaded. Raises CheckpointError, InvalidRequest.
    """
    for name, value in (("revision", revision), ("variant", variant)):
        if value is not None and not value.strip():
            raise InvalidRequest(f"{name}: got {value!r}, expected a name; leave it out for the usual one")
    if not isinstance(source, str):
        return _published_apart(source, revision, variant)
    folder = Path(source)
    if source and folder.is_dir():
        if revision is not None:
            raise InvalidRequest(
                f"revision: got {revision!r} for the folder {source}, expected a model on the hub; leave it out"
            )
        return Checkpoint(source, folder, variant=variant)
    place = place_from_url(source)
    if place is None and (source.count("/") != 1 or source.startswith((".", "/", "~"))):
        raise CheckpointError(f"checkpoint {source}: no such folder, and not a hub id of the form owner/name")
    place = place or Place(source)
    if revision is not None and place.revision not in (None, revision):
        raise InvalidRequest(
            f"revision: got {revision!r} and an address of {place.revision!r}, expected one; leave one out"
        )
    return _published(replace(place, revision=revision or place.revision), variant)


def _published(place: Place, variant: str | None) -> Checkpoint:
    """A checkpoint whose components are folders of one repository."""
    names = {"tokenizer": "tokenizer_config.json"}  # its other files are large
    configs = [f"{component}/{names.get(component, '*.json')}" for component in COMPONENTS]
    first = [place.path(name) for name in ("model_index.json", *configs)]
    repository = Repository(place.repository, place.revision, first)
    hub = {
        component: HubFiles("", repository, place.path(component))
        for component in COMPONENTS
        if not component.endswith(".json")
    }
    return Checkpoint(place.repository, repository.folder / place.folder, variant=variant, hub=hub)


def _published_apart(source: Mapping[str, str], revision: str | None, variant: str | None) -> Checkpoint:
    """A checkpoint whose components are published by themselves."""
    revisions = _revisions(source, revision)
    hub = {}
    for component, text in source.items():
        owner, name, *inner = text.split("/", 2)
        place = Place(f"{owner}/{name}", "/".join(inner), revisions[component])
        first = [place.path("tokenizer_config.json" if component == "tokenizer" else "*.json")]
        hub[component] = HubFiles("", Repository(place.repository, place.revision, first), place.folder)
    folders = {component: files.repository.folder / files.folder for component, files in hub.items()}
    first_folder = next(iter(folders.values()))
    return Checkpoint(next(iter(source.values())), first_folder.parent, folders, variant, hub)


def _revisions(source: Mapping[str, str], revision: str | None) -> dict[str, str | None]:
    """The revision of each component."""
    if revision is None or "=" not in revision:
        return dict.fromkeys(source, revision)
    named = dict(pair.partition("=")[::2] for pair in revision.split(","))
    unknown = sorted(named.keys() - source.keys())
    if unknown or not all(named.values()):
        raise InvalidRequest(
            f"revision: got {revision!r}, expected COMPONENT=REVISION for some of {', '.join(source)}, or one revision"
        )
    return {component: named.get(component) for component in source}
