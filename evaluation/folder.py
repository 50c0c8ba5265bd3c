"""The folder of an evaluation: rows, a line of JSON each, and every video, so that it can be gone on with later.

    settings.json     what all rows have in common; a call with other settings is refused
    rows.jsonl        one line a video, added when the video is there
    videos/           frames of every candidate and of the reference, .npy

Frames stay there: metrics that are asked for later need no new videos.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ..engines.arrays import HostArray
from ..engines.bundle import refuse_inside_bundle
from ..engines.errors import InvalidRequest, OutputError, one_line, quoted
from ..engines.files import sole_writer, write_atomically
from ..engines.progress import OnProgress, silent
from ..engines.wording import mebibytes
from ..runtime.admission import CancelToken
from ..runtime.whole import write_whole
from .evaluate import Evaluation, Row, VideoKey

SETTINGS, ROWS, VIDEOS = "settings.json", "rows.jsonl", "videos"


class EvaluationFolder:
    """One evaluation's files; see `opened`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.videos = VideoFiles(path / VIDEOS)

    def run(self, job: Evaluation, on_progress: OnProgress = silent, cancel: CancelToken | None = None) -> list[Row]:
        """All rows of a job whose videos are this folder's, in its order; those that are not here yet are made.

        Raises what `Evaluation.run` raises; OutputError, also where there is no room for all videos. What is done by
        then is kept.
        """
        known = self.rows()
        shape = job.pipeline.manifest.shape
        missing = sum(1 + len(those) for those in job.missing(known).values())
        self.check_space(missing, shape.frames * shape.height * shape.width * 3)
        for row in job.run(known, on_progress, cancel):
            self.keep(row)
        rows = {row.key: row for row in self.rows()}
        return [rows[VideoKey(name, pair)] for name in job.names for pair in job.pairs]

    def rows(self) -> list[Row]:
        """Those of earlier calls; of one video the newest. Raises OutputError."""
        try:
            lines = (self.path / ROWS).read_text(encoding="utf-8").splitlines()
            rows = [Row(**json.loads(line)) for line in lines]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, TypeError) as error:
            raise OutputError(
                f"output {self.path / ROWS}: cannot be read ({one_line(error)}); remove the folder, or name another"
            ) from error
        return list({row.key: row for row in rows}.values())

    def keep(self, row: Row) -> None:
        """Add a row. Raises OutputError."""
        line = json.dumps(asdict(row), ensure_ascii=True, allow_nan=False)
        try:
            with (self.path / ROWS).open("ab") as file:
                file.write(f"{line}\n".encode())
        except OSError as error:
            raise _failed(self.path / ROWS, error) from error

    def write(self, name: str, text: str) -> Path:
        """Write a result, whole or not at all; returns its path. Raises OutputError."""
        # a prompt from a shell may hold lone surrogates, which UTF-8 cannot
        return write_whole(self.path / name, lambda path: path.write_bytes(text.encode("utf-8", "replace")))

    def check_space(self, videos: int, video_bytes: int) -> None:
        """Refuse what there is no room for. Raises OutputError."""
        needed, free = videos * video_bytes, shutil.disk_usage(self.path).free
        if needed > free:
            wanted, there = mebibytes(needed, free)
            raise OutputError(
                f"output {self.path}: {videos} videos take {wanted} MiB, {there} MiB are free; free some space, or ask "
                "for fewer prompts, seeds or policies"
            )


class VideoFiles:
    """Videos as .npy files; see `Videos` in evaluate.py. Raises OutputError."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __contains__(self, key: object) -> bool:
        return isinstance(key, VideoKey) and self._path(key).is_file()

    def __getitem__(self, key: VideoKey) -> HostArray:
        path = self._path(key)
        try:
            with path.open("rb") as file:
                frames = np.load(file, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise OutputError(
                f"output {path}: cannot be read ({one_line(error)}); remove it, and it is made anew"
            ) from error
        assert isinstance(frames, np.ndarray)
        return frames

    def __setitem__(self, key: VideoKey, frames: HostArray) -> None:
        def write(path: Path) -> None:
            with path.open("wb") as file:
                np.save(file, frames, allow_pickle=False)

        write_whole(self._path(key), write)

    def _path(self, key: VideoKey) -> Path:
        """A name that tells people something, and is no other video's."""
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
        words = "-".join(re.findall(r"[A-Za-z0-9.]+", f"{key.candidate} {key.pair.prompt}"))[:80]
        return self._folder / f"{words}-{key.pair.seed}-{digest}.npy"


@contextmanager
def opened(path: Path, settings: Mapping[str, Any]) -> Iterator[EvaluationFolder]:
    """The folder of an evaluation with these settings, plain JSON values, made if need be; until then nobody else's.

    Raises InvalidRequest for a place inside a bundle, and for a folder that holds other things or an evaluation with
    other settings; OutputError.
    """
    refuse_inside_bundle(path / SETTINGS)
    try:
        with sole_writer(path):
            _check_settings(path, settings)
            _drop_half_a_line(path / ROWS)
            yield EvaluationFolder(path)
    except OSError as error:
        raise _failed(path, error) from error


def _check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raises InvalidRequest, OSError."""
    file = folder / SETTINGS
    if not file.is_file():
        if any(folder.iterdir()):
            raise InvalidRequest(f"output: folder {folder} holds other things than an evaluation; name one that is new")
        write_atomically(file, json.dumps(dict(settings), indent=1).encode())
        return
    try:
        kept = dict(json.loads(file.read_text(encoding="utf-8")))
    except ValueError as error:
        raise InvalidRequest(f"output: {file} cannot be read ({one_line(error)}); name another folder") from error
    for name in settings.keys() | kept.keys():
        if kept.get(name) != settings.get(name):
            raise InvalidRequest(
                f"output: the evaluation in {folder} has {name} {quoted(kept.get(name))}, this one "
                f"{quoted(settings.get(name))}; name another folder, or remove that one"
            )


def _drop_half_a_line(rows: Path) -> None:
    """What was being written when an earlier call was killed. Raises OSError."""
    if not rows.is_file():
        return
    content = rows.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        write_atomically(rows, whole)


def _failed(path: Path, error: OSError) -> OutputError:
    return OutputError(f"output {path}: {error.strerror or error}; check the path, its permissions and the free space")
