"""Many prompts, a file each: lines are checked before anything runs, and what is there is not made again.

A file's name ends in its row's key, a hash of all that its video depends on but the machine: another bundle or other
settings are another file. So a batch that was killed goes on where it was, by whoever and however it is started again.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from ..engines.arrays import Arrays
from ..engines.errors import EngineError, InvalidRequest, OutputError, one_line, quoted
from ..engines.files import document_of, sole_writer
from ..engines.progress import OnProgress, silent
from ..runtime.admission import CancelToken
from ..runtime.pipeline import VideoPipeline
from ..runtime.policies import policy_settings
from ..runtime.request import check_request
from ..runtime.video import check_output
from ..runtime.whole import write_whole
from .spec import Model, Spec, check_same, notes_of, request_of
from .worker import Failure

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
KEY_DIGITS = 16
HALF_WRITTEN = re.compile(r"\.[A-Za-z0-9._-]+\.(mp4|gif|npy|json)\.[a-z0-9_]{8}")  # by a process that was killed
ROW_ERRORS = (InvalidRequest, EngineError)  # of that row alone; others would meet the next one too


class Line(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A line of the file: what `Spec` has but the model, which is the bundle, and a name for the file."""

    prompt: str
    negative_prompt: str | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    policy: str | None = None
    profile: str | None = None
    guidance_2: float | None = None
    name: str | None = None


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One video of a batch: the number of its line, from 1; what is asked; its name, its key, and its bundle's id."""

    line: int
    spec: Spec
    name: str | None
    key: str
    bundle: str

    @property
    def stem(self) -> str:
        """What its files are called."""
        return self.key if self.name is None else f"{self.name}-{self.key}"


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a row; of one that failed also why, of one that was made what should be known of it."""

    row: Row
    file: str
    status: Literal["made", "there", "failed"]
    failure: Failure | None = None
    notes: tuple[str, ...] = ()


def rows_of(lines: Iterable[tuple[int, str]], model: Model, cache_memory: int | None = None) -> list[Row]:
    """The rows of numbered lines of JSON, each of which that model can make; identical ones once.

    `cache_memory` is what videos are made with, as it decides on what is reused. Raises InvalidRequest.
    """
    rows: dict[str, Row] = {}
    named: dict[str, int] = {}
    for number, text in lines:
        try:
            line = _line(text)
            if line.name is not None and named.setdefault(line.name, number) != number:
                raise InvalidRequest(
                    f"name: got {quoted(line.name)}, which line {named[line.name]} has, expected names that differ"
                )
            row = _row(number, line, model, cache_memory)
        except InvalidRequest as error:
            message = re.sub(r"^(\w+):", r'"\1":', str(error))  # as it is called there
            raise InvalidRequest(f"line {number}: {message}; nothing was made yet") from error
        rows.setdefault(row.stem, row)
    if not rows:
        raise InvalidRequest('prompts: got no lines, expected one JSON object a line, such as {"prompt": "a dog"}')
    return list(rows.values())


@dataclass(frozen=True)
class BatchFolder:
    """Where the files go: `STEM.KIND` of a row that was made, `STEM.failed.json` of one that failed."""

    path: Path
    kind: str = "mp4"

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Made if need be, and until the end nobody else's. Raises InvalidRequest, OutputError."""
        check_output(self.path / f"video.{self.kind}")
        try:
            with sole_writer(self.path):
                for entry in self.path.iterdir():
                    if HALF_WRITTEN.fullmatch(entry.name) and entry.is_dir() and not entry.is_symlink():
                        shutil.rmtree(entry)
                yield
        except OSError as error:
            raise OutputError(
                f"output {self.path}: {error.strerror or error}; check the path, its permissions and the free space"
            ) from error

    def file(self, row: Row) -> Path:
        """Where a row's video lies, or will."""
        return self.path / f"{row.stem}.{self.kind}"

    def missing(self, rows: Sequence[Row]) -> list[Row]:
        """Those whose video is not there."""
        return [row for row in rows if not self.file(row).is_file()]

    def make(
        self,
        pipeline: VideoPipeline,
        row: Row,
        on_progress: OnProgress = silent,
        cancel: CancelToken | None = None,
    ) -> Outcome:
        """Make a row's video, unless it is there. A request that fails is an outcome, and written down.

        Raises Cancelled, IntegrityError, OutputError.
        """
        if not self.missing([row]):
            return self.outcome(row, "there")
        check_same(pipeline.bundle, row.bundle)
        try:
            request = request_of(row.spec, pipeline.manifest)
            (video,) = pipeline.generate(request, on_progress=on_progress, cancel=cancel)
        except ROW_ERRORS as error:
            return self.failed(row, Failure.of(error))
        video.save(self.file(row))
        self._failure(row).unlink(missing_ok=True)
        return msgspec.structs.replace(self.outcome(row, "made"), notes=notes_of(row.spec, video.trace))

    def failed(self, row: Row, failure: Failure) -> Outcome:
        """Write down that a row was not made, and why. Raises OutputError."""
        told = {"line": row.line, "prompt": row.spec.prompt, "seed": row.spec.seed}
        told |= {"code": failure.code, "message": failure.message}
        write_whole(self._failure(row), lambda path: path.write_bytes(document_of(told)))
        return self.outcome(row, "failed", failure)

    def outcome(self, row: Row, status: Literal["made", "there", "failed"], failure: Failure | None = None) -> Outcome:
        """What became of a row here."""
        return Outcome(row=row, file=str(self.file(row)), status=status, failure=failure)

    def _failure(self, row: Row) -> Path:
        return self.path / f"{row.stem}.failed.json"


def _line(text: str) -> Line:
    try:
        line = msgspec.json.decode(text, type=Line)
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError) as error:
        known = ", ".join(repr(name) for name in Line.__struct_fields__[1:])
        raise InvalidRequest(
            f"got no row ({one_line(error)[:200]}), expected a JSON object with 'prompt', and of these what is wanted: "
            f"{known}"
        ) from error
    if line.name is not None and not NAME.fullmatch(line.name):
        raise InvalidRequest(
            f"name: got {quoted(line.name)}, expected up to 100 of A-Z, a-z, 0-9, '.', '_' and '-', a letter or digit "
            "first"
        )
    return line


def _row(number: int, line: Line, model: Model, cache_memory: int | None) -> Row:
    asked = {name: getattr(line, name) for name in Line.__struct_fields__ if name != "name"}
    spec, defaults = Spec(model=model.name, **asked), model.bundle.manifest.defaults
    (checked,) = check_request(request_of(spec, model.bundle.manifest), model.bundle.manifest, model.table, Arrays())
    depends_on = (
        model.bundle.id,
        checked.prompts,
        checked.negative_prompts,
        defaults.steps if spec.steps is None else spec.steps,
        checked.guidances,
        checked.seeds,
        policy_settings(checked.policy),  # of a profile too, which is no part of the bundle's id
        cache_memory,
    )
    digest = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()
    return Row(line=number, spec=spec, name=line.name, key=digest[:KEY_DIGITS], bundle=model.bundle.id)
