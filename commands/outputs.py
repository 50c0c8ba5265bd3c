"""The files a request leaves behind: where they go, checked before the work, written whole or not at all."""

from __future__ import annotations

import codecs
import json
import re
import tempfile
import zipfile
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..engines.arrays import HostArray
from ..engines.bundle import refuse_inside_bundle
from ..engines.errors import InvalidRequest, OutputError, one_line
from ..engines.progress import OnProgress
from ..runtime.video import Video, check_output
from ..runtime.whole import write_whole

if TYPE_CHECKING:
    from ..runtime.notes import Advice

ZIP = b"PK"
# Of each target, what it is asked for with, and how its name ends.
SUFFIXES = {
    "frames": ("save_frames", ".npy"),
    "latents": ("save_latents", ".npy"),
    "report": ("report", ".html"),
    "trace": ("trace", ".json"),
}


@dataclass(frozen=True)
class Targets:
    """Paths to write to, None for what is not wanted: the video, its frames and latents, the page, the trace."""

    output: Path | None = None
    frames: Path | None = None
    latents: Path | None = None
    report: Path | None = None
    trace: Path | None = None

    def check_frames(self, frames: int) -> None:
        """Refuse a file that cannot hold so many. Raises InvalidRequest."""
        if self.output is not None:
            check_output(self.output, frames)

    def check(self) -> None:
        """Refuse what cannot be written: wrong suffixes, missing libraries, folders that are not writable.

        Raises InvalidRequest, OutputError.
        """
        if self.output is not None:
            check_output(self.output)
        for name, (argument, suffix) in SUFFIXES.items():
            path = getattr(self, name)
            if path is not None and path.suffix.lower() != suffix:
                raise InvalidRequest(f"{argument}: got {path.name!r}, expected a name ending in {suffix}")
        if self.report is not None:
            from ..evaluation.report.templates import check_libraries

            check_libraries()
        places = [path.absolute() for path in self._wanted()]
        for path in places:
            refuse_inside_bundle(path)
            if places.count(path) > 1:
                raise InvalidRequest(f"output: got {path.name} for two results, expected a name for each")
        for path in self._wanted():
            check_writable(path)

    def numbered(self, index: int, count: int) -> Targets:
        """The targets of one of several videos: `name-000.mp4`; of a single one, the same."""
        if count == 1:
            return self
        renamed = {
            field.name: path.with_name(f"{path.stem}-{index:03d}{path.suffix}")
            for field in fields(self)
            if (path := getattr(self, field.name)) is not None
        }
        return replace(self, **renamed)

    def write(
        self,
        video: Video,
        reference: Video | None = None,
        advice: Advice | None = None,
        on_progress: OnProgress | None = None,
    ) -> list[Path]:
        """Write everything that is wanted; for the page, the same request without reuse, and what to try next."""
        if self.output is not None:
            video.save(self.output, on_progress=on_progress)
        if self.frames is not None:
            save_array(self.frames, video.frames)
        if self.latents is not None:
            save_array(self.latents, video.latents)
        if self.trace is not None:
            text = json.dumps(video.trace.to_dict(), indent=1)
            write_whole(self.trace, lambda path: path.write_text(text, encoding="utf-8"))
        if self.report is not None:
            from ..evaluation.report import write_report

            write_report(video, self.report, reference=reference, advice=advice)
        return self._wanted()

    def _wanted(self) -> list[Path]:
        return [path for field in fields(self) if (path := getattr(self, field.name)) is not None]


def check_writable(path: Path) -> None:
    """Make the folder of a file, and refuse where nothing can be written. Raises InvalidRequest, OutputError."""
    refuse_inside_bundle(path.absolute())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OutputError(f"output {path}: {error.strerror or error}; choose a place that is writable") from error


def save_array(path: Path, array: HostArray) -> None:
    """Write a .npy file. Raises OutputError."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.save(file, array, allow_pickle=False)

    write_whole(path, write)


def read_prompts(path: Path) -> list[str]:
    """The prompts of a UTF-8 file, one a line; blank lines count for nothing. Raises InvalidRequest."""
    return [line for _, line in read_lines(path, "prompt")]


def read_lines(path: Path, what: str) -> list[tuple[int, str]]:
    """The lines of a UTF-8 file of prompts that are not blank, with their numbers from 1. Raises InvalidRequest.

    Lines end at line feeds, with or without a carriage return: whatever else Unicode calls a line break is part of a
    prompt. A byte order mark, which some systems put first, is not; files that were put together have some before later
    lines. `what` is on each, for messages.
    """
    try:
        raw = path.read_bytes()
        text = re.sub("^\ufeff+", "", raw.decode("utf-8"), flags=re.MULTILINE)
    except UnicodeDecodeError as error:
        found = "UTF-16 text" if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else one_line(error)
        raise InvalidRequest(f"prompts {path}: got {found}, expected UTF-8; save it as UTF-8") from error
    except OSError as error:
        raise InvalidRequest(f"prompts {path}: cannot be read ({error.strerror or error}); check the path") from error
    if "\0" in text:
        raise InvalidRequest(f"prompts {path}: got characters of value 0, expected UTF-8 text; save it as UTF-8")
    lines = [(number, line.strip(" \t\r")) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise InvalidRequest(f"prompts {path}: has no {what}, expected one a line")
    return lines


def read_trace(path: Path) -> Any:
    """Read what `run --trace` wrote. Raises InvalidRequest."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InvalidRequest(f"trace {path}: cannot be read ({error}); expected a file that --trace wrote") from error


def read_latents(path: Path) -> HostArray:
    """Read initial noise from a .npy file. Raises InvalidRequest."""
    try:
        with path.open("rb") as file:
            is_zip = file.read(len(ZIP)) == ZIP
            file.seek(0)
            # mapped, so that no header can ask for memory; of a zip nothing is read
            array = np.load(file if is_zip else path, mmap_mode="r", allow_pickle=False)
    except (OSError, EOFError, ValueError, OverflowError, zipfile.BadZipFile) as error:
        raise InvalidRequest(f"latents {path}: cannot be read ({error}); expected an .npy file of fp32") from error
    if not isinstance(array, np.ndarray):
        raise InvalidRequest(f"latents {path}: holds several arrays, expected one (.npy)")
    return np.array(array)  # which nobody can truncate any more
