"""What a backend compiled from a bundle for one kind of machine: plans, beside the graphs they were built from.

They lie in `<bundle>/engines/<backend>-<fingerprint>/`: one file per part, and `engines.json` with the hash of each.
A plan is code, run as it is. So it is handed to a library only where the index belongs to this very bundle and to
this target, and vouches for every byte of it; of a bundle that was opened with keys, only where one of them has
signed the index.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from .bundle import COMPILED, Bundle, check_compiled_folder
from .errors import BundleError, IntegrityError
from .files import PARTIAL
from .limits import INDEX_BYTES, MOST_NUMBER
from .manifest import PLAIN_NAME, FileRecord
from .signatures import INDEX_SIGNATURE, SIGNATURES, PublicKey, check_signature
from .verify import Stamp, open_plain, read_small
from .wording import command

INDEX = "engines.json"
TIMING_CACHE = "timing.cache"
INDEX_SCHEMA = 2


class CompiledPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One plan. `scratch_bytes` is the memory it needs while it runs, as its builder counted it.

    `fused_attention` is None where the graph has no attention that is one operator.
    """

    file: str
    record: FileRecord
    scratch_bytes: int
    fused_attention: bool | None
    build_seconds: float


class Index(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The plans of one bundle for one target. `target` is what they run on, `settings` how they were built."""

    schema: int
    bundle: str
    backend: str
    target: dict[str, str]
    settings: dict[str, str]
    parts: dict[str, CompiledPart]


@dataclass(frozen=True)
class Compiled:
    """The plans in one folder, and their index."""

    folder: Path
    index: Index

    @property
    def scratch_bytes(self) -> int:
        """What one buffer must hold that all plans use in turn."""
        return max((part.scratch_bytes for part in self.index.parts.values()), default=0)

    @property
    def plan_bytes(self) -> int:
        """All plans together: about the memory that their weights take on the device."""
        return sum(part.record.bytes for part in self.index.parts.values())

    @property
    def split_guidance(self) -> bool:
        """Whether they take one half of a guided batch at a time."""
        return self.index.settings.get("split_guidance") == str(True)

    @property
    def taken_apart(self) -> list[str]:
        """The parts whose attention has no fused kernel, so that its scores take memory."""
        return [name for name, part in sorted(self.index.parts.items()) if part.fused_attention is False]

    def part(self, name: str) -> CompiledPart:
        """What the index says of a part. Raises BundleError."""
        if name not in self.index.parts:
            raise BundleError(f"engines {self.folder}: hold no plan of {name}; {self._remedy}")
        return self.index.parts[name]

    def read_plan(self, part: str) -> bytes:
        """A part's plan, compared with its hash first. Raises BundleError, IntegrityError."""
        compiled = self.part(part)
        with open_plain(self.folder, compiled.file, "engines", self._remedy) as file:
            size = Stamp.of(file.fileno()).bytes
            plan = file.read(size) if size == compiled.record.bytes else b""
        if len(plan) != compiled.record.bytes or hashlib.sha256(plan).hexdigest() != compiled.record.sha256:
            raise IntegrityError(
                f"engines {self.folder}: {compiled.file} was altered, and a plan is code, so it is not loaded; "
                f"{self._remedy}"
            )
        return plan

    @property
    def _remedy(self) -> str:
        return _remedy(self.folder.parents[1], self.index.backend)


def fingerprint(target: Mapping[str, str]) -> str:
    """Names a target: whatever differs in one fact has another."""
    return hashlib.sha256(json.dumps(dict(target), sort_keys=True).encode()).hexdigest()[:12]


def compiled_folder(bundle: Bundle, backend: str, target: Mapping[str, str]) -> Path:
    """Where the plans of a bundle for a target lie, whether they have been built or not."""
    return bundle.path / COMPILED / f"{backend}-{fingerprint(target)}"


def find_compiled(bundle: Bundle, backend: str, target: Mapping[str, str]) -> Compiled:
    """The plans of a bundle for a target. Raises BundleError where there are none, IntegrityError."""
    check_compiled_folder(bundle.path)
    folder = compiled_folder(bundle, backend, target)
    if folder.is_dir():
        compiled = open_compiled(folder, bundle.keys)
        if compiled.index.bundle == bundle.id and compiled.index.target == dict(target):
            return compiled
        raise BundleError(
            f"engines {folder}: were built from another bundle or for another machine; {_remedy(bundle.path, backend)}"
        )
    others = [other.index.target for other in list_compiled(bundle) if other.index.backend == backend]
    wanted = ", ".join(target.values())
    found = "; ".join(", ".join(other.values()) for other in others) or "none"
    raise BundleError(
        f"engines of {bundle.path}: got {found} for {backend}, expected {wanted}; {_remedy(bundle.path, backend)}"
    )


def list_compiled(bundle: Bundle) -> list[Compiled]:
    """All finished plans of a bundle, for whatever machine. Raises IntegrityError."""
    check_compiled_folder(bundle.path)
    folders = sorted((bundle.path / COMPILED).glob("*"))
    return [open_compiled(folder, bundle.keys) for folder in folders if folder.is_dir() and folder.suffix != PARTIAL]


def open_compiled(folder: Path, keys: Sequence[PublicKey] = ()) -> Compiled:
    """Read the index of a folder of plans, signed with one of these keys; the plans are checked as they are read.

    Raises IntegrityError.
    """
    try:
        raw = read_small(folder, INDEX, INDEX_BYTES, "engines", "remove the folder")
        check_signature(folder, INDEX, INDEX_SIGNATURE, raw, keys, "engines")
        index = msgspec.json.decode(raw, type=Index)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise IntegrityError(f"engines {folder}: {INDEX} cannot be read ({error}); remove the folder") from error
    if index.schema != INDEX_SCHEMA:
        raise IntegrityError(
            f"engines {folder}: got schema {index.schema}, expected {INDEX_SCHEMA}; "
            f"{_remedy(folder.parents[1], index.backend)}"
        )
    for part in index.parts.values():
        if not PLAIN_NAME.fullmatch(part.file):
            raise IntegrityError(f"engines {folder}: file name {part.file!r} is not plain; remove the folder")
        if not (0 <= part.record.bytes <= MOST_NUMBER and 0 <= part.scratch_bytes <= MOST_NUMBER):
            raise IntegrityError(f"engines {folder}: {part.file} has no size that could be; remove the folder")
    return Compiled(folder, index)


def verify_compiled(compiled: Compiled) -> None:
    """Compare every plan with the index, and refuse files that are not in it. Raises IntegrityError, BundleError."""
    expected = f"{compiled.index.backend}-{fingerprint(compiled.index.target)}"
    if compiled.folder.name != expected:
        raise IntegrityError(
            f"engines {compiled.folder}: are for {', '.join(compiled.index.target.values())}, expected in a folder "
            f"{expected}; {compiled._remedy}"
        )
    known = {part.file for part in compiled.index.parts.values()} | {INDEX, TIMING_CACHE, *SIGNATURES}
    for entry in sorted(compiled.folder.iterdir()):
        if entry.name not in known or entry.is_symlink():
            raise IntegrityError(f"engines {compiled.folder}: {entry.name} is not in {INDEX}; remove it")
    for name in compiled.index.parts:
        compiled.read_plan(name)


def _remedy(bundle: Path, backend: str) -> str:
    return f"build them with: {command(f'build {bundle} --backend {backend}')}"
