"""A bundle on its way: the folder that an export fills, and the record of what is done in it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from ..engines.bundle import MANIFEST, open_bundle
from ..engines.errors import BundleError, IntegrityError
from ..engines.files import empty_folder, file_record, is_as_recorded, write_atomically, write_document
from ..engines.manifest import FileRecord, Manifest, Part, part_files

log = logging.getLogger("foresight")

STATE = "state.json"
KEY = "export_key"  # among what a manifest says of how the bundle was made


class _State(msgspec.Struct, forbid_unknown_fields=True):
    """What a partial bundle already holds."""

    key: str
    parts: dict[str, Part]
    files: dict[str, FileRecord]


class PartialBundle:
    """A folder with what an export of that key has written into it so far; of another one, it is emptied.

    `folder` is its caller's, who alone writes into it. What is recorded here was there, whole.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder = folder
        self._state = _state_of(folder, key)

    @property
    def parts(self) -> Mapping[str, Part]:
        """The parts that are done, by name."""
        return self._state.parts

    @property
    def files(self) -> dict[str, FileRecord]:
        """The records of all files, by name in order."""
        return dict(sorted(self._state.files.items()))

    def has(self, *names: str) -> bool:
        """Whether these files are there as they were recorded."""
        return all(is_as_recorded(self.folder / name, self._state.files.get(name)) for name in names)

    def has_part(self, name: str) -> bool:
        """Whether a part is done, and its files are there as they were recorded."""
        return name in self.parts and self.has(*part_files(self.parts[name]))

    def record(self, names: Sequence[str], part: Part | None = None) -> None:
        """Remember files that were written, and the part that they make."""
        if part is not None:
            self._state.parts[part.name] = part
        self._state.files.update({name: file_record(self.folder / name) for name in names})
        write_atomically(self.folder / STATE, msgspec.json.encode(self._state))

    def finish(self, manifest: Manifest) -> None:
        """Write the manifest, with which the folder is a bundle."""
        write_document(self.folder / MANIFEST, manifest)
        (self.folder / STATE).unlink(missing_ok=True)


def _state_of(folder: Path, key: str) -> _State:
    try:
        state = msgspec.json.decode((folder / STATE).read_bytes(), type=_State)
        if state.key == key:
            log.info("going on with %s: %d parts are done", folder, len(state.parts))
            return state
    except (FileNotFoundError, msgspec.DecodeError):
        pass
    try:  # all written, but not renamed
        manifest = open_bundle(folder).manifest
        if manifest.generator.get(KEY) == key:
            return _State(key=key, parts={part.name: part for part in manifest.parts}, files=manifest.files)
    except (BundleError, IntegrityError):
        pass
    empty_folder(folder)
    return _State(key=key, parts={}, files={})
