"""The bundle: what an export writes and a runtime reads, and the only thing the two share.

A bundle is a folder with `manifest.json`, one ONNX graph per part with its weights beside it, `tokenizer.json` and
`sampler.npz`. The manifest is typed and versioned and holds the SHA-256 of every other file; `open_bundle` reads it,
and `verify_files` refuses whatever it does not vouch for. Hashes prove that nothing was damaged or swapped; who made a
bundle, only a signature of its manifest says. Nothing vouches for the manifest's own numbers, profiles among them: they
are checked when it is read.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from .consistency import contradictions
from .errors import BundleError, IntegrityError, InvalidRequest, one_line
from .files import PARTIAL, TEMPORARY, document_of
from .limits import MANIFEST_BYTES, MOST_NAME, excesses
from .manifest import PLAIN_NAME, Manifest, part_files
from .progress import Counter, OnProgress
from .signatures import SIGNATURE, SIGNATURES, PublicKey, check_signature
from .verify import Stamp, changed, read_small, read_unchanged, unreadable, verify_file
from .wording import command

SCHEMA = 4
MANIFEST = "manifest.json"
UNFINISHED = f"{MANIFEST}{TEMPORARY}"  # by a writer of profiles that was killed; never read
COMPILED = "engines"
# Left alone: what comes with a download of a repository.
FROM_HUBS = (".cache", ".git", ".gitattributes", ".gitignore", "README.md", "LICENSE")


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. `id` is the SHA-256 of its manifest less the profiles, and so of its whole content.

    `stamps` are those of its files when `verify_files`, which fills them in, had hashed them. `keys` are those one of
    which signed the manifest and must have signed compiled engines; where there are none, nobody need have.
    """

    path: Path
    manifest: Manifest
    id: str
    stamps: dict[str, Stamp] = field(default_factory=dict, compare=False, repr=False)
    keys: tuple[PublicKey, ...] = field(default=(), compare=False, repr=False)

    def file(self, name: str) -> Path:
        """The path of one of the bundle's files."""
        return self.path / name

    def read(self, name: str) -> bytes:
        """The content of one of its files, as it was verified. Raises IntegrityError, BundleError."""
        return read_unchanged(self.path, name, self.stamps.get(name), self.manifest.files[name])


def open_bundle(path: str | os.PathLike[str], keys: Sequence[PublicKey] = ()) -> Bundle:
    """Read a bundle's manifest; the files themselves are checked by `verify_files`.

    With `keys`, one of them must have signed it; nothing of it is read before that is known.
    Raises BundleError where there is no bundle, it cannot be read or it needs a newer version, IntegrityError where
    the manifest is not a valid one or not signed as it should be, InvalidRequest for what is no path.
    """
    try:
        folder = Path(path)
    except TypeError as error:
        raise InvalidRequest(f"bundle: got {path!r}, expected the path of a folder") from error
    try:
        (folder / MANIFEST).lstat()
    except (FileNotFoundError, NotADirectoryError) as error:
        what = "has no manifest.json, so it is no bundle or a half-written one" if folder.is_dir() else "not found"
        raise BundleError(f"bundle {folder}: {what}; make it with: {command('export --model NAME')}") from error
    except ValueError as error:  # a null character
        raise InvalidRequest(f"bundle: got {path!r}, expected the path of a folder") from error
    except OSError as error:
        raise unreadable(folder, MANIFEST, error) from error
    raw = read_small(folder, MANIFEST, MANIFEST_BYTES)
    check_signature(folder, MANIFEST, SIGNATURE, raw, keys)
    try:
        schema = msgspec.json.decode(raw, type=_SchemaOnly).schema
        if schema < 1:
            raise IntegrityError(f"bundle {folder}: manifest.json has schema {schema}, which never was; export again")
        if schema < SCHEMA:
            raise BundleError(f"bundle {folder}: has schema {schema}, this version reads {SCHEMA}; export again")
        if schema > SCHEMA:
            raise BundleError(
                f"bundle {folder}: has schema {schema}, this version reads {SCHEMA}; upgrade foresight-engines, "
                "or export again"
            )
        manifest = msgspec.json.decode(raw, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise IntegrityError(f"bundle {folder}: manifest.json is not valid ({_shown(error)}); export again") from error
    _check_names(folder, manifest)
    for excess in excesses(manifest):
        raise IntegrityError(f"bundle {folder}: manifest.json is not one of a bundle: {excess}; export again")
    for contradiction in contradictions(manifest):
        raise IntegrityError(f"bundle {folder}: manifest.json contradicts itself: {contradiction}; export again")
    return Bundle(path=folder, manifest=manifest, id=id_of_manifest(raw), keys=tuple(keys))


def id_of_manifest(raw: bytes) -> str:
    """The SHA-256 of a manifest as it was before profiles were written into it, so that engines stay its own."""
    if b'"profiles"' in raw:
        document = msgspec.json.decode(raw)
        if document.pop("profiles", None) is not None:
            raw = document_of(document)
    return hashlib.sha256(raw).hexdigest()


def is_signed(bundle: Bundle) -> bool:
    """Whether a signature of its manifest lies in it, right or wrong."""
    return (bundle.path / SIGNATURE).is_file()


def newest_bundle(root: str | os.PathLike[str] = "bundles") -> Path:
    """The bundle under `root` that was last exported, or found up to date by an export. Raises BundleError."""
    found = sorted(Path(root).glob(f"*/{MANIFEST}"), key=_last_exported)
    found = [file for file in found if not file.parent.name.endswith(PARTIAL)]
    if not found:
        raise BundleError(f"no bundle under {root}/: make one with: {command('export --model NAME')}")
    return found[-1].parent


def _last_exported(manifest: Path) -> float:
    return max(manifest.lstat().st_mtime, manifest.parent.stat().st_mtime)


def mark_as_newest(bundle: Bundle) -> None:
    """Let `newest_bundle` take it; none of its files is touched, as it may be served."""
    with suppress(OSError):  # somebody else's folder: then it is not the newest
        os.utime(bundle.path)


def refuse_inside_bundle(path: Path) -> None:
    """Refuse to write a file into a bundle, which would no longer be the one its manifest vouches for.

    Raises InvalidRequest.
    """
    for folder in path.resolve().parents:
        if (folder / MANIFEST).is_file() and any(folder.glob("*.onnx")):
            raise InvalidRequest(
                f"output: got {path}, which lies in the bundle {folder}, expected a place outside it: a bundle with "
                "other files in it is refused"
            )


def verify_files(bundle: Bundle, on_progress: OnProgress | None = None) -> None:
    """Compare every file with the manifest. Raises IntegrityError naming the first that differs, or BundleError.

    Refused: missing, truncated, altered, added and linked files, graphs that carry native code (`EPContext`) or have
    weights anywhere but in their own file, and compiled engines behind a link. What a hub puts beside a bundle's files
    is left alone and never read.
    `on_progress` is told of the phase "verifying", in bytes.
    """
    expected = bundle.manifest.files
    try:
        entries = sorted(bundle.path.iterdir())
    except OSError as error:
        raise unreadable(bundle.path, "it", error) from error
    for entry in entries:
        if entry.name not in {*expected, *FROM_HUBS, *SIGNATURES, MANIFEST, UNFINISHED, COMPILED}:
            raise IntegrityError(f"bundle {bundle.path}: {entry.name[:200]!r} is not in its manifest; remove it")
    check_compiled_folder(bundle.path)
    weights = {}
    for part in bundle.manifest.parts:
        graph, data = part_files(part)
        weights[graph] = (data, expected[data].bytes)
    with ThreadPoolExecutor(max_workers=4) as pool:
        counter = Counter("verifying", sum(record.bytes for record in expected.values()), "bytes", on_progress)
        stamps = counter.results(
            [
                pool.submit(verify_file, bundle.path, name, record, counter.add, weights.get(name))
                for name, record in expected.items()
            ]
        )
    bundle.stamps.update(zip(expected, stamps, strict=True))


def check_compiled_folder(bundle: Path) -> None:
    """Refuse compiled engines that lie behind a link: they would be another bundle's, or anybody's.

    Raises IntegrityError.
    """
    folder = bundle / COMPILED
    if not os.path.lexists(folder):
        return
    try:
        found = [folder, *folder.iterdir()] if folder.is_dir() else [folder]
    except OSError as error:
        raise unreadable(bundle, COMPILED, error) from error
    for entry in found:
        if entry.is_symlink() or not entry.is_dir():
            raise IntegrityError(
                f"bundle {bundle}: {entry.relative_to(bundle)} is a link or no folder, where compiled engines lie; "
                "remove it"
            )


class Unchanged:
    """Tells whether files of a bundle are still those that were verified, without reading them.

    Of a bundle that was not verified: those that were there when this was made.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._known = {name: bundle.stamps.get(name) or self._stamp(name) for name in bundle.manifest.files}

    def check(self, *names: str) -> None:
        """Raises IntegrityError where one of these, or of all where none is named, was replaced or written to."""
        for name in names or self._known:
            if self._stamp(name) != self._known[name]:
                raise changed(self._bundle.path, name)

    def _stamp(self, name: str) -> Stamp | None:
        try:
            return Stamp.of(self._bundle.file(name))
        except OSError:
            return None


def _shown(error: Exception) -> str:
    """A decoder's reason, which quotes the file: one line, not long, nothing that a terminal would obey."""
    text = "".join(letter if letter.isprintable() else " " for letter in one_line(error))
    return text if len(text) <= 300 else f"{text[:300]}…"


class _SchemaOnly(msgspec.Struct):
    schema: int


def _check_names(folder: Path, manifest: Manifest) -> None:
    named = {part.graph for part in manifest.parts} | {manifest.text.tokenizer, manifest.sampler.table}
    for name in sorted(named | set(manifest.files)):
        if (
            not PLAIN_NAME.fullmatch(name)
            or len(name) > MOST_NAME
            or name in {MANIFEST, UNFINISHED, COMPILED, *SIGNATURES}
        ):
            raise IntegrityError(
                f"bundle {folder}: file name {name[:MOST_NAME]!r} leaves the bundle or is not plain; export again"
            )
        if name not in manifest.files:
            raise IntegrityError(f"bundle {folder}: {name} is used but has no hash in the manifest; export again")
    for part in manifest.parts:
        if not part.graph.endswith(".onnx"):
            raise IntegrityError(f"bundle {folder}: graph {part.graph} is not an .onnx file; export again")
